"""Kinds of live arguments: how the model keeps each, and how its value reaches the loss."""

import dataclasses
import inspect
import weakref
from typing import Any, ClassVar, Self

import keras
import numpy as np

from lossargs._errors import ArgumentError, SavingError, listed
from lossargs._keras import (
    ReadScope,
    Step,
    after_earlier_calls,
    alias,
    get_tensor_attr,
    in_sharing_scope,
    is_autocast,
    set_tensor_attr,
)
from lossargs._serialization import checked, decode, encode, load_object, reading
from lossargs._values import format_value, live_types, map_leaves

_ATTRIBUTE = "_lossargs_steps"
_ADAPTED = object()  # stands in for an object that an adapter hands over


@dataclasses.dataclass(frozen=True)
class Untracked:
    """Holds what Keras should not track as a part of a layer."""

    value: Any


class Adapter(keras.Layer):
    """Base class for kinds of live arguments.

    An adapter is a Keras layer. Its state is in weights, made in `__init__` with `add_weight`: they
    are saved, distributed and, if trainable, trained with the model. Bind an instance to an
    argument of a loss, or name in `adapts` a type whose instances can be bound directly.

    Args:
        tensor: The symbolic tensor whose values `value` receives in each step, if any.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ArgumentError: `tensor` is not a symbolic tensor.

    Attributes:
        adapts: A type whose instances are adapted by `cls(instance)` when they are bound.
        reads_tensor: Whether `value` needs a tensor of the batch: `tensor`, or the tensor that a
            call of `LossArgs` gives by the name of the argument.
        shape: The shape of the value, if it is known. A scalar, `()`, is logged.

    Examples:
        An exponential moving average of the mean of a tensor:

        >>> import keras
        >>> from lossargs import Adapter
        >>> @keras.saving.register_keras_serializable("docs")
        ... class MovingAverage(Adapter):
        ...     reads_tensor, shape = True, ()
        ...
        ...     def __init__(self, tensor=None, decay=0.9, **kwargs):
        ...         super().__init__(tensor, **kwargs)
        ...         self.decay = decay
        ...         self.average = self.add_weight(shape=(), initializer="zeros", trainable=False)
        ...
        ...     def value(self, tensor, training):
        ...         new = self.decay * self.average + (1 - self.decay) * keras.ops.mean(tensor)
        ...         if training:
        ...             self.average.assign(new)
        ...         return new
        ...
        ...     def get_config(self):
        ...         return {**super().get_config(), "decay": self.decay}
        >>> rewards = keras.Input((), name="rewards")
        >>> baseline = MovingAverage(rewards, decay=0.99)  # loss = policy_loss(baseline=baseline)
    """

    adapts: ClassVar[type | None] = None
    reads_tensor: ClassVar[bool] = False
    shape: Any = None
    # One for each value, so that losses that share a value share it in the saved model too.
    _of_value: ClassVar[weakref.WeakValueDictionary[int, "Adapter"]] = weakref.WeakValueDictionary()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adapted = cls.__dict__.get("adapts")
        if adapted is not None:
            _adapters[adapted] = cls
            live_types.append(adapted)

    def __init__(self, tensor: Any = None, **kwargs: Any) -> None:
        if tensor is not None and not isinstance(tensor, keras.KerasTensor):
            raise ArgumentError(
                f"{type(self).__name__} was given {format_value(tensor)}, and reads a symbolic "
                "tensor. Give the output of a layer or a keras.Input; or nothing, and the tensor "
                "by the name of the argument in the call of LossArgs."
            )
        # No mixed policy: live values keep their precision.
        super().__init__(**{"dtype": keras.config.floatx(), **kwargs})
        self.tensor = tensor
        self.adapted = Untracked(None)
        self.built = True

    def read(self, tensor: Any) -> Any:
        """Return what `value` is computed from, as it is in the forward pass."""
        return tensor

    def value(self, tensor: Any, training: bool) -> Any:
        """Return the value for the loss; called once in a step, where the loss is evaluated.

        Args:
            tensor: The values of the tensor that this adapter reads, or `None`.
            training: Whether this is a training step, in which state may be changed.

        Returns:
            A tensor, or a nested structure of tensors.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has to say in `value` what the loss gets."
        )

    def finish_step(self, tensor: Any) -> None:
        """Go on to the next step, after the loss of a training step was evaluated."""

    @classmethod
    def of(cls, value: Any) -> "Adapter":
        """Return the adapter of a value of the type that this class adapts."""
        adapter = cls._of_value.get(id(value))
        if adapter is None or adapter.adapted.value is not value:
            adapter = cls._of_value[id(value)] = cls(value)
            adapter.adapted = Untracked(value)
        return adapter

    @property
    def variable(self) -> Any:
        """The `keras.Variable` that a user may assign, if there is one."""
        return None

    def __str__(self) -> str:
        return f"<{type(self).__name__}>"

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor that Keras knows: for an adapter without others.

        Raises:
            SavingError: The constructor has others, and the class has no `get_config` for them.
        """
        first = 1 if self.adapts is None else 2  # `self`, and the value that is adapted
        parameters = list(inspect.signature(type(self).__init__).parameters.values())[first:]
        own = [p.name for p in parameters if p.name != "tensor" and p.kind is not p.VAR_KEYWORD]
        if own and type(self).get_config is Adapter.get_config:
            raise SavingError(
                f"{type(self).__name__} has no get_config, and would load without {listed(own)}. "
                f"Define it: return {{**super().get_config(), {own[0]!r}: self.{own[0]}}}."
            )
        config: dict[str, Any] = super().get_config()
        return config

    # No property: Keras looks for weights in all of these.
    def get_bound_value(self) -> Any:
        """Return what a loss that was loaded holds for this adapter."""
        return self

    def for_another_layer(self) -> "Adapter":
        """Return the adapter that goes on where this one is."""
        return self


_adapters: dict[type, type[Adapter]] = {}
live_types.append(Adapter)


def adapter_of(value: Any) -> Adapter:
    """Return the adapter of a live value."""
    if isinstance(value, Adapter):
        return value
    kind = next(kind for kind in reversed(_adapters) if isinstance(value, kind))
    return _adapters[kind].of(value)


def encode_live(value: Any) -> Any:
    """Return the Keras object that is saved for a live value: the value itself, or its adapter."""
    saved = value if hasattr(value, "get_config") else adapter_of(value)
    if in_sharing_scope():
        # Keras marks an object as shared in the config where it meets it a second time. By then,
        # a model may have copied the first config.
        keras.saving.serialize_keras_object(saved)
    return saved


def decode_live(config: Any) -> Any:
    """Return the live value that the config of a Keras object describes."""
    graph = config.get("config") if isinstance(config, dict) else None
    if isinstance(graph, dict) and "output_layers" in graph:
        config = {**config, "config": after_earlier_calls(graph)}
    loaded = load_object(config, *live_types)
    return loaded.get_bound_value() if isinstance(loaded, Adapter) else loaded


@keras.saving.register_keras_serializable(package="lossargs")
class VariableAdapter(Adapter):
    """A `keras.Variable`: its value in the step.

    A weight of another layer of the model is saved by that layer: this one only refers to it.
    """

    adapts = keras.Variable

    def __init__(self, variable: Any = None, owner: Any = None, **kwargs: Any) -> None:
        shape = kwargs.pop("shape", None)
        super().__init__(**kwargs)
        self._owner = Untracked(owner)  # a layer, and the place of the variable in its weights
        self._variable: Any = variable
        self.shape = tuple(shape if variable is None else variable.shape)
        if getattr(getattr(variable, "value", None), "weak_type", False):
            # Made of a Python number on JAX: the first `assign` would change its type, and the
            # compiled step would be traced again.
            self._variable.assign(keras.ops.convert_to_numpy(self._variable.value))

    def read(self, tensor: Any) -> Any:  # noqa: ARG002
        return self.variable.value

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return tensor

    @property
    def variable(self) -> Any:
        if self._variable is None:  # loaded
            layer, place = self._owner.value
            return layer.weights[place]
        return self._variable

    def get_bound_value(self) -> Any:
        return self if self._variable is None else self._variable

    def __str__(self) -> str:
        return format_value(self.variable)

    def get_owner(self) -> Any:
        """Return the layer that the variable is a weight of, or `None`."""
        return self._owner.value and self._owner.value[0]

    def refer_to(self, layer: keras.Layer, place: int) -> None:
        """Let the variable be saved by the layer whose weight it is, at this place."""
        self._owner = Untracked((layer, place))

    def save_own_variables(self, store: Any) -> None:
        """Save the variable, unless another layer does."""
        if self._owner.value is None:
            super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Load the variable, unless another layer does."""
        if self._owner.value is None:
            super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        variable, config = self.variable, super().get_config()
        if self.get_owner() and in_sharing_scope():
            layer, place = self._owner.value
            saved = keras.saving.serialize_keras_object(layer)
            return {**config, "owner": [saved, place], "shape": list(self.shape)}
        value = keras.ops.convert_to_numpy(variable.value)
        return {
            **config,
            "variable": {
                "value": encode(value, variable.path),
                "dtype": variable.dtype,
                "trainable": variable.trainable,
                "name": variable.name,
                "autocast": is_autocast(variable),
                "aggregation": variable.aggregation,
            },
            "constraint": keras.constraints.serialize(variable.constraint),
            "regularizer": keras.regularizers.serialize(variable.regularizer),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        with reading("A saved variable"):
            if "owner" in config:
                layer, place = checked(config, "owner", list)
                owner = (load_object(layer, keras.Layer), place)
                return cls(**{**config, "owner": owner})
            options = checked(config, "variable", dict)
            value = decode(options.get("value"))
            # Of anything else, Keras would make a value of any size, or call it for one.
            if not isinstance(value, np.ndarray):
                raise TypeError(f"'value' is a {type(value).__name__}")
            variable = keras.Variable(
                value,
                dtype=checked(options, "dtype", str),
                trainable=checked(options, "trainable", bool),
                name=checked(options, "name", str),
                autocast=checked(options, "autocast", bool),
                aggregation=checked(options, "aggregation", str, type(None)),
            )
            constraint, regularizer = config.pop("constraint"), config.pop("regularizer")
            if constraint is not None:
                variable.constraint = load_object(constraint, keras.constraints.Constraint)
            if regularizer is not None:
                variable.regularizer = load_object(regularizer, keras.regularizers.Regularizer)
            # Keras's way checks that the dtype is one; its constructor takes any object for it.
            adapter: Self = super().from_config({**config, "variable": variable})
            return adapter


@keras.saving.register_keras_serializable(package="lossargs")
class ScheduleAdapter(Adapter):
    """A learning rate schedule: its value at the current step of training."""

    adapts = keras.optimizers.schedules.LearningRateSchedule
    shape = ()

    def __init__(self, schedule: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.schedule = schedule
        self.step = self.add_weight(
            name="step",
            shape=(),
            initializer="zeros",
            dtype="int",
            trainable=False,
            aggregation="only_first_replica",
        )

    @classmethod
    def of(cls, value: Any) -> Adapter:
        return cls(value)  # each layer counts its own steps

    def for_another_layer(self) -> Adapter:
        other = type(self)(self.schedule)
        other.set_weights(self.get_weights())
        return other

    def read(self, tensor: Any) -> Any:  # noqa: ARG002
        return self.step.value

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return keras.ops.convert_to_tensor(self.schedule(tensor))

    def finish_step(self, tensor: Any) -> None:
        self.step.assign(tensor + 1)


@keras.saving.register_keras_serializable(package="lossargs")
class TensorAdapter(Adapter):
    """A symbolic tensor: its values for the batch."""

    adapts = keras.KerasTensor
    reads_tensor = True

    def __init__(
        self, tensor: Any = None, shape: Any = None, tensor_name: str = "", **kwargs: Any
    ) -> None:
        super().__init__(tensor, **kwargs)
        known = shape if tensor is None else tensor.shape
        self.shape = None if known is None else tuple(known)  # JSON has no tuples
        self.tensor_name = tensor_name if tensor is None else tensor.name

    def __str__(self) -> str:
        return f"<symbolic tensor {self.tensor_name!r} {self.shape}>"

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return tensor

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {**config, "shape": self.shape, "tensor_name": self.tensor_name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        with reading("A saved tensor"):
            shape = checked(config, "shape", list, tuple, type(None))
            if not all(n is None or (type(n) is int and n >= 0) for n in shape or ()):
                raise ValueError(f"no shape: {shape}")
            checked(config, "tensor_name", str)
            adapter: Self = super().from_config(config)
            return adapter


@dataclasses.dataclass
class StepValues:
    """What one forward pass gives to the losses of a `LossArgs` layer.

    Tensors of TensorFlow hide from Python's garbage collector what they carry: the layer, its
    losses and the model are held weakly.
    """

    reference: Any  # to the layer
    read: list[Any]  # by each adapter of the layer
    given: dict[str, Any]  # arguments in the call of the layer, by name
    step: Step | None  # `None` in a user's own loop
    values: list[Any] | None = None  # of each adapter, once they are computed
    # Variables, with the values that they had in the forward pass: `stateless_call` gives others.
    elsewhere: list[tuple[keras.Variable, Any]] = dataclasses.field(default_factory=list)

    def layer(self) -> Any:
        """Return the layer, or `None` if it is gone."""
        # `torch.compile` makes the object of a weak reference.
        is_weak = isinstance(self.reference, weakref.ReferenceType)
        return self.reference() if is_weak else self.reference

    def losses(self) -> list[Any]:
        """Return the losses that get values."""
        layer = self.layer()
        return [] if layer is None else list(layer.get_losses())

    def state(self) -> list[keras.Variable]:
        """Return the variables of the objects that the losses get as they are, e.g. of layers."""
        self.compute_once()
        pairs = zip(self.layer().adapters, self.values or (), strict=True)
        holders = [adapter for adapter, value in pairs if value is _ADAPTED]
        holders += [one for one in self.given.values() if isinstance(one, keras.Layer)]
        return [variable for one in holders for variable in one.variables]

    def args_of(self, loss: Any) -> dict[str, Any]:
        """Return the arguments that the layer gives to one of its losses."""
        self.compute_once()
        layer = self.layer()
        by_adapter = dict(zip(layer.adapters, self.values or (), strict=True))

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Adapter):
                return leaf
            return leaf.adapted.value if by_adapter[leaf] is _ADAPTED else by_adapter[leaf]

        given = {name: one for name, one in self.given.items() if loss.takes(name)}
        live = {name: map_leaves(tree, value) for name, tree in layer.get_losses()[loss].items()}
        return {**given, **live}

    def compute_once(self) -> None:
        """Compute the values of this step, if they are not yet."""
        if self.values is None:
            self.compute(training=self.step is not None and self.step.training)

    def compute(self, *, training: bool) -> None:
        """Compute the values of this step."""
        pairs = list(zip(self.layer().adapters, self.read, strict=True))
        with ReadScope(copies=True):
            values = [adapter.value(one, training) for adapter, one in pairs]
        # Such an object may hold the model, which tensors must not.
        is_adapted = [
            v is not None and v is a.adapted.value for v, (a, _) in zip(values, pairs, strict=True)
        ]
        self.values = [_ADAPTED if same else v for v, same in zip(values, is_adapted, strict=True)]

    def finish_step(self) -> None:
        """Let the adapters go on to the next step."""
        for adapter, one in zip(self.layer().adapters, self.read, strict=True):
            adapter.finish_step(one)


def set_step_values(y_pred: Any, step_values: StepValues) -> Any:
    """Return the predictions, with the values of a step for the loss that gets them as `y_pred`.

    The tensor that the last layer of a model returns is the object that the loss receives. Here it
    is a new one: a layer may return its input, which the user holds.
    """
    others = get_step_values(y_pred)
    y_pred = alias(y_pred)
    set_tensor_attr(y_pred, _ATTRIBUTE, [*others, step_values])
    return y_pred


def get_step_values(y_pred: Any) -> list[StepValues]:
    """Return the values that came with predictions; an empty list for most."""
    return get_tensor_attr(y_pred, _ATTRIBUTE) or []
