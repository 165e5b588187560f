"""The kinds of live arguments."""

from typing import Any, Self

import keras
import numpy as np

from lossargs._errors import AttachError
from lossargs._keras import flat_layers, in_sharing_scope, is_autocast
from lossargs._live import Adapter, Untracked
from lossargs._serialization import checked, decode, encode, load_object, reading
from lossargs._values import format_value

_OPTIONS: dict[str, tuple[type, ...]] = {  # of a variable
    "dtype": (str,),
    "trainable": (bool,),
    "name": (str,),
    "autocast": (bool,),
    "aggregation": (str, type(None)),
}


@keras.saving.register_keras_serializable(package="lossargs")
class VariableAdapter(Adapter):
    """A `keras.Variable`: its value in the step.

    If the variable is a weight of another layer of the model, that layer saves it. The adapter
    saves the layer and the index of the weight.
    """

    adapts = keras.Variable

    def __init__(self, variable: Any = None, owner: Any = None, **kwargs: Any) -> None:
        shape = kwargs.pop("shape", None)
        super().__init__(**kwargs)
        self._owner = Untracked(owner)  # the layer that saves the variable, and its index there
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
        options = {
            "value": encode(keras.ops.convert_to_numpy(variable.value), variable.path),
            "dtype": variable.dtype,
            "trainable": variable.trainable,
            "name": variable.name,
            "autocast": is_autocast(variable),
            "aggregation": variable.aggregation,
        }
        constraint = keras.constraints.serialize(variable.constraint)
        regularizer = keras.regularizers.serialize(variable.regularizer)
        own = {"variable": options, "constraint": constraint, "regularizer": regularizer}
        return {**config, **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        with reading("A saved variable"):
            if "owner" in config:
                layer, place = config["owner"]
                if not isinstance(place, int):
                    raise TypeError(f"the index of a weight is {place!r}")
                owner = (load_object(layer, keras.Layer), place)
                shared: Self = super().from_config({**config, "owner": owner})
                return shared
            saved = checked(config, "variable", dict)
            options = {name: checked(saved, name, *kinds) for name, kinds in _OPTIONS.items()}
            value = decode(saved["value"])
            # `keras.Variable` would call a function for its value.
            if not isinstance(value, np.ndarray):
                raise TypeError(f"'value' is a {type(value).__name__}")
            variable: Any = keras.Variable(value, **options)
            constraint, regularizer = config.pop("constraint"), config.pop("regularizer")
            if constraint is not None:
                variable.constraint = load_object(constraint, keras.constraints.Constraint)
            if regularizer is not None:
                variable.regularizer = load_object(regularizer, keras.regularizers.Regularizer)
            # `Layer.from_config` checks the dtype, the constructor takes any object.
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
        if tensor is None and shape is not None:
            shape = keras.KerasTensor(shape).shape  # checks it
        self.shape = shape if tensor is None else tensor.shape
        self.tensor_name = tensor_name if tensor is None else tensor.name

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return tensor

    def __str__(self) -> str:
        return f"<symbolic tensor {self.tensor_name!r} {self.shape}>"

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {**config, "shape": self.shape, "tensor_name": self.tensor_name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        with reading("A saved tensor"):
            adapter: Self = super().from_config(config)
            return adapter


@keras.saving.register_keras_serializable(package="lossargs")
class LayerAdapter(Adapter):
    """A layer or a model, with its weights in the step.

    The layer is a part of the adapter, and so of the model. A loss saves only the layer, and never
    this adapter.
    """

    adapts = keras.Layer

    def __init__(self, layer: keras.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = layer

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return self.layer

    @property
    def metrics(self) -> list[Any]:
        """An empty list, so that Keras does not collect those of a compiled model in here."""
        return []

    def check_is_alone(self, what: str) -> None:
        """Raise if the layer is a model that a loss is attached to."""
        if any(isinstance(one, Adapter) for one in flat_layers(self.layer)):
            raise AttachError(
                f"{what} is attached to a loss of its own, whose live arguments would belong to "
                f"two models. Pass the model without it: detach({self.layer.name})."
            )

    def check_is_built(self, what: str) -> None:
        """Raise if the layer would make its weights in the compiled step."""
        for one in flat_layers(self.layer):
            if not one.built and type(one).build is not keras.Layer.build:
                raise AttachError(
                    f"{what} is not built: {one.name!r} has no weights yet, and would make them in "
                    "the compiled step. Build it before fit: layer.build(input_shape), or call it "
                    "on an example."
                )


@keras.saving.register_keras_serializable(package="lossargs")
class SeedGeneratorAdapter(Adapter):
    """A random generator: new draws in each step of training."""

    adapts = keras.random.SeedGenerator

    def __init__(self, generator: keras.random.SeedGenerator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = generator

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return self.generator

    def save_own_variables(self, store: Any) -> None:
        """Save the state, which Keras does not save."""
        store["state"] = keras.ops.convert_to_numpy(self.generator.state.value)

    def load_own_variables(self, store: Any) -> None:
        """Load the state."""
        self.generator.state.assign(store["state"])
