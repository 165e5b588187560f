"""Values that travel from a layer of the model to the loss, on the tensor that both know.

The very tensor that the model's last layer returns is what Keras gives to the loss as `y_pred`.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from lossargs._values import rebuilt

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


def carry(tensor: Any, steps: dict[Any, Step]) -> None:
    """Let a tensor carry what the losses need that will get it as `y_pred`, by loss."""
    steps = {**carried(tensor), **steps}
    try:
        setattr(tensor, _ATTRIBUTE, steps)
    except AttributeError:  # tensors of JAX
        key = id(tensor)
        if key not in _by_id:
            weakref.finalize(tensor, _by_id.pop, key)
        _by_id[key] = {loss: _without_cycles(step, key) for loss, step in steps.items()}


def carried(tensor: Any) -> dict[Any, Step]:
    """What a tensor carries, by loss; empty for most."""
    steps: dict[Any, Step] | None = getattr(tensor, _ATTRIBUTE, None)
    return _by_id.get(id(tensor), {}) if steps is None else steps


def move(source: Any, target: Any) -> None:
    """Let another tensor carry the same, if it does not do so yet."""
    steps = carried(source)
    if steps and target is not source and not carried(target):
        carry(target, steps)


@dataclasses.dataclass(frozen=True)
class _Weakly:
    """Stands for a tensor that carries something itself.

    It is an output of the model, which holds it while losses are computed. Held from here as well,
    it would never be let go.
    """

    reference: Callable[[], Any]


def _without_cycles(step: Step, key: int) -> Step:
    def hold(value: Any) -> Any:
        carries = id(value) == key or id(value) in _by_id
        return _Weakly(weakref.ref(value)) if carries else value

    values = {name: rebuilt(value, hold) for name, value in step.values.items()}
    return dataclasses.replace(step, values=values)


def value_of(step: Step, name: str) -> Any:
    """The value of one argument."""
    return rebuilt(
        step.values[name],
        lambda value: value.reference() if isinstance(value, _Weakly) else value,
    )
