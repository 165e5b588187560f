"""`LossArgs`: the layer that keeps live arguments and hands them to the loss in each step."""

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np

from lossargs._adapters import Adapter, adapter_of
from lossargs._bound import SAMPLE_WEIGHT, BoundLoss, serve
from lossargs._carried import Step, carry
from lossargs._errors import AttachError, SavingError, listed, nearest
from lossargs._keras import (
    AutocastScope,
    allow_any_arguments,
    flat_layers,
    in_symbolic_scope,
    in_training_step,
    metric_names,
    model_in_use,
    own_variables,
    training_in_use,
    unscale_loss_for_distribution,
    variables_can_be_assigned,
)
from lossargs._values import Slot, checked, identity, is_live, load_object, reading, rebuilt

# Stands for NaN, which processes that compare what they start with would find different.
_UNREPORTED = float(np.finfo("float32").min)


class LiveValue(keras.Metric):
    """A live argument in the logs: its value in the last step; NaN if none was reported."""

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
        # On torch also a copy: the value itself would change later.
        last = self.last.value
        return keras.ops.where(last == _UNREPORTED, np.nan, last)


class TrackedLoss(keras.metrics.Mean):
    """A tracked loss in the logs: its mean over the samples; NaN if none was reported."""

    def result(self) -> Any:
        return keras.ops.where(self.count > 0, super().result(), np.nan)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A live argument of one of the losses of a layer.

    Attributes:
        loss: The loss.
        name: The argument.
        label: The argument, and where the value stands in it.
        adapter: What keeps the value.
        metric: What logs it, if it is a scalar.
    """

    loss: BoundLoss
    name: str
    label: str
    adapter: Adapter
    metric: LiveValue | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What Keras should not track, nor wrap, as attributes of the layer."""

    losses: tuple[tuple[BoundLoss, dict[str, Any]], ...]  # with arguments of slots
    logged: tuple[tuple[LiveValue, int], ...]  # with the place of the adapter
    tracked: tuple[tuple[BoundLoss, keras.Metric], ...]
    entries: tuple[Entry, ...]


@keras.saving.register_keras_serializable(package="lossargs")
class LossArgs(keras.Layer):
    """Keeps the live arguments of a loss, and hands them to it with the predictions.

    `attach` puts this layer into a Functional or Sequential model. In a subclassed model, call it
    in `call`, on the output that goes to the loss, and return what it gives, as it is:

        def call(self, x):
            z_mean, z_log_var = self.encoder(x)
            ...
            return self.loss_args(x_hat, z_mean=z_mean, z_log_var=z_log_var)

    Args:
        loss: The loss, made by a factory of `with_args`, and given to `compile` as well.
        track: Further bound losses, evaluated in the same step and logged under their names.
        **kwargs: Those of `keras.layers.Layer`: `name`, for example.

    Raises:
        AttachError: One of the losses is none that a factory made, or two of them have one name.

    Examples:
        >>> import keras
        >>> from lossargs import LossArgs, with_args
        >>> @with_args
        ... def sparse_error(y_true, y_pred, *, code, weight):
        ...     error = keras.losses.mean_squared_error(y_true, y_pred)
        ...     return error + weight * keras.ops.mean(keras.ops.abs(code), axis=-1)
        >>> class AutoEncoder(keras.Model):
        ...     def __init__(self, loss):
        ...         super().__init__()
        ...         self.encoder, self.decoder = keras.layers.Dense(2), keras.layers.Dense(3)
        ...         self.loss_args = LossArgs(loss)
        ...
        ...     def call(self, x):
        ...         code = self.encoder(x)
        ...         return self.loss_args(self.decoder(code), code=code)
        >>> weight = keras.Variable(0.1, trainable=False, name="weight")
        >>> loss = sparse_error(weight=weight)
        >>> model = AutoEncoder(loss)
        >>> model.compile("adam", loss=loss)
    """

    def __init__(self, loss: BoundLoss, *, track: Iterable[BoundLoss] = (), **kwargs: Any) -> None:
        kept: Mapping[str, Adapter] = kwargs.pop("kept", {})  # of a saved layer
        # No mixed policy, and nothing is cast: what goes through this layer stays as it is.
        super().__init__(**{**kwargs, "dtype": keras.config.floatx(), "autocast": False})
        self.supports_masking = True
        allow_any_arguments(self)
        self.built = True
        track = tuple(track)
        for one in (loss, *track):
            check_is_bound(one)
        check_names(["loss", *(one.name for one in track)], "track=[...]")
        losses = dict.fromkeys(
            inner for one in (loss, *track) for inner in (one, *one.inner_losses)
        )
        adapters: dict[Any, Adapter] = {}
        for one in losses:
            for _, _, leaf in one.live_leaves():
                live = identity(leaf)
                if live not in adapters:
                    saved = one.saved_leaf(leaf)
                    adapters[live] = kept[saved.id] if saved.id in kept else adapter_of(leaf)
        self.adapters = list(dict.fromkeys(adapters.values()))
        place = {adapter: index for index, adapter in enumerate(self.adapters)}

        def slot(leaf: Any) -> Any:
            return Slot(place[adapters[identity(leaf)]]) if is_live(leaf) else leaf

        entries = []
        metrics: dict[tuple[str, Adapter], LiveValue] = {}
        for one in losses:
            for name, label, leaf in one.live_leaves():
                adapter = adapters[identity(leaf)]
                if adapter.shape == () and (label, adapter) not in metrics:
                    metrics[label, adapter] = LiveValue(label)
                entries.append(Entry(one, name, label, adapter, metrics.get((label, adapter))))
        self._plan = _Plan(
            losses=tuple((one, one.live_args(slot)) for one in losses),
            logged=tuple((metric, place[adapter]) for (_, adapter), metric in metrics.items()),
            tracked=tuple((one, TrackedLoss(name=one.name)) for one in track),
            entries=tuple(entries),
        )
        self._borrowed: dict[str, str] = {}
        self._reference = weakref.ref(self)
        self.loss = loss
        # For Keras to find them.
        self.logged = [*metrics.values(), *(metric for _, metric in self._plan.tracked)]

    @property
    def entries(self) -> Sequence[Entry]:
        """The live arguments of all the losses."""
        return self._plan.entries

    @property
    def bound_losses(self) -> list[BoundLoss]:
        """All the losses that get values from this layer."""
        return [loss for loss, _ in self._plan.losses]

    @property
    def track(self) -> tuple[BoundLoss, ...]:
        """The losses that are evaluated for the logs only."""
        return tuple(loss for loss, _ in self._plan.tracked)

    # No property: Keras looks for weights in all of these, and would not find an adapter here.
    def adapters_by_id(self) -> dict[str, Adapter]:
        """The adapters by what stands for their values in saved losses."""
        return {
            loss.saved_leaf(leaf).id: entry.adapter
            for loss in self.bound_losses
            for _, label, leaf in loss.live_leaves()
            for entry in self.entries
            if entry.loss is loss and entry.label == label
        }

    @property
    def tensors(self) -> list[Any]:
        """The symbolic tensors that the adapters read; `None` where there is none."""
        return [adapter.tensor for adapter in self.adapters if adapter.reads_tensor]

    def __call__(
        self,
        y_pred: Any,
        tensors: Sequence[Any] = (),
        given: Mapping[str, Any] | None = None,
        /,
        *,
        training: bool | None = None,
        **named: Any,
    ) -> Any:
        """The predictions, as they are, carrying what the loss needs.

        Args:
            y_pred: The predictions, one tensor.
            tensors: For `attach`: the values of the symbolic tensors among the arguments.
            given: For a saved graph: `named` in one dict.
            training: Whether this is a step of training; schedules move on then. By default what
                the model is called with.
            **named: Further arguments of the losses, tensors by name.

        Returns:
            `y_pred`.

        Raises:
            AttachError: A name that no loss takes, a symbolic tensor without a value, or more than
                one tensor of predictions.
        """
        if not isinstance(y_pred, keras.KerasTensor) and not keras.ops.is_tensor(y_pred):
            raise AttachError(
                f"LossArgs({self.loss!r}) was called with a {type(y_pred).__name__}, and takes the "
                "one tensor that goes to its loss. For several outputs make one layer for each."
            )
        # In one dict: by itself, `mask` would be a mask to Keras.
        given = {**(given or {}), **named}
        if keras.backend.backend() == "torch" and not isinstance(y_pred, keras.KerasTensor):
            # All else that Keras does around a call does not concern this layer, and on PyTorch it
            # is done in each step, where it takes longer than a small layer computes.
            training = training_in_use() if training is None else training
            with AutocastScope(None):
                return self.call(y_pred, tensors, given, training)
        arguments = (
            (y_pred, tensors, given) if given else (y_pred, tensors) if tensors else (y_pred,)
        )
        options = {} if training is None else {"training": training}
        return super().__call__(*arguments, **options)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Under `keras.RematScope` as without: what is carried must not be computed anew."""
        return layer_call

    def call(
        self,
        y_pred: Any,
        tensors: Sequence[Any] = (),
        given: Mapping[str, Any] | None = None,
        training: bool | None = None,
    ) -> Any:
        """As `__call__`, with all arguments by name in `given`."""
        given = given or {}
        if training is None:  # not every model passes it on
            training = in_training_step()
        self._look_at_model(given)
        self._check(tensors, given)
        inputs = iter(tensors)
        by_name = {entry.label: entry.adapter for entry in self.entries}
        sources = {by_name[name]: value for name, value in given.items() if name in by_name}
        values = []
        for adapter in self.adapters:
            tensor = next(inputs, None) if adapter.reads_tensor else None
            values.append(adapter.value(sources.get(adapter, tensor), bool(training)))

        def filled(leaf: Any) -> Any:
            return values[leaf.index] if isinstance(leaf, Slot) else leaf

        logged = [values[index] for _, index in self._plan.logged]
        steps = {}
        for loss, slots in self._plan.losses:
            args = {name: rebuilt(value, filled) for name, value in slots.items()}
            args |= {n: v for n, v in given.items() if n not in by_name and loss.takes(n)}
            is_main = loss is self.loss
            steps[loss.token] = Step(args, self._reference, logged) if is_main else Step(args)
        return carry(y_pred, steps)

    def compute_output_spec(
        self,
        y_pred: Any,
        tensors: Sequence[Any] = (),
        given: Mapping[str, Any] | None = None,
        training: bool | None = None,
    ) -> Any:
        """Shape and dtype of the predictions."""
        del training
        self._look_at_model(given or {})
        self._check(tensors, given or {})
        return keras.KerasTensor(y_pred.shape, y_pred.dtype, sparse=y_pred.sparse)

    def _check(self, tensors: Sequence[Any], given: Mapping[str, Any]) -> None:
        for name in given:
            if not any(loss.takes(name) for loss in self.bound_losses):
                raise AttachError(
                    f"LossArgs({self.loss!r}) was called with {name!r}, which none of its losses "
                    f"takes.{nearest(name, self._known_names())}"
                )
        for entry in self.entries:
            if not entry.adapter.reads_tensor and entry.name in given:
                raise AttachError(
                    f"{entry.label!r} of {entry.loss!r} was given twice: bound, and in the call of "
                    "LossArgs. Leave it out of one of them."
                )
        readers = [adapter for adapter in self.adapters if adapter.reads_tensor]
        if tensors and len(tensors) != len(readers):
            raise AttachError(
                f"LossArgs({self.loss!r}) was called with {len(tensors)} tensors in a list, and "
                f"reads {len(readers)}. Give tensors by name, self.loss_args(y_pred, name=...)."
            )
        fed = {a for a, tensor in zip(readers, tensors, strict=False) if tensor is not None}
        unfed = [e for e in self.entries if e.adapter.reads_tensor and e.adapter not in fed]
        names = [entry.name for entry in unfed if entry.name not in given]
        if names:
            raise AttachError(
                f"{listed(names)} of {self.loss!r} is a symbolic tensor, or reads one, and this "
                "call of LossArgs gives none. Let attach(y_pred, loss) connect it; in a subclassed "
                f"model leave it unbound and give it in the call: "
                f"self.loss_args(y_pred, {names[0]}=...)."
            )

    def _known_names(self) -> set[str]:
        return {name for loss in self.bound_losses for name in loss.parameters}

    def report(self, logged: Sequence[Any], y_true: Any, y_pred: Any, sample_weight: Any) -> None:
        """Log the live scalars and the tracked losses of a step; called by the loss."""
        if not variables_can_be_assigned():
            return
        for (metric, _), value in zip(self._plan.logged, logged, strict=True):
            metric.update_state(value)
        for loss, metric in self._plan.tracked:
            batch = sample_weight
            if isinstance(batch, Mapping):
                batch = {k: v for k, v in batch.items() if k == SAMPLE_WEIGHT or loss.takes(k)}
            value = unscale_loss_for_distribution(loss.evaluated(y_true, y_pred, batch, {}))
            shape: Any = keras.ops.shape(y_pred)  # weighted by batch size, as Keras does its own
            metric.update_state(keras.ops.stop_gradient(value), sample_weight=shape[0])

    def _look_at_model(self, given: Mapping[str, Any]) -> None:
        """Name the live values in the logs, once the model is known that they are logged by."""
        if in_symbolic_scope() or keras.backend.backend() == "tensorflow":
            serve(loss for loss in self.bound_losses if any(map(loss.takes, given)))
            model = model_in_use()
            if model is not None:
                settle_names(layers_of(model), metric_names(model))
                self.note_weights_of(flat_layers(model))
                self._check_compiled(model)

    def _check_compiled(self, model: keras.Model) -> None:
        given = keras.tree.flatten(getattr(model, "loss", None))
        compiled = [loss for loss in given if loss is not None]
        if compiled and self.loss not in compiled:
            raise AttachError(
                f"{model.name!r} is attached to {self.loss!r}, and was compiled with "
                f"{', '.join(map(repr, compiled))}. Bind once, and give that one loss to attach "
                "and to compile; of a model that was loaded or cloned, it is the `loss` of its "
                "LossArgs layer. For another loss take model = detach(model)."
            )

    def note_weights_of(self, layers: Iterable[keras.Layer]) -> None:
        """Remember which of the variables are weights of other layers of the model."""
        owners = {
            id(variable): layer.name
            for layer in layers
            if not isinstance(layer, Adapter)
            for variable in own_variables(layer)
        }
        borrowed = {e.label: owners.get(id(e.adapter.variable)) for e in self.entries}
        self._borrowed = {label: layer for label, layer in borrowed.items() if layer is not None}

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs to make this layer again.

        Raises:
            SavingError: A variable is a weight of another layer.
        """
        for label, layer in self._borrowed.items():
            raise SavingError(
                f"{label!r} of {self.loss!r} is a weight of the layer {layer!r}, and would be "
                "loaded as a variable of its own, which is not trained with that layer. Save "
                "weights only, model.save_weights(path), or detach(model)."
            )
        config = super().get_config()
        del config["dtype"]
        # As objects: Keras sees then which of them several layers share.
        return {
            **config,
            "loss": self.loss,
            "track": list(self.track),
            "adapters": list(self.adapters),
            "live": {live: self.adapters.index(a) for live, a in self.adapters_by_id().items()},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        with reading("The config of a LossArgs layer"):
            losses = [checked(config, "loss", dict, BoundLoss), *checked(config, "track", list)]
            loss, *track = (load_object(one, BoundLoss) for one in losses)
            adapters = [load_object(a, Adapter) for a in checked(config, "adapters", list)]
            kept = {}
            for live, index in checked(config, "live", dict).items():
                if type(index) is not int or not 0 <= index < len(adapters):
                    raise ValueError(f"{index!r} is the place of no adapter")
                kept[live] = adapters[index]
            for one in (loss, *track):
                for bound in (one, *one.inner_losses):
                    for _, label, leaf in bound.live_leaves():
                        if bound.saved_leaf(leaf).id not in kept:
                            raise ValueError(f"no adapter keeps {label!r} of {bound!r}")
            known = ("loss", "track", "adapters", "live")
            options = {name: value for name, value in config.items() if name not in known}
            if "kept" in options:
                raise ValueError("'kept' is none of its entries")
            return cls(loss, track=track, kept=kept, **options)


def check_is_bound(loss: Any) -> None:
    """Raise unless a factory made the loss."""
    if not isinstance(loss, BoundLoss):
        raise AttachError(
            f"{loss!r} is not a loss with arguments. Make one: with_args(function)(...), for "
            "example with_args(keras.losses.mean_squared_error)()."
        )


def check_names(names: Sequence[str], where: str) -> None:
    """Raise if two things would be logged under one name."""
    for name in names:
        if names.count(name) > 1:
            raise AttachError(
                f"{where}: {name!r} would stand for {names.count(name)} different things in the "
                "logs. Give the losses names of their own: factory.options(name=...)(...)."
            )


def layers_of(model: keras.Layer) -> list[LossArgs]:
    """The `LossArgs` layers of a model."""
    return [layer for layer in flat_layers(model) if isinstance(layer, LossArgs)]


def names_of(
    layers: Iterable[LossArgs], others: Iterable[str] = ("loss",)
) -> list[tuple[str, Entry]]:
    """The live arguments of several layers with their names in the logs.

    A name that stands for different values gets the name of its loss in front.

    Args:
        layers: The layers of one model.
        others: Names that something else has in the logs.

    Raises:
        AttachError: Two would still have one name.
    """
    entries = [entry for layer in layers for entry in layer.entries]
    adapters: dict[str, set[Adapter]] = {}
    for entry in entries:
        adapters.setdefault(entry.label, set()).add(entry.adapter)
    named = [
        (e.label if len(adapters[e.label]) == 1 else f"{e.loss.name}_{e.label}", e) for e in entries
    ]
    distinct = dict.fromkeys((name, entry.adapter) for name, entry in named)
    tracked = [loss.name for layer in layers for loss in layer.track]
    check_names([*others, *(name for name, _ in distinct), *tracked], "Live arguments")
    return named


def settle_names(layers: Iterable[LossArgs], others: Iterable[str]) -> None:
    """Let the live arguments of several layers of one model be logged under different names."""
    for name, entry in names_of(layers, others):
        if entry.metric is not None:
            entry.metric.name = name
