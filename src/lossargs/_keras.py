"""All that lossargs needs from Keras and that has no public form.

If a Keras release moves one of these names, this is the file to mend, and the only one.
"""

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import keras

# Before the first step Keras builds the loss with stand-ins, which did not come from the model.
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

# What the replicas of `tf.distribute` are given is scaled by their number; logs are not.
from keras.src.losses.loss import unscale_loss_for_distribution

# What Keras makes of a plain function given to `compile(loss=...)`: rank squeezing, masks, weights
# and reductions. Evaluating through it is what makes a bound loss equal to such a function.
from keras.src.losses.losses import LossFunctionWrapper as FunctionLoss

# What `keras.Model(inputs, outputs)` makes.
from keras.src.models.functional import Functional

# How Keras names a function in the logs.
from keras.src.utils.naming import get_object_name

__all__ = [
    "FunctionLoss",
    "Functional",
    "above",
    "flat_layers",
    "get_object_name",
    "in_metrics",
    "in_symbolic_scope",
    "in_training_step",
    "keeps_constructor",
    "metric_names",
    "model_in_use",
    "origin",
    "own_variables",
    "unscale_loss_for_distribution",
    "variables_can_be_assigned",
    "weighted_metrics_in_use",
]


def variables_can_be_assigned() -> bool:
    """Whether a variable assigned here keeps its value, and is not left holding a traced one."""
    return keras.backend.backend() != "jax" or bool(in_stateless_scope())


def flat_layers(model: keras.Layer) -> list[keras.Layer]:
    """The model itself and all its layers, at any depth."""
    return list(model._flatten_layers())


def _frames(*functions: str) -> Iterator[FrameType]:
    """The calls on the stack, innermost first, of functions of these names."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in functions:
            yield frame
        frame = frame.f_back


# A loss and a layer never see the model they are in, but the model stands on the call stack.


def _frame_of_model(*methods: str) -> FrameType | None:
    """The innermost call on the stack of one of these methods of a model."""
    for frame in _frames(*methods):
        if isinstance(frame.f_locals.get("self"), keras.Model):
            return frame
    return None


def model_in_use() -> Any:
    """The model that is being built, trained or evaluated, or `None`."""
    frame = _frame_of_model("_symbolic_build", "train_step", "test_step")
    return None if frame is None else frame.f_locals["self"]


def in_training_step() -> bool:
    """Whether a model is being trained, and not evaluated or called otherwise."""
    frame = _frame_of_model("train_step", "test_step", "predict_step")
    return frame is not None and frame.f_code.co_name == "train_step"


def metric_names(model: keras.Model) -> set[str]:
    """The names in the logs of the losses and of the metrics given to `compile`."""
    compiled = getattr(model, "_compile_metrics", None)
    given = [
        getattr(compiled, "_user_metrics", None),
        getattr(compiled, "_user_weighted_metrics", None),
    ]
    metrics = [metric for metric in keras.tree.flatten(given) if metric is not None]
    outputs = getattr(model, "output_names", None) or []
    losses = [f"{name}_loss" for name in outputs] if len(outputs) > 1 else []
    return {"loss", *losses, *(m if isinstance(m, str) else get_object_name(m) for m in metrics)}


def in_metrics() -> bool:
    """Whether the caller is evaluated as a metric."""
    for frame in _frames("compute_metrics", "compute_loss"):
        return frame.f_code.co_name == "compute_metrics"
    return False


def weighted_metrics_in_use() -> Any:
    """The `weighted_metrics` of the model that is computing its loss, or `None`."""
    for frame in _frames("_compute_loss"):
        metrics = getattr(frame.f_locals["self"], "_compile_metrics", None)
        return getattr(metrics, "_user_weighted_metrics", None)
    return None


# The graph of a Functional model.


def keeps_constructor(model: Any, base: type) -> bool:
    """Whether a model of this class can be made as one of the base class is."""
    own = inspect.getfullargspec(type(model).__init__)
    known = inspect.getfullargspec(vars(base)["__init__"])
    return own.args == known.args or bool(own.varargs and own.varkw)


def origin(tensor: keras.KerasTensor) -> tuple[Any, list[keras.KerasTensor]]:
    """The layer or operation that a symbolic tensor comes from, and what that was called with."""
    operation, node, _ = vars(tensor)["_keras_history"]
    return operation, operation._inbound_nodes[node].input_tensors


def above(
    tensors: list[keras.KerasTensor],
) -> tuple[dict[int, keras.KerasTensor], list[keras.Layer]]:
    """What symbolic tensors are computed from: inputs, by `id`, and all layers at any depth."""
    inputs: dict[int, keras.KerasTensor] = {}
    layers: list[keras.Layer] = []
    seen: set[int] = set()
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        if id(tensor) not in seen:
            seen.add(id(tensor))
            operation, given = origin(tensor)
            pending += given
            if not given:
                inputs[id(tensor)] = tensor
            if isinstance(operation, keras.Layer):
                layers += flat_layers(operation)
    return inputs, layers


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The weights that a layer keeps itself, without those of its layers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]
