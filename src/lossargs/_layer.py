"""`LossArgs`: the layer that keeps live arguments and hands them to the loss in each step."""

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np

from lossargs._errors import AttachError, LossArgsError, SavingError, listed, nearest
from lossargs._keras import (
    AutocastScope,
    Functional,
    ReadScope,
    Sandbox,
    Step,
    allow_any_arguments,
    called_for_training,
    flat_layers,
    follow_in_epochs,
    give_variables_back,
    in_legacy_saving,
    in_sharing_scope,
    in_symbolic_scope,
    metric_names,
    model_being_built,
    own_variables,
    running_step,
    unscale_loss_for_distribution,
    values_in_scope,
    variables_can_be_assigned,
)
from lossargs._live import (
    Adapter,
    StepValues,
    Untracked,
    VariableAdapter,
    adapter_of,
    set_step_values,
)
from lossargs._loss import BoundLoss
from lossargs._objects import LayerAdapter
from lossargs._serialization import checked, load_object, reading
from lossargs._values import cache_key, is_live

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
class LiveArg:
    """A live argument of one of the losses of a layer."""

    loss: BoundLoss
    name: str  # of the argument
    label: str  # of the argument, and the place of the value in it
    key: Any  # equal for two arguments that have one value
    adapter: Adapter
    metric: LiveValue | None  # logs the value, if it is a scalar

    @property
    def is_named(self) -> bool:
        """Whether the logs or `live_args` have it by its name."""
        return self.metric is not None or self.adapter.variable is not None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What Keras should not track, nor wrap, as attributes of the layer."""

    adapters: dict[Any, Adapter]  # by the keys of the values
    losses: dict[BoundLoss, dict[str, Any]]  # with an adapter for each live value
    live: tuple[LiveArg, ...]
    logged: tuple[tuple[LiveValue, int], ...]  # with the place of the adapter
    tracked: tuple[tuple[BoundLoss, keras.Metric], ...]


@keras.saving.register_keras_serializable(package="lossargs")
class LossArgs(keras.Layer):
    """Holds the live arguments of a loss, and passes them to it with the predictions.

    `attach` adds this layer to a Functional or Sequential model. In a subclassed model, call it
    in `call` on the output that goes to the loss, and return the result unchanged:

        def call(self, x):
            z_mean, z_log_var = self.encoder(x)
            ...
            return self.loss_args(x_hat, z_mean=z_mean, z_log_var=z_log_var)

    Args:
        loss: The bound loss that `compile` is given as well.
        track: Further bound losses, logged under their names.
        **kwargs: Arguments of `keras.layers.Layer`, e.g. `name`.

    Raises:
        AttachError: A loss was not made by a factory, or two losses have one name.

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
        kept: Mapping[Any, Adapter] = kwargs.pop("kept", {})  # of a layer that this one replaces
        # The names of the inputs that `attach` added; `None` if it was given tensors.
        new_inputs: list[str] | None = kwargs.pop("new_inputs", None)
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
        metrics: dict[tuple[str, Any], LiveValue] = {}
        live = []
        for one in losses:
            for name, label, leaf in one.live_leaves():
                key = cache_key(leaf)
                if key not in adapters:
                    is_kept = key in kept
                    adapters[key] = kept[key].for_another_layer() if is_kept else adapter_of(leaf)
                if adapters[key].shape == () and (label, key) not in metrics:
                    metrics[label, key] = LiveValue(label)
                live.append(
                    LiveArg(one, name, label, key, adapters[key], metrics.get((label, key)))
                )

        for arg in live:
            if isinstance(arg.adapter, LayerAdapter):
                arg.adapter.check_is_alone(f"{arg.label!r} of {arg.loss!r}")

        def keep(leaf: Any) -> Any:
            return adapters[cache_key(leaf)] if is_live(leaf) else leaf

        self.adapters = list(dict.fromkeys(adapters.values()))  # for Keras to find them
        place = {adapter: place for place, adapter in enumerate(self.adapters)}
        self._plan = _Plan(
            adapters=adapters,
            losses={one: one.live_args(keep) for one in losses},
            live=tuple(live),
            logged=tuple((metric, place[adapters[key]]) for (_, key), metric in metrics.items()),
            tracked=tuple((one, TrackedLoss(name=one.name)) for one in track),
        )
        self.loss = loss
        self._reference = weakref.ref(self)
        self._given: set[str] = set()  # names of arguments in calls of this layer
        self._prepared: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self.new_inputs = None if new_inputs is None else tuple(new_inputs)
        self.unsaved = ""  # why this layer cannot be saved
        # Names of layers of the model, by the adapters that have weights of these.
        self._shared: Any = Untracked({})
        self.logged = [*metrics.values(), *(metric for _, metric in self._plan.tracked)]
        for one in losses:
            one.layers.add(self)

    @property
    def metrics(self) -> list[Any]:
        """The metrics of this layer. A model asks the layers within it too."""
        return list(self.logged)

    @property
    def live(self) -> Sequence[LiveArg]:
        """The live arguments of all the losses."""
        return self._plan.live

    # No properties: Keras looks for weights in all of these.
    def get_losses(self) -> Mapping[BoundLoss, Any]:
        """Return all the losses that get values from this layer, with trees of their adapters."""
        return self._plan.losses

    @property
    def track(self) -> tuple[BoundLoss, ...]:
        """The losses that are evaluated for the logs only."""
        return tuple(loss for loss, _ in self._plan.tracked)

    def adapters_by_key(self) -> dict[Any, Adapter]:
        """Return the adapters by the keys of their values."""
        return dict(self._plan.adapters)

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
        training: Any = None,
        **named: Any,
    ) -> Any:
        """Return the predictions, with the arguments of the loss for this step.

        Args:
            y_pred: The predictions, one tensor.
            tensors: For `attach`: the values of the symbolic tensors among the arguments.
            given: For a saved graph: `named` in one dict.
            training: Given by Keras; a loss may have an argument of that name.
            **named: Further arguments of the losses, tensors by name.

        Returns:
            The predictions, in a tensor of their own.

        Raises:
            AttachError: A name that no loss takes, a symbolic tensor without a value, or more than
                one tensor of predictions.
        """
        if not isinstance(y_pred, keras.KerasTensor) and not keras.ops.is_tensor(y_pred):
            raise AttachError(
                f"LossArgs({self.loss!r}) was called with a {type(y_pred).__name__}, and takes the "
                "one tensor that goes to its loss. For several outputs make one layer for each."
            )
        if given is None and training is not None and self._takes("training"):
            named["training"], training = training, None  # the user's argument, not Keras's
        # In one dict: by itself, `mask` would be a mask to Keras.
        given = {**(given or {}), **named}
        if keras.backend.backend() == "torch" and not isinstance(y_pred, keras.KerasTensor):
            # All else that Keras does around a call does not concern this layer, and on PyTorch it
            # is done in each step, where it takes longer than a small layer computes.
            with AutocastScope(None):
                return self.call(y_pred, tensors, given)
        options = {} if training is None else {"training": training}
        return super().__call__(y_pred, tensors, given, **options)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Under `keras.RematScope` as without: the values must not be computed a second time."""
        return layer_call

    def call(
        self,
        y_pred: Any,
        tensors: Sequence[Any] = (),
        given: Mapping[str, Any] | None = None,
    ) -> Any:
        """As `__call__`, with all arguments by name in `given`."""
        given = dict(given or {})
        if in_symbolic_scope():  # Keras hides errors that a layer raises here
            model = model_being_built()
            if model is not None:
                self._prepared.discard(model)  # it may be compiled with another loss
            return y_pred
        step = running_step()
        try:
            self._check(tensors, given)
            if step is not None and step.model is not None:
                self._prepare_once(step)
        except LossArgsError:
            give_variables_back()
            raise
        self._given.update(given)
        inputs = iter(tensors)
        by_adapter = {one.adapter: given[one.label] for one in self.live if one.label in given}
        read = []
        for adapter in self.adapters:
            tensor = next(inputs, None) if adapter.reads_tensor else None
            read.append(by_adapter.get(adapter, tensor))
        with ReadScope(copies=True):
            read = [one.read(tensor) for one, tensor in zip(self.adapters, read, strict=True)]
        values = StepValues(self._reference, read, given, step)
        if step is None or not step.keeps_state:
            # In a user's own loop, the loss may be evaluated where variables cannot be assigned.
            training = called_for_training(self)
            values.compute(training=training)
            values.elsewhere = values_in_scope(values.state()) if step is None else []
            if training:
                values.finish_step()
        return set_step_values(y_pred, values)

    def compute_output_spec(
        self,
        y_pred: Any,
        tensors: Sequence[Any] = (),
        given: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return shape and dtype of the predictions."""
        self._check(tensors, given or {})
        return keras.KerasTensor(y_pred.shape, y_pred.dtype, sparse=y_pred.sparse)

    def names_given_to(self, loss: BoundLoss) -> list[str]:
        """Return the arguments of a loss that calls of this layer give."""
        if loss not in self.get_losses():
            return []
        return [*self.get_losses()[loss], *(name for name in self._given if loss.takes(name))]

    def _takes(self, name: str) -> bool:
        return any(loss.takes(name) for loss in self.get_losses())

    def _check(self, tensors: Sequence[Any], given: Mapping[str, Any]) -> None:
        for name in given:
            if not self._takes(name):
                known = {name for loss in self.get_losses() for name in loss.parameters}
                raise AttachError(
                    f"LossArgs({self.loss!r}) was called with {name!r}, which none of its losses "
                    f"takes.{nearest(name, known)}"
                )
        for one in self.live:
            if not one.adapter.reads_tensor and one.name in given:
                raise AttachError(
                    f"{one.label!r} of {one.loss!r} was given twice: bound, and in the call of "
                    "LossArgs. Leave it out of one of them."
                )
        readers = [adapter for adapter in self.adapters if adapter.reads_tensor]
        if tensors and len(tensors) != len(readers):
            raise AttachError(
                f"LossArgs({self.loss!r}) was called with {len(tensors)} tensors in a list, and "
                f"reads {len(readers)}. Give tensors by name, self.loss_args(y_pred, name=...)."
            )
        fed = {a for a, tensor in zip(readers, tensors, strict=False) if tensor is not None}
        unfed = [one for one in self.live if one.adapter.reads_tensor and one.adapter not in fed]
        names = [one.name for one in unfed if one.name not in given]
        if names:
            raise AttachError(
                f"{listed(names)} of {self.loss!r} is a symbolic tensor, or reads one, and this "
                "call of LossArgs gives none. Let attach(y_pred, loss) connect it; in a subclassed "
                f"model leave it unbound and give it in the call: "
                f"self.loss_args(y_pred, {names[0]}=...)."
            )

    def evaluate_tracked(self, call: Any, y_true: Any, y_pred: Any) -> list[Any]:
        """Return the values of the tracked losses, whose updates of state are dropped."""
        if call.step is None or not variables_can_be_assigned():
            return []
        for values in call.values if self._plan.tracked else ():
            values.compute_once()
        with Sandbox():
            return [
                call.for_loss(loss, extra={}, reduction=loss.reduction).evaluate(y_true, y_pred)
                for loss, _ in self._plan.tracked
            ]

    def finish_step(self, values: StepValues, call: Any, tracked: list[Any], y_pred: Any) -> None:
        """Log the live scalars and the tracked losses, and let the adapters go on.

        The loss calls this when it was evaluated.
        """
        if call.step is None or not variables_can_be_assigned():
            return
        for metric, place in self._plan.logged:
            metric.update_state((values.values or ())[place])
        for (_, metric), evaluated in zip(self._plan.tracked, tracked, strict=True):
            value = unscale_loss_for_distribution(evaluated)
            # Weighted by batch size, as Keras does its own.
            shape: Any = keras.ops.shape(y_pred)
            size = shape[0] if len(y_pred.shape) else None
            metric.update_state(keras.ops.stop_gradient(value), sample_weight=size)
        if call.step.training and call.step.keeps_state:
            values.finish_step()

    def _prepare_once(self, step: Step) -> None:
        # TensorFlow and JAX run this code only in traces.
        if keras.backend.backend() != "torch" or step.model not in self._prepared:
            for one in self.live:
                for variable in _variables_of(one.adapter):
                    follow_in_epochs(variable, step.model)
            if step.has_loss:
                self.prepare(step.model)
                self._prepared.add(step.model)

    def prepare(self, model: keras.Model) -> None:
        """Check this layer, and name its logs, before the first step of a model that it is in.

        Raises:
            AttachError: The model has another loss, or two names in its logs are equal.
        """
        compiled = [one for one in keras.tree.flatten(model.loss) if one is not None]
        # An attached model may be a part of another one, as a teacher is.
        is_own = any(layer is self for layer in model.layers)
        if is_own and compiled and self.loss not in compiled:
            raise AttachError(
                f"{model.name!r} is attached to {self.loss!r}, and was compiled with "
                f"{', '.join(map(repr, compiled))}. Bind once, and give that one loss to attach "
                "and to compile. For a model that was loaded or cloned, take the `loss` of its "
                "LossArgs layer. For another loss take model = detach(model)."
            )
        for one in self.live:
            if isinstance(one.adapter, LayerAdapter):
                one.adapter.check_is_built(f"{one.label!r} of {self.loss!r}")
        settle_names(layers_of(model), metric_names(model))
        if is_own and isinstance(model, (Functional, keras.Sequential)):
            self.note_weights_of(model.layers)

    def note_weights_of(self, layers: Iterable[Any]) -> None:
        """Let variables that are weights of other layers of the graph be saved by these."""
        owners = {
            id(variable): (layer, place)
            for layer in layers
            for own in [_ids_of_weights(layer)]
            for place, variable in enumerate(layer.weights)
            if id(variable) in own
        }
        for adapter in self.adapters:
            shared = [owners[id(v)] for v in _variables_of(adapter) if id(v) in owners]
            if shared:
                self._shared.value[adapter] = shared[0][0].name
            if shared and isinstance(adapter, VariableAdapter):
                adapter.refer_to(*shared[0])

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make this layer again.

        Raises:
            SavingError: The format of the file, or the copy, would lose something.
        """
        if self.unsaved:
            raise SavingError(f"The model of {self.loss!r} cannot be saved: {self.unsaved}")
        if in_legacy_saving():
            raise SavingError(
                f"{self.loss!r} cannot be saved in the legacy HDF5 format, which knows no live "
                'arguments. Save the model in the Keras format, model.save("model.keras").'
            )
        for one in self.live:
            if one.adapter in self._shared.value and not in_sharing_scope():
                raise SavingError(
                    f"{one.label!r} of {self.loss!r} shares weights with the layer "
                    f"{self._shared.value[one.adapter]!r}, and would have its own in a copy. Save "
                    "and load the model, or clone detach(model)."
                )
        config = super().get_config()
        del config["dtype"]
        # As objects: Keras sees then which of them several layers share.
        new = None if self.new_inputs is None else list(self.new_inputs)
        return {**config, "loss": self.loss, "track": list(self.track), "new_inputs": new}

    @staticmethod
    def losses_from_config(config: dict[str, Any]) -> list[BoundLoss]:
        """Return the loss and the tracked losses that a config of this class describes."""
        loss, track = checked(config, "loss", dict, BoundLoss), checked(config, "track", list)
        return [load_object(one, BoundLoss) for one in (loss, *track)]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        with reading("The config of a LossArgs layer"):
            losses = cls.losses_from_config(config)
            new_inputs = checked(config, "new_inputs", list, type(None))
            known = ("name", "trainable", "loss", "track", "new_inputs")
            unknown = set(config) - set(known)
            if unknown:
                raise ValueError(f"it has entries that are unknown here, {listed(sorted(unknown))}")
            options = {name: config[name] for name in ("name", "trainable") if name in config}
            return cls(losses[0], track=losses[1:], new_inputs=new_inputs, **options)


def _variables_of(adapter: Adapter) -> list[keras.Variable]:
    """Return the weights of an adapter, and the variable that it may refer to."""
    return [*adapter.weights, *([] if adapter.variable is None else [adapter.variable])]


def _ids_of_weights(layer: keras.Layer) -> set[int]:
    """Return the ids of the weights of a layer, without those of live arguments."""
    inside = [one for one in flat_layers(layer) if not isinstance(one, Adapter)]
    return {id(variable) for one in inside for variable in own_variables(one)}


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
    layers: Iterable[LossArgs], others: Iterable[str] = ("loss",), *, by_layer: bool = True
) -> list[tuple[str, LiveArg]]:
    """Return the live arguments of the layers of a model with their names in the logs.

    A name of different values gets the name of its loss in front; with `by_layer` that of its layer
    where this is not enough, as in two attached models that are parts of one. `others` are further
    names in the logs.

    Raises:
        AttachError: Two would still have one name.
    """
    layers = list(layers)
    live = [(layer, one) for layer in layers for one in layer.live if one.is_named]
    names = {id(one): one.label for _, one in live}
    others = list(others)
    for in_front in ("loss", "layer") if by_layer else ("loss",):
        values: dict[str, set[Any]] = {name: {None} for name in others}
        for _, one in live:
            values.setdefault(names[id(one)], set()).add(one.key)
        for layer, one in live:
            if len(values[names[id(one)]]) > 1:
                prefix = one.loss.name if in_front == "loss" else layer.name
                names[id(one)] = f"{prefix}_{one.label}"
    named = [(names[id(one)], one) for _, one in live]
    distinct = dict.fromkeys((name, one.key) for name, one in named)
    tracked = [loss.name for layer in layers for loss in layer.track]
    check_names([*others, *(name for name, _ in distinct), *tracked], "Live arguments")
    return named


def settle_names(layers: Iterable[LossArgs], others: Iterable[str]) -> None:
    """Let the live arguments of several layers of one model be logged under different names."""
    for name, one in names_of(layers, others):
        if one.metric is not None:
            one.metric.name = name
