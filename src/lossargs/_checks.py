"""Checks of one evaluation of a loss: what its function reads, assigns and returns."""

from collections.abc import Collection, Mapping
from typing import Any

import keras
import numpy as np

from lossargs._errors import ArgumentError, BatchError, LossArgsError
from lossargs._inputs import shape_of
from lossargs._keras import ReadScope, Step
from lossargs._values import describe_lists


def check_reads(
    loss: Any, model: Any, scope: ReadScope, is_frozen: bool, cause: Exception | None = None
) -> None:
    """Raise if the function of a loss read a variable that the model does not hold."""
    name, code = loss.title, loss.loss_function.code_name
    held = {id(variable) for variable in (*model.variables, *model.metrics_variables)}
    frozen = [one for key, one in scope.variables.items() if is_frozen and key in held]
    if frozen:
        raise ArgumentError(
            f"{name} reads the weight {frozen[0].path!r} of the model, and this train_step "
            "evaluates the loss outside of the model's state: JAX would freeze the weight. Write "
            "self.stateless_compute_loss(...)."
        ) from cause
    for key, variable in scope.variables.items():
        if key not in held:
            raise ArgumentError(
                f"{name} reads the variable {variable.path!r} of shape {tuple(variable.shape)}, "
                "which the model does not hold, train or save. Pass it, or its layer or generator, "
                f"as an argument: def {code}(y_true, y_pred, *, layer): ..."
            ) from cause


def check_updates(loss: Any, step: Step | None, scope: ReadScope, lost: Collection[int]) -> None:
    """Raise if the function of a loss assigned a variable whose new value would be lost."""
    name = loss.loss_function.name
    for key, variable in scope.assigned.items():
        if key in lost:
            raise ArgumentError(
                f"{name} assigns the variable {variable.path!r} after stateless_call has returned, "
                "so the new value would be lost. Write model.stateless_compute_loss(...), which "
                "returns it."
            )
        if variable.trainable and step is not None:
            raise ArgumentError(
                f"{name} assigns the trainable weight {variable.path!r}, which the optimizer "
                "updates in the same step. Make it non-trainable: layer.trainable = False, or "
                "add_weight(..., trainable=False)."
            )


def check_result(loss: Any, values: Any) -> None:
    """Raise if the function of a loss returned a symbolic tensor or a function."""
    if isinstance(values, keras.KerasTensor):
        raise _symbolic_tensor_outside(loss)
    if callable(values) and not keras.ops.is_tensor(values):
        raise ArgumentError(
            f"{loss.title}(y_true, y_pred) returns a function, {values!r}, and not a tensor. Move "
            "the extra arguments into one function: def f(y_true, y_pred, delta=0.5): ..."
        )


def check_weights(loss: Any, values: Any, sample_weight: Any) -> None:
    """Raise if the values are one number for all samples, and the weights one for each."""
    weights, shape = shape_of(sample_weight), shape_of(values)
    is_one = all(size == 1 for size in shape)
    is_weighted = any(size not in (1, None) for size in weights) if shape else bool(weights)
    if is_one and is_weighted:
        raise BatchError(
            f"{loss.title} returned one number for the whole batch, and was given weights for its "
            "samples (sample_weight or class_weight). Return one number for each sample, e.g. "
            "keras.ops.mean(..., axis=-1)."
        )


def _symbolic_tensor_outside(loss: Any) -> ArgumentError:
    name = loss.loss_function.name
    return ArgumentError(
        f"{name} uses a symbolic tensor (KerasTensor) that is not an argument of the loss. Pass "
        f"it: def {name}(y_true, y_pred, tensor): ..., and attach(model, {name}(tensor))."
    )


def explain(error: Exception, loss: Any, given: Mapping[str, Any], batch: Collection[str]) -> None:
    """Add to an exception of the user's function the arguments that it was given.

    `batch` has the names of batch entries, whose first axis should be that of `y_pred`.
    """
    # Our errors already name the argument, and terms add their own note.
    if isinstance(error, LossArgsError) or loss.terms:
        return
    # The errors of backends and of Keras differ, but all of them name the class.
    if "KerasTensor" in str(error):
        raise _symbolic_tensor_outside(loss) from error
    samples, parts = shape_of(given["y_pred"])[:1], []
    for argument, value in given.items():
        part = f"{argument}: {type(value).__name__}"
        if keras.ops.is_tensor(value) or isinstance(value, np.ndarray):
            dtype = getattr(value.dtype, "name", str(value.dtype).removeprefix("torch."))
            part = f"{argument}: {dtype} {shape_of(value)}"
            size = shape_of(value)[:1]
            is_known = size and samples and None not in (*size, *samples)
            if argument in batch and is_known and size != samples:
                part += f" has batch size {size[0]}, y_pred has {samples[0]}"
        parts.append(part)
    note = f"While computing the loss {loss.title} with {'; '.join(parts)}."
    error.add_note(f"{note} {describe_lists(given)}".rstrip())
