"""Values that travel from a layer of the model to the loss, on the tensor that both know.

The very tensor that the model's last layer returns is what Keras gives to the loss as `y_pred`.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import keras

_ATTRIBUTE = "_lossargs"
_by_id: dict[int, dict[Any, "Step"]] = {}  # of tensors that take no attribute


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of the model gives to one of its losses.

    Attributes:
        values: Arguments of the loss by name.
        report: Called with `(y_true, y_pred, sample_weight)` when the loss was evaluated.
    """

    values: Mapping[str, Any]
    report: Callable[[Any, Any, Any], None] | None = None


def carry(tensor: Any, steps: dict[Any, Step]) -> Any:
    """Let a tensor carry what the losses need that will get it as `y_pred`, by loss.

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


def carried(tensor: Any) -> dict[Any, Step]:
    """What a tensor carries, by loss; empty for most."""
    steps: dict[Any, Step] | None = getattr(tensor, _ATTRIBUTE, None)
    return _by_id.get(id(tensor), {}) if steps is None else steps
