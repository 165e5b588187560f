"""The arguments of the losses of a `LossArgs` layer: their adapters and logs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lossargs._adapters import LayerAdapter
from lossargs._balance import computed_weights
from lossargs._errors import AttachError, listed, taken
from lossargs._live import Adapter, adapter_of
from lossargs._logs import LiveArg, LogItem, Logs, check_names
from lossargs._loss import BoundLoss, check_is_bound
from lossargs._values import cache_key, is_live


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of losses, in one object: Keras would track its parts as attributes."""

    loss: BoundLoss  # the main loss
    track: tuple[BoundLoss, ...]
    losses: dict[BoundLoss, dict[str, Any]]  # with trees of the adapters of their arguments
    adapters: dict[Any, Adapter]  # by the keys of the values
    live: tuple[LiveArg, ...]
    # What is logged, with the items in the logs.
    scalars: tuple[tuple[Adapter, LogItem], ...]
    tracked: tuple[tuple[BoundLoss, LogItem], ...]  # terms also
    weights: tuple[tuple[BoundLoss, list[LogItem]], ...]  # that losses compute for their terms

    def readers(self) -> list[Adapter]:
        """Return the adapters that read a tensor."""
        return [one for one in dict.fromkeys(self.adapters.values()) if one.reads_tensor]

    def logs(self) -> Logs:
        """Return a metric that logs all items."""
        losses, scalars = ([item for _, item in kind] for kind in (self.tracked, self.scalars))
        return Logs(losses, scalars, [items for _, items in self.weights])

    def items(self) -> list[tuple[BoundLoss, LogItem]]:
        """Return the items of tracked losses and weights, with the loss of each."""
        return [*self.tracked, *((loss, one) for loss, items in self.weights for one in items)]

    def takes(self, name: str) -> bool:
        """Return whether a loss has an argument of that name."""
        weights = (one.label for one in self.live if one.adapter.reads_tensor)
        return name in weights or any(loss.takes(name) for loss in self.losses)

    def check_call(self, tensors: Sequence[Any], given: Mapping[str, Any]) -> None:
        """Raise unless a call of the layer gives each argument once.

        Args:
            tensors: The values for the adapters that read one, in order.
            given: The arguments given by name.

        Raises:
            AttachError: An argument is unknown, missing or given twice.
        """
        for name in given:
            if not self.takes(name):
                known = sorted({name for loss in self.losses for name in loss.parameters})
                raise AttachError(
                    f"LossArgs({self.loss!r}) was called with {name!r}, which none of its losses "
                    f"takes. {taken(name, known)} Write self.loss_args(y_pred, name=...)."
                )
        for one in self.live:
            if not one.adapter.reads_tensor and one.label in given:
                raise AttachError(
                    f"{one.label!r} of {one.loss!r} was given twice: bound, and in the call of "
                    "LossArgs. Write self.loss_args(y_pred) without it."
                )
        readers = self.readers()
        if tensors and len(tensors) != len(readers):
            raise AttachError(
                f"LossArgs({self.loss!r}) was called with {len(tensors)} tensors in a list, and "
                f"reads {len(readers)}. Give tensors by name, self.loss_args(y_pred, name=...)."
            )
        fed = {a for a, tensor in zip(readers, tensors, strict=False) if tensor is not None}
        unfed = [one for one in self.live if one.adapter.reads_tensor and one.adapter not in fed]
        names = [one.label for one in unfed if one.label not in given]
        if names:
            raise AttachError(
                f"{listed(names)} of {self.loss!r} has no tensor in this call of LossArgs. Write "
                "attach(y_pred, loss). Or, in a subclassed model, leave it unbound, and write "
                f"self.loss_args(y_pred, {names[0]}=...)."
            )


def collect(
    loss: BoundLoss, track: tuple[BoundLoss, ...], kept: Mapping[Any, Adapter]
) -> Arguments:
    """Return the arguments of a loss and of tracked losses, with those of their inner losses.

    Args:
        loss: The main loss.
        track: The tracked losses.
        kept: Adapters of a layer that is replaced, by the keys of their values.
    """
    for one in (loss, *track):
        check_is_bound(one)
    to_log = dict.fromkeys((*loss.all_terms(), *track))
    check_names(["loss", *(one.name for one in to_log)], "Terms and track=[...]")
    adapters: dict[Any, Adapter] = {}

    def adapter(leaf: Any) -> Any:
        if not is_live(leaf):
            return leaf
        key = cache_key(leaf)
        if key not in adapters:
            adapters[key] = kept[key].for_another_layer() if key in kept else adapter_of(leaf)
        return adapters[key]

    losses = {
        inner: inner.map_live_args(adapter)
        for one in (loss, *track)
        for inner in (one, *one.inner_losses)
    }
    scalars: dict[tuple[str, Adapter], LogItem] = {}
    live: list[LiveArg] = []
    weights = [
        (one, [LogItem(name) for name in names])
        for one in dict.fromkeys((loss, *loss.all_terms(), *track))
        if (names := computed_weights(one))
    ]
    for one in losses:
        for name, label, leaf in one.live_leaves():
            held = adapter(leaf)
            if held.shape == ():
                scalars.setdefault((label, held), LogItem(label))
            item = scalars.get((label, held))
            live.append(LiveArg(one, name, label, cache_key(leaf), held, item))
    for arg in live:
        if isinstance(arg.adapter, LayerAdapter):
            arg.adapter.check_is_alone(f"{arg.label!r} of {arg.loss!r}")
    return Arguments(
        loss=loss,
        track=track,
        losses=losses,
        adapters=adapters,
        live=tuple(live),
        scalars=tuple((held, item) for (_, held), item in scalars.items()),
        tracked=tuple((one, LogItem(one.name)) for one in to_log),
        weights=tuple(weights),
    )
