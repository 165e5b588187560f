"""Scopes in which variables are read and assigned, and private attributes of layers."""

import functools
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import keras
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope


def variables_can_be_assigned() -> bool:
    """Return whether a variable assigned here keeps its value, and no tracer."""
    return keras.backend.backend() != "jax" or bool(in_stateless_scope())


def is_compiled_by_torch() -> bool:
    """Return whether `torch.compile` traces this code."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that `torch.compile` calls as it is."""
    return sys.modules["torch"].compiler.disable(function)  # type: ignore[no-any-return]


@functools.cache
def define_copy_for_torch() -> Any:
    """Define an operator that copies a tensor also under `torch.compile`, before the first trace.

    The compiler removes other copies. The backward pass would then read what the loss assigned.

    Returns:
        The library with the operator, which lives as long as the library.
    """
    if keras.backend.backend() != "torch":
        return None
    torch = sys.modules["torch"]
    library = torch.library.Library("lossargs", "DEF")  # faster to call than `custom_op`
    library.define("copy(Tensor tensor) -> Tensor")
    library.impl("copy", torch.clone, "CompositeExplicitAutograd")
    torch.library.register_fake("lossargs::copy", torch.empty_like, lib=library)
    return library


def _copy(variable: keras.Variable) -> Any:
    """Return a copy of the value of a variable."""
    if is_compiled_by_torch() and not variable.trainable:  # pragma: no cover
        return sys.modules["torch"].ops.lossargs.copy(variable._value)
    return keras.ops.copy(variable._value)


def _read_before_update(value: Any) -> Any:
    """Return the value of a variable, such that its gradient depends on it.

    TensorFlow's graph optimizer lets the update of a variable overtake a read whose value the
    gradient does not need. A dependency of the gradient on the value keeps the order.
    """

    def gradient(*upstream: Any) -> Any:
        (slope,) = upstream
        is_finite: Any = keras.ops.cast(keras.ops.isfinite(value), slope.dtype)
        return slope + 0 * is_finite

    return value, gradient


class ReadScope(keras.StatelessScope):
    """A scope that notes which variables are read or assigned, and changes little else.

    Args:
        values: Pairs of variables and values that they have in this scope.
        copies: Whether to copy all values that are read, so that a later update of the optimizer
            does not change them. The state that a loss assigns is copied in any case.
        dropped: The `id`s of variables whose updates are discarded.
    """

    def __init__(
        self,
        values: Iterable[tuple[keras.Variable, Any]] = (),
        *,
        copies: bool = False,
        dropped: Collection[int] = (),
    ) -> None:
        super().__init__(list(values))
        self.variables: dict[int, keras.Variable] = {}  # by `id`
        self.assigned: dict[int, keras.Variable] = {}
        self._backend = keras.backend.backend()
        self._copies = copies
        self._assigning = False
        self._dropped = dropped

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value of the surrounding scope; called by a variable that is read."""
        self.variables[id(variable)] = variable
        value, around = super().get_current_value(variable), self.original_scope
        if value is None and around:
            value = around.get_current_value(variable)
        if value is None and variable._value is not None:
            if self._backend == "tensorflow" and variable.trainable:
                read: Any = keras.ops.custom_gradient(_read_before_update)
                value = read(keras.ops.convert_to_tensor(variable._value))
            elif self._copies_of(variable):
                value = _copy(variable)
        return value

    def _copies_of(self, variable: keras.Variable) -> bool:
        # PyTorch assigns in place, also to what was saved for the backward pass.
        is_state = self._backend == "torch" and not variable.trainable
        return not self._assigning and (is_state or (self._copies and self._backend != "jax"))

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Pass an update on; called by a variable that is assigned."""
        variable, value = update
        self.variables[id(variable)] = self.assigned[id(variable)] = variable
        if id(variable) in self._dropped:
            super().add_update(update)
            return
        self._assigning = True  # PyTorch assigns to the value that it reads
        if self.original_scope:
            self.original_scope.add_update(update)
        else:
            variable._direct_assign(value)
        self._assigning = False


def alias(tensor: Any) -> Any:
    """Return another tensor object of the same values, with the same mask."""
    is_torch = keras.backend.backend() == "torch"
    other = tensor.view_as(tensor) if is_torch else keras.ops.copy(tensor)
    mask = get_keras_mask(tensor)
    if mask is not None:
        set_keras_mask(other, mask)
    return other


def values_in_scope(variables: Iterable[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
    """Return the variables that the stateless scope overrides, with their values in it."""
    scope = get_stateless_scope()
    pairs = [(variable, scope and scope.get_current_value(variable)) for variable in variables]
    return [(variable, value) for variable, value in pairs if value is not None]


class Sandbox(keras.StatelessScope):
    """A scope whose updates are dropped, and that reads variables as the scope around it."""

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value of a variable that is read."""
        value = super().get_current_value(variable)
        around = self.original_scope
        return around.get_current_value(variable) if value is None and around else value


class LayerOfOthers(keras.Layer):
    """A layer that calls other layers of its model again."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._convert_input_args = False  # each layer that it calls does that

    def _clear_losses(self) -> None:
        """Keep the losses, which Keras drops before a call: they belong to other calls."""


def allow_any_arguments(layer: keras.Layer) -> None:
    """Let a layer be called with positional arguments that are not tensors, e.g. lists."""
    layer._allow_non_tensor_positional_args = True


def is_random_state(variable: keras.Variable) -> bool:
    """Return whether a variable is the state of a `keras.random.SeedGenerator`."""
    return bool(variable.name == "seed_generator_state")


def is_autocast(variable: keras.Variable) -> bool:
    """Return whether a variable is read in the precision of the layer that reads it."""
    return bool(variable._autocast)


def in_sharing_scope() -> bool:
    """Return whether Keras writes a config in which a shared object stays one object."""
    return get_global_attribute("shared_objects/id_to_config_map") is not None


def in_legacy_saving() -> bool:
    """Return whether a model is saved in the legacy HDF5 format."""
    return bool(get_global_attribute("use_legacy_config"))


def flat_layers(model: keras.Layer) -> list[keras.Layer]:
    """Return a model and all its layers, at any depth."""
    return list(model._flatten_layers())
