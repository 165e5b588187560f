"""All that lossargs needs from Keras and that has no public form.

If a Keras release moves one of these names, this is the file to mend, and the only one.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import keras

# What a layer gives for symbolic tensors, found out by calling it.
from keras.src.backend import compute_output_spec
from keras.src.backend.common.global_state import get_global_attribute

# A mask travels on the tensor that it is for.
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import in_stateless_scope

# Before the first step Keras builds the loss with stand-ins, which did not come from the model.
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

# The scope in which variables are read in the precision of a layer, or, with `None`, in their own.
from keras.src.backend.common.variables import AutocastScope

# How Keras makes one number of the losses of the samples; what the replicas of `tf.distribute` are
# given is scaled by their number, and logs are not.
from keras.src.losses.loss import reduce_weighted_values, unscale_loss_for_distribution

# What Keras makes of a plain function given to `compile(loss=...)`: rank squeezing, masks, weights
# and reductions. Evaluating through it is what makes a bound loss equal to such a function.
from keras.src.losses.losses import LossFunctionWrapper as FunctionLoss

# What `keras.Model(inputs, outputs)` makes.
from keras.src.models.functional import Functional

# How Keras names a function in the logs.
from keras.src.utils.naming import get_object_name

__all__ = [
    "AutocastScope",
    "FunctionLoss",
    "Functional",
    "LayerOfOthers",
    "Sandbox",
    "above",
    "allow_any_arguments",
    "calls_above",
    "compute_output_spec",
    "flat_layers",
    "get_keras_mask",
    "get_object_name",
    "give_variables_back",
    "in_metrics",
    "in_sharing_scope",
    "in_symbolic_scope",
    "in_training_step",
    "is_autocast",
    "keeps_constructor",
    "metric_names",
    "model_in_use",
    "origin",
    "own_variables",
    "reduce_weighted_values",
    "set_keras_mask",
    "torch_processes",
    "training_in_use",
    "unscale_loss_for_distribution",
    "variables_can_be_assigned",
    "weighted_metrics_in_use",
]


def variables_can_be_assigned() -> bool:
    """Whether a variable assigned here keeps its value, and is not left holding a traced one."""
    return keras.backend.backend() != "jax" or bool(in_stateless_scope())


class Sandbox(keras.StatelessScope):
    """A scope whose updates are dropped, and that reads variables as the scope around it."""

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value of a variable that is read."""
        value = super().get_current_value(variable)
        around = self.original_scope
        return around.get_current_value(variable) if value is None and around else value


class LayerOfOthers(keras.Layer):
    """A layer that calls other layers of its model again."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._convert_input_args = False  # each layer that it calls does that

    def _clear_losses(self) -> None:
        """Keep the losses, which Keras drops before a call: they belong to other calls."""


def allow_any_arguments(layer: keras.Layer) -> None:
    """Let a layer be called with what is no tensor, a list of them say, without Keras's refusal."""
    layer._allow_non_tensor_positional_args = True


def is_autocast(variable: keras.Variable) -> bool:
    """Whether a variable is read in the precision of the layer that reads it."""
    return bool(variable._autocast)


def in_sharing_scope() -> bool:
    """Whether objects are written to a config by which one object, met twice, loads as one."""
    return get_global_attribute("shared_objects/id_to_config_map") is not None


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


def training_in_use() -> bool | None:
    """The `training` argument of the layer or model that is being called, if it has one."""
    return getattr(get_global_attribute("current_call_ctx"), "training", None)


def in_training_step() -> bool:
    """Whether a model is being trained, and not evaluated or called otherwise."""
    frame = _frame_of_model("train_step", "test_step", "predict_step")
    return frame is not None and frame.f_code.co_name == "train_step"


def give_variables_back() -> None:
    """Return the variables that Keras takes from a model on JAX while it runs an epoch.

    Keras itself returns them at the end; an exception in the first step would lose them.
    """
    frame = _frame_of_model("fit", "evaluate")
    if frame is None or frame.f_globals.get("__name__") != "keras.src.backend.jax.trainer":
        return
    model = frame.f_locals["self"]
    trained = [model.optimizer.variables] if frame.f_code.co_name == "fit" else []
    taken = [
        model.trainable_variables,
        model.non_trainable_variables,
        *trained,
        model.metrics_variables,
    ]
    for variables, values in zip(taken, frame.f_locals.get("state", ()), strict=False):
        for variable, value in zip(variables, values, strict=False):
            if variable._value is None:
                variable._value = value


def torch_processes() -> int:
    """How many processes of `torch.distributed` train together; Keras's `fit` knows of none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())


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


def calls_above(tensors: Iterable[keras.KerasTensor], until: Iterable[Any] = ()) -> list[Any]:
    """The calls that symbolic tensors come from, in the order to make them again.

    Args:
        tensors: The symbolic tensors.
        until: Symbolic tensors to stop at.

    Returns:
        Nodes of Keras's graph, with `operation`, `arguments`, `input_tensors`, and `outputs`.
    """
    known = {id(tensor) for tensor in until}
    calls = []
    pending = [(tensor, False) for tensor in tensors]
    while pending:
        tensor, after_its_inputs = pending.pop()
        operation, index, _ = vars(tensor)["_keras_history"]
        call = operation._inbound_nodes[index]
        if after_its_inputs:
            calls.append(call)
        elif id(tensor) not in known and id(call) not in known:
            known.add(id(call))
            pending += [(tensor, True), *((given, False) for given in call.input_tensors)]
    return calls


def above(
    tensors: list[keras.KerasTensor],
) -> tuple[dict[int, keras.KerasTensor], list[keras.Layer]]:
    """What symbolic tensors are computed from: inputs, by `id`, and all layers at any depth."""
    calls = calls_above(tensors)
    inputs = {id(call.outputs[0]): call.outputs[0] for call in calls if not call.input_tensors}
    operations = [call.operation for call in calls]
    layers = [flat_layers(one) for one in operations if isinstance(one, keras.Layer)]
    return inputs, [layer for some in layers for layer in some]


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The weights that a layer keeps itself, without those of its layers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]
