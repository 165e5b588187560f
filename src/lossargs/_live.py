"""Live arguments: the base class of all kinds, and their values in a step."""

import dataclasses
import inspect
import weakref
from typing import Any, ClassVar

import keras

from lossargs._errors import ArgumentError, SavingError, listed
from lossargs._keras import (
    ReadScope,
    Step,
    after_earlier_calls,
    alias,
    flat_layers,
    get_tensor_attr,
    in_sharing_scope,
    set_tensor_attr,
)
from lossargs._serialization import load_object
from lossargs._values import format_value, live_types, map_leaves

_ATTRIBUTE = "_lossargs_steps"


@dataclasses.dataclass(frozen=True)
class Untracked:
    """Holds what Keras should not track as a part of a layer."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Attribute:
    """Represents an object, e.g. a layer, that is an attribute of an adapter."""

    name: str


class Adapter(keras.Layer):
    """Base class for kinds of live arguments.

    An adapter is a Keras layer. Create its weights in `__init__` with `add_weight`. The model
    saves, distributes and trains them. Pass an adapter as an argument of a loss. Or set `adapts` to
    a type: then instances of this type can be passed.

    Args:
        tensor: The symbolic tensor whose values the method `value` receives in each step, if any.
        **kwargs: Arguments of `keras.layers.Layer`.

    Raises:
        ArgumentError: `tensor` is not a symbolic tensor.

    Attributes:
        adapts: A type. Binding an instance of it creates the adapter `cls(instance)`.
        reads_tensor: Whether `value` needs a tensor of the batch: the constructor argument
            `tensor`, or the argument of the `LossArgs` call.
        shape: The shape of the value, if it is known. A scalar, `()`, is logged.

    Examples:
        An exponential moving average of the mean of a tensor:

        >>> import keras
        >>> from lossargs import Adapter, with_args
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
        >>> @with_args
        ... def policy_loss(y_true, y_pred, *, baseline):
        ...     return -y_pred * (y_true - baseline)
        >>> policy_loss(baseline=MovingAverage(rewards, decay=0.99))
        policy_loss(baseline=<MovingAverage>)
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
            _adapters.pop(adapted, None)  # the last definition counts, also in order
            _adapters[adapted] = cls
            live_types.append(adapted)

    def __init__(self, tensor: Any = None, **kwargs: Any) -> None:
        if tensor is not None and not isinstance(tensor, keras.KerasTensor):
            raise ArgumentError(
                f"{type(self).__name__} was given {format_value(tensor)}, and reads a symbolic "
                "tensor. Give the output of a layer or a keras.Input. Or give nothing here, and "
                "the tensor in the call of LossArgs."
            )
        # No mixed policy: live values keep their precision.
        super().__init__(**{"dtype": keras.config.floatx(), **kwargs})
        self.tensor = tensor
        self.adapted = Untracked(None)
        self.built = True

    def read(self, tensor: Any) -> Any:
        """Return the input of `value` and `finish_step`; called once per forward pass."""
        return tensor

    def value(self, tensor: Any, training: bool) -> Any:
        """Return the value for the loss. Called once per step.

        In `fit`, the evaluation of the loss calls it. In your own loop, the forward pass does. If
        `training`, assign state here that the value depends on. Assign other state in
        `finish_step`.

        Args:
            tensor: The result of `read`: by default the values of the tensor that this adapter
                reads, or `None`.
            training: Whether this is a training step, which may change the state.

        Returns:
            A tensor, a nested structure of tensors, or an object.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define `value`.")

    def finish_step(self, tensor: Any) -> None:
        """Advance the state after a training step; `tensor` is the result of `read`."""

    @classmethod
    def of(cls, value: Any) -> "Adapter":
        """Return the adapter of a value of the type `adapts`."""
        adapter = cls._of_value.get(id(value))
        if type(adapter) is not cls or adapter.adapted.value is not value:
            adapter = cls._of_value[id(value)] = cls(value)
            adapter.adapted = Untracked(value)
        return adapter

    def for_another_layer(self) -> "Adapter":
        """Return an adapter with the state of this one, for another layer."""
        return self

    @property
    def variable(self) -> Any:
        """The `keras.Variable` that a user may assign, or `None`."""
        return None

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor that Keras knows.

        Raises:
            SavingError: `__init__` has others, and the class does not override `get_config`.
        """
        _, *parameters = inspect.signature(type(self).__init__).parameters.values()
        if self.adapts is not None and parameters:
            is_optional = parameters[0].default is not inspect.Parameter.empty
            if is_optional or hasattr(self.adapted.value, "get_config"):
                del parameters[0]  # the value that is adapted
        free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        own = [p.name for p in parameters if p.name != "tensor" and p.kind not in free]
        if own and type(self).get_config is Adapter.get_config:
            raise SavingError(
                f"{type(self).__name__} has no get_config, and would load without {listed(own)}. "
                f"Define it: return {{**super().get_config(), {own[0]!r}: self.{own[0]}}}."
            )
        config: dict[str, Any] = super().get_config()
        return config

    # A method: `model.save` looks for weights in the values of all properties.
    def get_bound_value(self) -> Any:
        """Return the value that a loaded loss holds for this adapter."""
        return self

    def __str__(self) -> str:
        return f"<{type(self).__name__}>"


_adapters: dict[type, type[Adapter]] = {}
live_types.append(Adapter)


def adapter_of(value: Any) -> Adapter:
    """Return the adapter of a live value."""
    if isinstance(value, Adapter):
        return value
    # The adapter that was defined last counts, if those of a class and its base class fit.
    kind = next(kind for kind in reversed(_adapters) if isinstance(value, kind))
    return _adapters[kind].of(value)


def encode_live(value: Any) -> Any:
    """Return the Keras object that is saved for a live value: the value itself, or its adapter."""
    saved = value if hasattr(value, "get_config") else adapter_of(value)
    if in_sharing_scope():
        # Keras marks a shared object in its first config when it meets the object a second time.
        # That is too late if the first config was copied.
        keras.saving.serialize_keras_object(saved)
    return saved


def decode_live(config: Any) -> Any:
    """Return the live value that the config of a Keras object describes."""
    graph: Any = config.get("config")
    if isinstance(graph, dict) and "output_layers" in graph:
        config = {**config, "config": after_earlier_calls(graph)}
    loaded = load_object(config, *live_types)
    return loaded.get_bound_value() if isinstance(loaded, Adapter) else loaded


@dataclasses.dataclass
class StepValues:
    """The live values of one forward pass, from a `LossArgs` layer to its losses.

    Python's garbage collector does not see what a TensorFlow tensor carries. So layer, losses and
    model are held weakly.
    """

    reference: Any  # to the layer
    read: list[Any]  # by each adapter of the layer
    given: dict[str, Any]  # arguments in the call of the layer, by name
    step: Step | None  # `None` in a user's own loop
    training: bool
    values: list[Any] | None = None  # of each adapter, once they are computed
    # Variables with the values that `stateless_call` gave them in the forward pass.
    forward_values: list[tuple[keras.Variable, Any]] = dataclasses.field(default_factory=list)

    def layer(self) -> Any:
        """Return the layer, or `None` if it is gone."""
        # `torch.compile` replaces a weak reference by its object.
        is_weak = isinstance(self.reference, weakref.ReferenceType)
        return self.reference() if is_weak else self.reference

    def losses(self) -> list[Any]:
        """Return the losses that receive these values."""
        layer = self.layer()
        return [] if layer is None else list(layer.get_losses())

    def state(self) -> list[keras.Variable]:
        """Return the variables of the objects, e.g. layers, that the losses receive."""
        self.compute_once()
        pairs = zip(self.layer().adapters, self.values or (), strict=True)
        holders = [adapter for adapter, value in pairs if isinstance(value, Attribute)]
        holders += [one for one in self.given.values() if isinstance(one, keras.Layer)]
        return [variable for one in holders for variable in one.variables]

    def args_of(self, loss: Any) -> dict[str, Any]:
        """Return the arguments of one of these losses."""
        self.compute_once()
        by_adapter = self.by_adapter()

        def value(leaf: Any) -> Any:
            return by_adapter[leaf] if isinstance(leaf, Adapter) else leaf

        trees = self.layer().get_losses()[loss]
        given = {name: one for name, one in self.given.items() if loss.takes(name)}
        live = {name: map_leaves(tree, value) for name, tree in trees.items()}
        return {**given, **live}

    def by_adapter(self) -> dict[Adapter, Any]:
        """Return the computed values."""
        pairs = zip(self.layer().adapters, self.values or (), strict=True)
        return {one: getattr(one, v.name) if isinstance(v, Attribute) else v for one, v in pairs}

    def compute_once(self) -> None:
        """Compute the values of this step, unless they are computed."""
        if self.values is not None:
            return
        pairs = list(zip(self.layer().adapters, self.read, strict=True))
        with ReadScope(copies=True):
            self.values = [_without_objects(a, a.value(one, self.training)) for a, one in pairs]

    def finish_step(self) -> None:
        """Advance the state of the adapters."""
        for adapter, one in zip(self.layer().adapters, self.read, strict=True):
            adapter.finish_step(one)


def _without_objects(adapter: Adapter, value: Any) -> Any:
    """Return a value of an adapter; of an object the attribute that holds it.

    An object may hold the model, which a tensor must not.
    """
    if value is None or keras.ops.is_tensor(value):
        return value
    attributes = {**vars(adapter), **getattr(adapter, "_modules", {})}  # layers, on PyTorch
    return next((Attribute(name) for name, one in attributes.items() if one is value), value)


def set_step_values(y_pred: Any, step_values: StepValues) -> Any:
    """Return the predictions in a new tensor that carries the values of a step.

    The loss receives as `y_pred` the object that the last layer of the model returns. It is a new
    tensor, since a layer may return its input, which the user holds.
    """
    others = get_step_values(y_pred)
    y_pred = alias(y_pred)
    set_tensor_attr(y_pred, _ATTRIBUTE, [*others, step_values])
    return y_pred


def get_step_values(y_pred: Any) -> list[StepValues]:
    """Return the values that predictions carry, by each `LossArgs` layer that they passed."""
    return get_tensor_attr(y_pred, _ATTRIBUTE) or []


def layers_of(model: Any) -> list[Any]:
    """Return the `LossArgs` layers of a model; none of `None`."""
    layers = [] if model is None else flat_layers(model)
    return [layer for layer in layers if hasattr(layer, "get_losses")]
