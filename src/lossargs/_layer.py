"""`LossArgs`: the layer that holds live arguments and passes them to the loss in each step."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import keras

from lossargs._adapters import LayerAdapter, VariableAdapter
from lossargs._arguments import collect
from lossargs._errors import AttachError, LossArgsError, SavingError, listed
from lossargs._keras import (
    AutocastScope,
    Functional,
    ReadScope,
    Step,
    allow_any_arguments,
    called_for_training,
    define_copy_for_torch,
    flat_layers,
    follow_in_epochs,
    give_variables_back,
    in_legacy_saving,
    in_sharing_scope,
    in_symbolic_scope,
    own_variables,
    running_step,
    unscale_loss_for_distribution,
    values_in_scope,
    variables_can_be_assigned,
)
from lossargs._live import Adapter, StepValues, Untracked, set_step_values
from lossargs._logs import LiveArg, LogItem, settle_names
from lossargs._loss import BoundLoss
from lossargs._serialization import checked, load_object, reading


@keras.saving.register_keras_serializable(package="lossargs")
class LossArgs(keras.Layer):
    """A layer that holds the live arguments of a loss, and passes their values to it.

    `attach` adds this layer to a Functional or Sequential model. In a subclassed model, call it
    in `call` on the output that goes to the loss, and return the result unchanged:

        def call(self, x):
            z_mean, z_log_var = self.encoder(x)
            ...
            return self.loss_args(x_hat, z_mean=z_mean, z_log_var=z_log_var)

    Args:
        loss: The bound loss that you also give to `compile`.
        track: A further bound loss, or several, logged under their names.
        **kwargs: Arguments of `keras.layers.Layer`, e.g. `name`.

    Raises:
        AttachError: A loss is not a bound loss, or two losses have one name. Or an argument is an
            attached model.

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

    def __init__(
        self, loss: BoundLoss, *, track: BoundLoss | Iterable[BoundLoss] = (), **kwargs: Any
    ) -> None:
        kept: Mapping[Any, Adapter] = kwargs.pop("kept", {})  # of a layer that this one replaces
        # The names of the inputs that `attach` added; `None` if it was given tensors.
        new_inputs: Iterable[str] | None = kwargs.pop("new_inputs", None)
        # No mixed policy: values and predictions keep their precision.
        super().__init__(**{**kwargs, "dtype": keras.config.floatx(), "autocast": False})
        self.supports_masking = True
        allow_any_arguments(self)
        define_copy_for_torch()
        self.built = True
        track = (track,) if isinstance(track, BoundLoss) else tuple(track)
        self._args = collect(loss, track, kept)
        # For Keras to find them.
        self.adapters = list(dict.fromkeys(self._args.adapters.values()))
        # Untracked, so that the weights of a model do not depend on its logs.
        self._logs = Untracked(self._args.logs())
        self.loss = loss
        self._reference = weakref.ref(self)
        self._given: set[str] = set()  # names of arguments in calls of this layer
        self._prepared: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self.new_inputs = None if new_inputs is None else tuple(new_inputs)
        self.unsaved = ""  # why this layer cannot be saved
        # Names of layers of the model, by the adapters that share weights with these.
        self.shared: Any = Untracked({})
        for one in self._args.losses:
            one.layers.add(self)

    @property
    def metrics(self) -> list[Any]:
        """The metrics of this layer only. Keras collects those of its sublayers separately."""
        logs = self._logs.value
        return [logs] if logs.losses or logs.values else []

    # Methods, not properties: `model.save` looks for weights in the values of all properties.
    def get_losses(self) -> Mapping[BoundLoss, Any]:
        """Return the losses that receive values from this layer, with trees of their adapters."""
        return self._args.losses

    def get_live(self) -> Sequence[LiveArg]:
        """Return the live arguments of these losses."""
        return self._args.live

    @property
    def track(self) -> tuple[BoundLoss, ...]:
        """The losses that are evaluated only for the logs."""
        return self._args.track

    def get_log_items(self) -> list[tuple[BoundLoss, LogItem]]:
        """Return the items in the logs of losses and computed weights, with the loss of each."""
        return self._args.items()

    def adapters_by_key(self) -> dict[Any, Adapter]:
        """Return the adapters by the keys of their values."""
        return dict(self._args.adapters)

    def readers(self) -> list[Adapter]:
        """Return the adapters that read a tensor."""
        return self._args.readers()

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
        """Return the predictions, which carry the arguments of the loss for this step.

        Args:
            y_pred: The predictions, one tensor of any shape and dtype.
            tensors: The values of symbolic tensors among the arguments. `attach` passes them.
            given: The same as `**named`, in a dict. Keras passes it when it repeats a graph.
            training: The value of an argument of that name, if a loss has one. Otherwise ignored:
                the step, or the `training` of the call around this one, tells whether the model is
                trained.
            **named: Tensors for arguments of the losses, by name.

        Returns:
            The predictions, in a new tensor.

        Raises:
            AttachError: No loss takes a name, a symbolic tensor has no value, or `y_pred` is not
                one tensor. Or the model was compiled with another loss.
        """
        if not isinstance(y_pred, keras.KerasTensor) and not keras.ops.is_tensor(y_pred):
            raise AttachError(
                f"LossArgs({self.loss!r}) was called with a {type(y_pred).__name__}, and takes the "
                "one tensor that goes to its loss. For several outputs, write one layer each: "
                "self.loss_a(y_a), self.loss_b(y_b)."
            )
        # `given` is `None` in a call by the user, whose `training` may be for a loss.
        if given is None and training is not None and self._args.takes("training"):
            named["training"], training = training, None
        # In one dict: Keras would take an argument `mask` for a mask.
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
            self._args.check_call(tensors, given)
            if step is not None and step.model is not None:
                self._prepare_once(step)
        except LossArgsError:  # the checks raise no others
            give_variables_back()
            raise
        self._given.update(given)
        inputs = iter(tensors)
        live = self._args.live
        by_adapter = {one.adapter: given[one.label] for one in live if one.label in given}
        read = []
        for adapter in self.adapters:
            tensor = next(inputs, None) if adapter.reads_tensor else None
            read.append(by_adapter.get(adapter, tensor))
        with ReadScope(copies=True):
            read = [one.read(tensor) for one, tensor in zip(self.adapters, read, strict=True)]
        # In a user's own loop, variables may not be assignable in the loss. So compute values here.
        is_own_loop = step is None or not step.keeps_state
        training = called_for_training(self) if is_own_loop else bool(step and step.training)
        values = StepValues(self._reference, read, given, step, training)
        if is_own_loop:
            values.compute_once()
            values.forward_values = values_in_scope(values.state()) if step is None else []
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
        self._args.check_call(tensors, given or {})
        return keras.KerasTensor(y_pred.shape, y_pred.dtype, sparse=y_pred.sparse)

    def names_given_to(self, loss: BoundLoss) -> list[str]:
        """Return the arguments of a loss that calls of this layer give."""
        if loss not in self.get_losses():
            return []
        return [*self.get_losses()[loss], *(name for name in self._given if loss.takes(name))]

    def losses_to_log(self, values: StepValues) -> list[BoundLoss]:
        """Return the terms and tracked losses to log; none where variables cannot be assigned."""
        is_logged = values.step is not None and variables_can_be_assigned()
        return [loss for loss, _ in self._args.tracked] if is_logged else []

    def finish_step(
        self,
        values: StepValues,
        losses: Mapping[BoundLoss, Any],
        weights: Mapping[BoundLoss, Any],
        y_pred: Any,
    ) -> None:
        """Log live scalars, losses and computed weights, and advance the adapters.

        The loss calls this method after its evaluation.
        """
        step = values.step
        if step is None or not variables_can_be_assigned():
            return
        by_adapter = values.by_adapter()
        scalars = [by_adapter[adapter] for adapter, _ in self._args.scalars]
        vectors = [weights[loss] for loss, _ in self._args.weights]
        tracked = [unscale_loss_for_distribution(losses[loss]) for loss, _ in self._args.tracked]
        # Weighted by batch size, as Keras does its own.
        shape: Any = keras.ops.shape(y_pred)
        samples = shape[0] if len(y_pred.shape) else 1
        self._logs.value.update_state(tracked, scalars, vectors, samples)
        if step.training and step.keeps_state:
            values.finish_step()

    def _prepare_once(self, step: Step) -> None:
        # TensorFlow and JAX run this code only in traces.
        if keras.backend.backend() != "torch" or step.model not in self._prepared:
            for one in self._args.live:
                for variable in (*one.adapter.weights, one.adapter.variable):
                    if variable is not None:
                        follow_in_epochs(variable, step.model)
            if step.method != "predict_step":
                self.prepare(step.model)
                self._prepared.add(step.model)

    def prepare(self, model: keras.Model) -> None:
        """Check this layer, and name its logs, before the first step of a model that it is in.

        Raises:
            AttachError: The model has another loss, two names in its logs are equal, or a layer
                among the arguments has no weights yet.
        """
        compiled = [one for one in keras.tree.flatten(model.loss) if one is not None]
        # An attached model may be a part of another one, as a teacher is.
        is_own = any(layer is self for layer in model.layers)
        if is_own and compiled and self.loss not in compiled:
            raise AttachError(
                f"{model.name!r} is attached to {self.loss!r}, and was compiled with "
                f"{', '.join(map(repr, compiled))}. Compile with the attached loss, also of a "
                f"loaded or cloned model: model.get_layer({self.name!r}).loss. For another loss: "
                "model = attach(model, loss)."
            )
        for one in self._args.live:
            if isinstance(one.adapter, LayerAdapter):
                one.adapter.check_is_built(f"{one.label!r} of {self.loss!r}")
        settle_names(model)
        if is_own and isinstance(model, (Functional, keras.Sequential)):
            note_shared_weights(self, model.layers)

    def get_config(self) -> dict[str, Any]:
        """Return the config from which `from_config` makes this layer again.

        Raises:
            SavingError: The saved model or the copy would not equal this model.
        """
        _refuse_saving(self)
        config = super().get_config()
        del config["dtype"]  # which `__init__` sets
        # Objects, not configs, so that Keras writes a shared object once.
        new = None if self.new_inputs is None else list(self.new_inputs)
        return {**config, "loss": self.loss, "track": list(self.track), "new_inputs": new}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        with reading("The config of a LossArgs layer"):
            loss, *track = losses_from_config(config)
            options = {k: v for k, v in config.items() if k not in ("loss", "track")}
            checked(options, "new_inputs", list, type(None))
            if unknown := options.keys() - {"name", "trainable", "new_inputs"}:
                raise ValueError(f"it has unknown entries: {listed(sorted(unknown))}")
            return cls(loss, track=track, **options)


def losses_from_config(config: dict[str, Any]) -> list[BoundLoss]:
    """Return the loss and the tracked losses that the config of a `LossArgs` layer describes."""
    saved = (config["loss"], *checked(config, "track", list))
    return [load_object(one, BoundLoss) for one in saved]


def note_shared_weights(loss_args: LossArgs, layers: Iterable[Any]) -> None:
    """Let a layer of the graph save the bound variable that is one of its weights."""
    owners: dict[int, Any] = {}
    for layer in layers:
        inside = [one for one in flat_layers(layer) if not isinstance(one, Adapter)]
        own = {id(variable) for one in inside for variable in own_variables(one)}
        weights = enumerate(layer.weights)
        owners |= {id(weight): (layer, i) for i, weight in weights if id(weight) in own}
    for adapter in loss_args.adapters:
        variables = (*adapter.weights, adapter.variable)
        found = [owners[id(v)] for v in variables if id(v) in owners]
        if found:
            loss_args.shared.value[adapter] = found[0][0].name
        if found and isinstance(adapter, VariableAdapter):
            adapter.refer_to(*found[0])


def _refuse_saving(layer: LossArgs) -> None:
    """Raise if a saved model or a copy would not equal the model of this layer."""
    if layer.unsaved:
        raise SavingError(f"The model of {layer.loss!r} cannot be saved: {layer.unsaved}")
    if in_legacy_saving():
        raise SavingError(
            f"{layer.loss!r} cannot be saved in the legacy HDF5 format, which cannot store "
            'live arguments. Write model.save("model.keras").'
        )
    shared = layer.shared.value
    for one in layer.get_live():
        if one.adapter in shared and not in_sharing_scope():
            raise SavingError(
                f"{one.label!r} of {layer.loss!r} shares weights with the layer "
                f"{shared[one.adapter]!r}, and would have its own in a copy. Save and load the "
                "model, or clone detach(model)."
            )
