"""Values that travel from a layer of the model to the loss, on the tensor that both know.

The very tensor that the model's last layer returns is what Keras gives to the loss as `y_pred`.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

_ATTRIBUTE = "_lossargs"
_by_id: dict[int, dict[int, "Step"]] = {}  # of tensors that take no attribute


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of the model gives to one of its losses.

    Tensors of TensorFlow hide what they carry from Python's garbage collector: nothing here may
    hold the loss, the layer or the model.

    Attributes:
        values: Arguments of the loss by name.
        layer: What the loss tells about its evaluation, `layer().report(...)`; held weakly.
        logged: The live scalars of this step, for the layer.
    """

    values: Mapping[str, Any]
    layer: Callable[[], Any] | None = None
    logged: Sequence[Any] = ()


def carry(tensor: Any, steps: dict[int, Step]) -> Any:
    """Let a tensor carry what the losses need that will get it as `y_pred`, by its token.

    Returns:
        The tensor; or, where it takes no attribute, one that equals it.
    """
    steps = {**carried(tensor), **steps}
    try:
        setattr(tensor, _ATTRIBUTE, steps)
    except AttributeError:  # a tensor of a step that JAX traces
        # Another object, and no instruction of the program: the values may be computed from the
        # tensor, and held from here they would keep it, and themselves, for ever.
        tensor = keras.ops.copy(tensor)
        _by_id[id(tensor)] = steps
        weakref.finalize(tensor, _by_id.pop, id(tensor))
    return tensor


def carried(tensor: Any) -> dict[int, Step]:
    """What a tensor carries, by the token of the loss; empty for most."""
    steps: dict[int, Step] | None = getattr(tensor, _ATTRIBUTE, None)
    if steps is None:
        # Not without need: torch compiles code that takes an id anew for each tensor.
        steps = _by_id.get(id(tensor)) if _by_id else None
    return steps or {}
