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


@dataclasses.dataclass(eq=False)
class LogItem:
    """A number in the logs."""

    label: str  # in its layer
    name: str = ""  # in the logs of the model, which may have a prefix

    def __post_init__(self) -> None:
        self.name = self.label


class Logs(keras.Metric):
    """Log the mean of each loss over the samples, and the last value of each other item.

    All are NaN before the first step. One metric for all items makes few updates per step.

    Args:
        losses: The items of losses.
        scalars: The items of live scalars.
        vectors: For each balanced loss, the items of the weights of its terms.
    """

    def __init__(
        self,
        losses: Sequence[LogItem],
        scalars: Sequence[LogItem],
        vectors: Sequence[Sequence[LogItem]],
    ) -> None:
        super().__init__(name="lossargs")
        self.losses = tuple(losses)
        # Sums over the samples, and last the number of samples.
        self.sums = self.add_variable((len(losses) + 1,), initializer="zeros", name="sums")
        # A vector is one update, a single scalar needs no vector.
        self.values = tuple(map(tuple, [scalars, *vectors] if scalars else vectors))
        shapes: list[tuple[int, ...]] = [(len(items),) for items in self.values]
        if len(scalars) == 1:
            shapes[0] = ()
        # Processes of TensorFlow compare initial values, and NaN is not equal to itself.
        self.last = [
            self.add_variable(shape, "zeros", name="last", aggregation="only_first_replica")
            for shape in shapes
        ]
        self.reset_state()

    def update_state(
        self, losses: Sequence[Any], scalars: Sequence[Any], vectors: Sequence[Any], samples: Any
    ) -> None:
        """Add the losses of a step with this number of samples, and replace the other values.

        A loss is a scalar, or one number per sample.
        """
        if losses:
            means = [keras.ops.mean(one) if len(one.shape) else one for one in losses]
            one = keras.ops.ones((), self.dtype)
            added: Any = keras.ops.stop_gradient(keras.ops.stack([*means, one]))
            self.sums.assign_add(added * keras.ops.cast(samples, self.dtype))
        if scalars:
            vectors = [keras.ops.stack(scalars) if len(scalars) > 1 else scalars[0], *vectors]
        for variable, values in zip(self.last, vectors, strict=True):
            variable.assign(keras.ops.stop_gradient(values))

    def reset_state(self) -> None:
        self.sums.assign(np.zeros(self.sums.shape))
        for variable in self.last:
            variable.assign(np.full(variable.shape, np.nan))

    def result(self) -> dict[str, Any]:
        """Return the numbers by name."""
        results = {}
        if self.losses:
            sums = self.sums.value
            means: Any = keras.ops.where(sums[-1] > 0, sums / sums[-1], np.nan)
            results = {item.name: means[i] for i, item in enumerate(self.losses)}
        for variable, items in zip(self.last, self.values, strict=True):
            value = variable.value + 0  # PyTorch updates the variable in place
            results |= {
                item.name: value[i] if len(value.shape) else value for i, item in enumerate(items)
            }
        return results


@dataclasses.dataclass(frozen=True)
class LiveArg:
    """A live value among the arguments of a loss of a layer."""

    loss: BoundLoss
    name: str  # of the argument
    label: str  # of the argument, and the place of the value in it
    key: Any  # equal for arguments with one value
    adapter: Adapter
    item: LogItem | None  # in the logs, if it is a scalar

    @property
    def is_named(self) -> bool:
        """Whether the logs or `live_args` hold the value by its name."""
        return self.item is not None or self.adapter.variable is not None


def check_names(names: Sequence[str], where: str) -> None:
    """Raise if two different things would be logged under one name."""
    for name in names:
        if names.count(name) > 1:
            raise AttachError(
                f"{where}: {names.count(name)} different values have the name {name!r} in the "
                "logs. Name the losses: factory.options(name=...)(...)."
            )


def names_of(
    layers: Iterable[Any],
    others: Iterable[str] = ("loss",),
    outputs: Mapping[Any, str] | None = None,
    *,
    by_layer: bool = True,
) -> list[tuple[str, Any]]:
    """Return what the `LossArgs` layers of a model log, by the names in the logs.

    Names of a sum get the output as a prefix, if there are several outputs. Names of live values
    that clash get the name of the loss as a prefix. If these clash too, they get the name of the
    layer instead, e.g. for two attached models that are parts of one.

    Args:
        layers: The layers.
        others: Further names in the logs.
        outputs: The names of the outputs that some layers give, if there are several.
        by_layer: Whether names of layers may be used as prefixes.

    Returns:
        Pairs of a name and a `LiveArg` or the item of a loss or weight.

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
    items = [
        (in_output(layer, loss, item.label), item)
        for layer in layers
        for loss, item in layer.get_log_items()
    ]
    used = [*others, *(name for name, _ in distinct), *(name for name, _ in items)]
    check_names(used, "Live arguments")
    return [*named, *items]


def check_log_names(outputs: Mapping[Any, str]) -> None:
    """Raise if new layers, given with the names of their outputs, would log under equal names."""
    names_of(outputs, outputs=outputs, by_layer=False)


def settle_names(model: keras.Model) -> None:
    """Name the logs of the losses of a model, such that no two have one name."""
    for name, one in names_of(layers_of(model), metric_names(model), output_names_of(model)):
        item = one.item if isinstance(one, LiveArg) else one
        if item is not None:
            item.name = name


def output_names_of(model: Any) -> dict[Any, str]:
    """Return the names of the outputs that `LossArgs` layers give; empty if there is one output."""
    names = {
        producer(output)[0]: name
        for name, output in named_outputs(model)
        if isinstance(output, keras.KerasTensor)
    }
    return {layer: name for layer, name in names.items() if hasattr(layer, "get_losses")}
