"""Kinds of live arguments: how the model keeps each, and what it gives the loss in a step."""

import weakref
from typing import Any, ClassVar, Self

import keras
import numpy as np

from lossargs._errors import ArgumentError, AttachError
from lossargs._keras import is_autocast
from lossargs._values import checked, decode, encode, live_types, load_object, reading, show


class Adapter(keras.Layer):
    """Base class for kinds of live arguments; the three built-in kinds are written as subclasses.

    An adapter is a Keras layer: what it keeps from step to step are its weights, made in
    `__init__` with `add_weight`, so that they are saved, distributed and, if trainable, trained
    with the model; what describes it is its config. Bind an instance to an argument of a loss, or
    name in `adapts` a type whose instances can be bound directly.

    Args:
        tensor: The symbolic tensor whose values are given to `value` in each step, if any.
        **kwargs: Those of `keras.layers.Layer`, from its config.

    Raises:
        ArgumentError: What was given for the tensor is no symbolic tensor.

    Attributes:
        adapts: A type whose instances, when bound, are given to this class as `cls(instance)`.
        reads_tensor: Whether `value` needs a tensor of the batch: `tensor`, or what a call of
            `LossArgs` gives by the name of the argument.
        shape: The shape of the value, if it is known beforehand. A scalar, `()`, is logged.

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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adapted = cls.__dict__.get("adapts")
        if adapted is not None:
            _adapters[adapted] = cls
            live_types.append(adapted)

    def __init__(self, tensor: Any = None, **kwargs: Any) -> None:
        if tensor is not None and not isinstance(tensor, keras.KerasTensor):
            raise ArgumentError(
                f"{type(self).__name__} was given {show(tensor)}, and reads a symbolic tensor. "
                "Give the output of a layer or a keras.Input; or nothing, and the tensor by the "
                "name of the argument in the call of LossArgs."
            )
        # No mixed policy: live values keep their precision.
        super().__init__(**{"dtype": keras.config.floatx(), **kwargs})
        self.tensor = tensor
        self.built = True

    def value(self, tensor: Any, training: bool) -> Any:
        """What the loss gets in this step.

        Args:
            tensor: The values of the tensor that this adapter reads, or `None`.
            training: Whether this is a step of training, in which state may be changed.

        Returns:
            A tensor, or a nested structure of tensors.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has to say in `value` what the loss gets."
        )

    @classmethod
    def of(cls, value: Any) -> "Adapter":
        """The adapter of a value of the type that this class adapts."""
        return cls(value)

    @property
    def variable(self) -> Any:
        """The `keras.Variable` that a user may assign, if there is one."""
        return None


_adapters: dict[type, type[Adapter]] = {}
live_types.append(Adapter)


def adapter_of(value: Any) -> Adapter:
    """The adapter of a live value."""
    if isinstance(value, Adapter):
        return value
    for kind in reversed(_adapters):
        if isinstance(value, kind):
            return _adapters[kind].of(value)
    raise AttachError(
        f"{show(value)} belongs to a model that was saved and loaded, whose layer keeps its value. "
        "Attach the loss to that model, or bind it to a variable of it: live_args(model)[name]."
    )


@keras.saving.register_keras_serializable(package="lossargs")
class VariableAdapter(Adapter):
    """A `keras.Variable`: its current value."""

    adapts = keras.Variable
    # One for each variable, so that losses that share a variable share it in the saved model too.
    _of_variable: ClassVar[weakref.WeakValueDictionary[int, "VariableAdapter"]] = (
        weakref.WeakValueDictionary()
    )

    def __init__(self, variable: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._variable = variable
        self.shape = tuple(variable.shape)
        if getattr(variable.value, "weak_type", False):
            # Made of a Python number on JAX: the first `assign` would change its type, and the
            # compiled step would be traced again.
            variable.assign(keras.ops.convert_to_numpy(variable.value))

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return self._variable.value

    @classmethod
    def of(cls, value: Any) -> Adapter:
        adapter = cls._of_variable.get(id(value))
        if adapter is None:
            adapter = cls._of_variable[id(value)] = cls(value)
        return adapter

    @property
    def variable(self) -> Any:
        return self._variable

    def get_config(self) -> dict[str, Any]:
        variable = self._variable
        value = keras.ops.convert_to_numpy(variable.value)
        return {
            **super().get_config(),
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

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        value = keras.ops.convert_to_tensor(self.schedule(self.step.value))
        if training:
            self.step.assign_add(1)
        return value

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "schedule": self.schedule}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        with reading("A saved schedule"):
            # Of that class only: what it names is called in each step.
            kind = keras.optimizers.schedules.LearningRateSchedule
            schedule = load_object(config.get("schedule"), kind)
            adapter: Self = super().from_config({**config, "schedule": schedule})
            return adapter


@keras.saving.register_keras_serializable(package="lossargs")
class TensorAdapter(Adapter):
    """A symbolic tensor: its values for the batch."""

    adapts = keras.KerasTensor
    reads_tensor = True

    def __init__(self, tensor: Any = None, shape: Any = None, **kwargs: Any) -> None:
        super().__init__(tensor, **kwargs)
        known = shape if tensor is None else tensor.shape
        self.shape = None if known is None else tuple(known)  # JSON has no tuples

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return tensor

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "shape": self.shape}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        with reading("A saved tensor"):
            shape = checked(config, "shape", list, tuple, type(None))
            if not all(n is None or (type(n) is int and n >= 0) for n in shape or ()):
                raise ValueError(f"no shape: {shape}")
            adapter: Self = super().from_config(config)
            return adapter
