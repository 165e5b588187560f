"""The logs of losses: live values, tracked losses, and their names."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from lossargs._errors import AttachError
from lossargs._keras import metric_names, named_outputs, producer
from lossargs._live import Adapter, layers_of
from lossargs._loss import BoundLoss


class LiveValue(keras.Metric):
    """Logs the value of a live argument in the last step; NaN before the first."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name)
        # Processes of TensorFlow compare initial values, and NaN is not equal to itself.
        self.last = self.add_variable(
            shape=(), initializer="zeros", name="last", aggregation="only_first_replica"
        )
        self.reset_state()

    def update_state(self, value: Any) -> None:
        self.last.assign(keras.ops.stop_gradient(value))

    def reset_state(self) -> None:
        self.last.assign(np.nan)

    def result(self) -> Any:
        return self.last.value + 0  # on PyTorch, the value itself would change later


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
    key: Any  # equal for arguments with one value
    adapter: Adapter
    metric: LiveValue | None  # logs the value, if it is a scalar

    @property
    def is_named(self) -> bool:
        """Whether the logs or `live_args` hold the value by its name."""
        return self.metric is not None or self.adapter.variable is not None


def check_names(names: Sequence[str], where: str) -> None:
    """Raise if two different things would be logged under one name."""
    for name in names:
        if names.count(name) > 1:
            raise AttachError(
                f"{where}: {name!r} would name {names.count(name)} different things in the logs. "
                "Name the losses: factory.options(name=...)(...)."
            )


def names_of(
    layers: Iterable[Any],
    others: Iterable[str] = ("loss",),
    outputs: Mapping[Any, str] | None = None,
    *,
    by_layer: bool = True,
) -> list[tuple[str, Any]]:
    """Return what the `LossArgs` layers of a model log, by the names in the logs.

    Names of a sum are prefixed with the output, where there are several. A name of several values
    is prefixed with the name of the loss. If that is not enough, as in two attached models that are
    parts of one, the name of the layer is the prefix.

    Args:
        layers: The layers.
        others: Further names in the logs.
        outputs: The names of the outputs that some layers give, if there are several.
        by_layer: Whether names of layers are prefixed.

    Returns:
        Pairs of a name and a `LiveArg` or the metric of a loss.

    Raises:
        AttachError: Two would have one name.
    """
    layers, others = list(layers), list(others)

    def in_output(layer: Any, loss: BoundLoss, name: str) -> str:
        is_of_sum = layer.loss.terms and (loss is layer.loss or loss in layer.loss.all_terms())
        output = (outputs or {}).get(layer)
        return f"{output}_{name}" if output and is_of_sum else name

    live = [(layer, one) for layer in layers for one in layer.get_live() if one.is_named]
    labels = {id(one): in_output(layer, one.loss, one.label) for layer, one in live}
    names = dict(labels)
    for prefix in ("loss", "layer") if by_layer else ("loss",):
        values: dict[str, set[Any]] = {name: {None} for name in others}
        for _, one in live:
            values.setdefault(names[id(one)], set()).add(one.key)
        for layer, one in live:
            if len(values[names[id(one)]]) > 1:
                name = one.loss.name if prefix == "loss" else layer.name
                names[id(one)] = f"{name}_{labels[id(one)]}"
    named = [(names[id(one)], one) for _, one in live]
    distinct = dict.fromkeys((name, one.key) for name, one in named)
    metrics = [
        (in_output(layer, loss, label), metric)
        for layer in layers
        for loss, metric, label in layer.get_metrics()
    ]
    used = [*others, *(name for name, _ in distinct), *(name for name, _ in metrics)]
    check_names(used, "Live arguments")
    return [*named, *metrics]


def settle_names(model: keras.Model) -> None:
    """Name the logs of the losses of a model, such that no two have one name."""
    for name, one in names_of(layers_of(model), metric_names(model), output_names_of(model)):
        metric = one.metric if isinstance(one, LiveArg) else one
        if metric is not None:
            metric.name = name


def output_names_of(model: Any) -> dict[Any, str]:
    """Return the names of the outputs that `LossArgs` layers give; empty if there is one output."""
    names = {
        producer(output)[0]: name
        for name, output in named_outputs(model)
        if isinstance(output, keras.KerasTensor)
    }
    return {layer: name for layer, name in names.items() if hasattr(layer, "get_losses")}
