"""What a model logs of its losses: live values and tracked losses, and their names."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np

from lossargs._errors import AttachError
from lossargs._live import Adapter
from lossargs._loss import BoundLoss

# Represents NaN, which processes that compare their initial values would find different.
_UNREPORTED = float(np.finfo("float32").min)


class LiveValue(keras.Metric):
    """Logs the value of a live argument in the last step; NaN before the first."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        self.last = self.add_variable(
            shape=(),
            initializer=keras.initializers.Constant(_UNREPORTED),
            name="last",
            aggregation="only_first_replica",
        )

    def update_state(self, value: Any) -> None:
        self.last.assign(keras.ops.cast(keras.ops.stop_gradient(value), self.last.dtype))

    def reset_state(self) -> None:
        self.last.assign(_UNREPORTED)

    def result(self) -> Any:
        # On PyTorch also a copy: the value itself would change later.
        last = self.last.value
        return keras.ops.where(last == _UNREPORTED, np.nan, last)


class TrackedLoss(keras.metrics.Mean):
    """Logs the mean of a loss over the samples; NaN before the first step."""

    def result(self) -> Any:
        return keras.ops.where(self.count > 0, super().result(), np.nan)


@dataclasses.dataclass(frozen=True)
class LiveArg:
    """A live value among the arguments of a loss of a layer."""

    loss: BoundLoss
    name: str  # of the argument
    label: str  # of the argument, and the place of the value in it
    adapter: Adapter
    metric: LiveValue | None  # logs the value, if it is a scalar


def check_names(names: Sequence[str], where: str) -> None:
    """Raise if two different things would be logged under one name."""
    for name in names:
        if names.count(name) > 1:
            raise AttachError(
                f"{where}: {name!r} would name {names.count(name)} different things in the logs. "
                "Name the losses: factory.options(name=...)(...)."
            )


def names_of(
    layers: Iterable[Any], others: Iterable[str] = ("loss",), *, by_layer: bool = True
) -> list[tuple[str, LiveArg]]:
    """Return the live arguments of the `LossArgs` layers of a model with their names in the logs.

    A name of several values is prefixed with the name of the loss. If that is not enough, as in
    two attached models that are parts of one, it is prefixed with the name of the layer.

    Args:
        layers: The layers.
        others: Further names in the logs.
        by_layer: Whether names of layers are prefixed.

    Raises:
        AttachError: Two would still have one name.
    """
    layers = list(layers)
    live = [(layer, one) for layer in layers for one in layer.get_live()]
    names = {id(one): one.label for _, one in live}
    others = list(others)
    for prefix in ("loss", "layer") if by_layer else ("loss",):
        values: dict[str, set[Any]] = {name: {None} for name in others}
        for _, one in live:
            values.setdefault(names[id(one)], set()).add(one.adapter)
        for layer, one in live:
            if len(values[names[id(one)]]) > 1:
                name = one.loss.name if prefix == "loss" else layer.name
                names[id(one)] = f"{name}_{one.label}"
    named = [(names[id(one)], one) for _, one in live]
    distinct = dict.fromkeys((name, one.adapter) for name, one in named)
    tracked = [loss.name for layer in layers for loss in layer.track]
    check_names([*others, *(name for name, _ in distinct), *tracked], "Live arguments")
    return named


def settle_names(layers: Iterable[Any], others: Iterable[str]) -> None:
    """Name the logs of the live arguments of a model, such that no two have one name."""
    for name, one in names_of(layers, others):
        if one.metric is not None:
            one.metric.name = name
