"""`LossArgs`: the layer that holds live arguments and passes them to the loss in each step."""

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import keras

from lossargs._adapters import VariableAdapter, refer_to_owners
from lossargs._errors import AttachError, LossArgsError, SavingError, listed, nearest
from lossargs._keras import (
    AutocastScope,
    Functional,
    ReadScope,
    Step,
    allow_any_arguments,
    called_for_training,
    follow_in_epochs,
    give_variables_back,
    in_legacy_saving,
    in_sharing_scope,
    in_symbolic_scope,
    running_step,
    unscale_loss_for_distribution,
    variables_can_be_assigned,
)
from lossargs._live import Adapter, StepValues, adapter_of, set_step_values
from lossargs._logs import LiveArg, LiveValue, TrackedLoss, check_names, settle_names
from lossargs._loss import BoundLoss, check_is_bound
from lossargs._serialization import load_object, reading
from lossargs._values import cache_key, is_live


@dataclasses.dataclass(frozen=True)
class _Contents:
    """Parts of a layer that Keras would wrap or track as its attributes."""

    losses: dict[BoundLoss, dict[str, Any]]  # with trees of the adapters of their arguments
    adapters: dict[Any, Adapter]  # by the keys of the values
    live: tuple[LiveArg, ...]
    logged: tuple[tuple[LiveValue, Adapter], ...]
    tracked: tuple[tuple[BoundLoss, TrackedLoss], ...]  # terms also
    track: tuple[BoundLoss, ...]


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
        new_inputs: Iterable[str] | None = kwargs.pop("new_inputs", None)
        # No mixed policy: values and predictions keep their precision.
        super().__init__(**{**kwargs, "dtype": keras.config.floatx(), "autocast": False})
        self.supports_masking = True
        allow_any_arguments(self)
        self.built = True
        track = tuple(track)
        for one in (loss, *track):
            check_is_bound(one)
        terms = dict.fromkeys(loss.all_terms())
        to_log = dict.fromkeys((*terms, *track))
        check_names(["loss", *(one.name for one in to_log)], "Terms and track=[...]")
        adapters: dict[Any, Adapter] = {}

        def adapter(leaf: Any) -> Any:
            if not is_live(leaf):
                return leaf
            key = cache_key(leaf)
            if key not in adapters:
                is_kept = key in kept
                adapters[key] = kept[key].for_another_layer() if is_kept else adapter_of(leaf)
            return adapters[key]

        losses = {
            inner: inner.live_args(adapter)
            for one in (loss, *track)
            for inner in (one, *one.inner_losses)
        }
        metrics: dict[tuple[str, Adapter], LiveValue] = {}
        live = []
        for one in losses:
            for name, label, leaf in one.live_leaves():
                logged = (label, adapter(leaf))
                if logged[1].shape == () and logged not in metrics:
                    metrics[logged] = LiveValue(label)
                metric = metrics.get(logged)
                live.append(LiveArg(one, name, label, cache_key(leaf), logged[1], metric))
        tracked = tuple((one, TrackedLoss(name=one.name)) for one in to_log)
        scalars = tuple((metric, adapter) for (_, adapter), metric in metrics.items())
        self._contents = _Contents(losses, adapters, tuple(live), scalars, tracked, track)
        # For Keras to find them.
        self.adapters = list(dict.fromkeys(adapters.values()))
        self.logged = [*metrics.values(), *(metric for _, metric in tracked)]
        self.loss = loss
        self._reference = weakref.ref(self)
        self._given: set[str] = set()  # names of arguments in calls of this layer
        self._prepared: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self.new_inputs = None if new_inputs is None else tuple(new_inputs)
        self.unsaved = ""  # why this layer cannot be saved
        for one in losses:
            one.layers.add(self)

    # No properties: Keras looks for weights in the values of all properties.
    def get_losses(self) -> Mapping[BoundLoss, Any]:
        """Return the losses that receive values from this layer, with trees of their adapters."""
        return self._contents.losses

    def get_live(self) -> Sequence[LiveArg]:
        """Return the live arguments of these losses."""
        return self._contents.live

    @property
    def track(self) -> tuple[BoundLoss, ...]:
        """The losses that are evaluated only for the logs."""
        return self._contents.track

    def get_tracked(self) -> Sequence[tuple[BoundLoss, TrackedLoss]]:
        """Return terms and tracked losses with their metrics."""
        return self._contents.tracked

    def adapters_by_key(self) -> dict[Any, Adapter]:
        """Return the adapters by the keys of their values."""
        return dict(self._contents.adapters)

    def readers(self) -> list[Adapter]:
        """Return the adapters that read a tensor."""
        return [adapter for adapter in self.adapters if adapter.reads_tensor]

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
        if isinstance(y_pred, keras.KerasTensor):
            options = {} if training is None else {"training": training}
            return super().__call__(y_pred, tensors, given, **options)
        # The rest of Keras's call converts, casts and counts, which must not happen here.
        with AutocastScope(None):
            return self.call(y_pred, tensors, given)

    def call(
        self,
        y_pred: Any,
        tensors: Sequence[Any] = (),
        given: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the predictions, as `__call__`, with all arguments by name in `given`."""
        given = dict(given or {})
        step = running_step()
        if in_symbolic_scope():  # Keras hides errors that a layer raises here
            if step is not None and step.model is not None:
                self._prepared.discard(step.model)  # it may be compiled with another loss
            return y_pred
        try:
            self._check(tensors, given)
            if step is not None and step.model is not None:
                self._prepare_once(step)
        except LossArgsError:
            give_variables_back()
            raise
        self._given.update(given)
        inputs = iter(tensors)
        live = self._contents.live
        by_adapter = {one.adapter: given[one.label] for one in live if one.label in given}
        read = []
        for adapter in self.adapters:
            tensor = next(inputs, None) if adapter.reads_tensor else None
            read.append(by_adapter.get(adapter, tensor))
        with ReadScope(copies=True):
            read = [one.read(tensor) for one, tensor in zip(self.adapters, read, strict=True)]
        # In a user's own loop, the loss may be evaluated where variables cannot be assigned.
        is_own_loop = step is None or not step.keeps_state
        training = called_for_training(self) if is_own_loop else bool(step and step.training)
        values = StepValues(self._reference, read, given, step, training)
        if is_own_loop:
            values.compute()
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
        weights = (one.label for one in self._contents.live if one.adapter.reads_tensor)
        return name in weights or any(loss.takes(name) for loss in self.get_losses())

    def _check(self, tensors: Sequence[Any], given: Mapping[str, Any]) -> None:
        for name in given:
            if not self._takes(name):
                known = {name for loss in self.get_losses() for name in loss.parameters}
                raise AttachError(
                    f"LossArgs({self.loss!r}) was called with {name!r}, which none of its losses "
                    f"takes.{nearest(name, known)}"
                )
        for one in self._contents.live:
            if not one.adapter.reads_tensor and one.label in given:
                raise AttachError(
                    f"{one.label!r} of {one.loss!r} was given twice: bound, and in the call of "
                    "LossArgs. Leave it out of one of them."
                )
        readers = self.readers()
        if tensors and len(tensors) != len(readers):
            raise AttachError(
                f"LossArgs({self.loss!r}) was called with {len(tensors)} tensors in a list, and "
                f"reads {len(readers)}. Give tensors by name, self.loss_args(y_pred, name=...)."
            )
        fed = {a for a, tensor in zip(readers, tensors, strict=False) if tensor is not None}
        unfed = [
            one
            for one in self._contents.live
            if one.adapter.reads_tensor and one.adapter not in fed
        ]
        names = [one.label for one in unfed if one.label not in given]
        if names:
            raise AttachError(
                f"{listed(names)} of {self.loss!r} is a symbolic tensor, or reads one, and this "
                "call of LossArgs gives none. Let attach(y_pred, loss) connect it; in a subclassed "
                f"model leave it unbound and give it in the call: "
                f"self.loss_args(y_pred, {names[0]}=...)."
            )

    def losses_to_log(self, values: StepValues) -> list[BoundLoss]:
        """Return the terms and tracked losses to evaluate in a step."""
        is_logged = values.step is not None and variables_can_be_assigned()
        return [loss for loss, _ in self._contents.tracked] if is_logged else []

    def finish_step(self, values: StepValues, losses: Mapping[BoundLoss, Any], y_pred: Any) -> None:
        """Log live scalars and the values of losses, and advance the adapters.

        The loss calls this method after its evaluation.
        """
        step = values.step
        if step is None or not variables_can_be_assigned():
            return
        by_adapter = values.by_adapter()
        for live_value, adapter in self._contents.logged:
            live_value.update_state(by_adapter[adapter])
        # Weighted by batch size, as Keras does its own.
        shape: Any = keras.ops.shape(y_pred)
        size = shape[0] if len(y_pred.shape) else None
        for loss, metric in self._contents.tracked:
            value = keras.ops.stop_gradient(unscale_loss_for_distribution(losses[loss]))
            metric.update_state(keras.ops.mean(value), sample_weight=size)
        if step.training and step.keeps_state:
            values.finish_step()

    def _prepare_once(self, step: Step) -> None:
        # TensorFlow and JAX run this code only in traces.
        if keras.backend.backend() != "torch" or step.model not in self._prepared:
            for one in self._contents.live:
                if one.adapter.variable is not None:
                    follow_in_epochs(one.adapter.variable, step.model)
            if step.method != "predict_step":
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
        settle_names(model)
        if is_own and isinstance(model, (Functional, keras.Sequential)):
            refer_to_owners(self.adapters, model.layers)

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
        for one in self._contents.live:
            is_variable = isinstance(one.adapter, VariableAdapter)
            owner = one.adapter.get_owner() if is_variable else None
            if owner is not None and not in_sharing_scope():
                raise SavingError(
                    f"{one.label!r} of {self.loss!r} is a weight of the layer {owner.name!r}, "
                    "and would be another variable in a copy. Save and load the model, or clone "
                    "detach(model)."
                )
        config = super().get_config()
        del config["dtype"]
        # As objects: Keras then finds the ones that several layers share.
        new = None if self.new_inputs is None else list(self.new_inputs)
        return {**config, "loss": self.loss, "track": list(self.track), "new_inputs": new}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        with reading("The config of a LossArgs layer"):
            saved = [config.pop("loss"), *config.pop("track")]
            loss, *track = [load_object(one, BoundLoss) for one in saved]
            return cls(loss, track=track, **config)
