"""Values of arguments: bind, convert to tensors, compare and format them."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping
from numbers import Number
from typing import Any, Self

import keras
import numpy as np

from lossargs._errors import ArgumentError

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_DEEPEST = 32  # nested containers; Keras's serialization needs ten calls for each
_NUMBERS = "?bBhHiIlLqQefdFD"  # characters of dtypes
_USER_DEFINED = 2  # `dtype.isbuiltin` of a dtype of ml_dtypes, e.g. bfloat16

# Holders of variables that the model would not know, and the values to give instead.
_INSTEAD: dict[type, tuple[str, str]] = {
    keras.Metric: (
        "a metric",
        (
            "which Keras would neither reset nor log here. Pass a layer that holds the metric. Or "
            "pass a number that you assign: keras.Variable(0.0, trainable=False)."
        ),
    ),
    keras.Optimizer: (
        "an optimizer",
        (
            "whose variables are created by compile. Pass the LearningRateSchedule. Or pass a "
            "number that a callback assigns: keras.Variable(0.0, trainable=False)."
        ),
    ),
}
_VARIABLES = {"Variable", "Parameter"}  # classes of the backends, and of Flax

# Objects of these classes that are equal compute the same.
_COMPARABLE = (keras.losses.Loss, keras.optimizers.schedules.LearningRateSchedule)

# Types whose values a model can follow; `lossargs.Adapter` adds to them.
live_types: list[type] = []


@keras.saving.register_keras_serializable(package="lossargs")
@dataclasses.dataclass(frozen=True)
class TensorRef:
    """Represents a value that each step fills in, by its index in a list."""

    index: int

    def get_config(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, int]) -> Self:
        return cls(**config)


def is_live(value: Any) -> bool:
    """Return whether the value belongs to a model and can change between steps."""
    return isinstance(value, tuple(live_types))


def is_live_loss(value: Any) -> bool:
    """Return whether the value is a loss that holds a live value."""
    return isinstance(value, keras.losses.Loss) and getattr(value, "holds_live", False)


# `keras.tree` does not fit: on PyTorch it cannot order keys of several types, and it keeps the
# classes of containers, which files do not.
def map_leaves(
    value: Any, convert: Callable[[Any], Any], where: str = "A value", depth: int = 0
) -> Any:
    """Return the value in new containers, with each leaf and each key converted."""
    if not isinstance(value, (dict, list, tuple)):
        return convert(value)
    if depth > _DEEPEST:
        raise ArgumentError(
            f"{where} is nested more than {_DEEPEST} deep, or in itself. Give a flatter value."
        )
    if isinstance(value, dict):
        return {convert(k): map_leaves(v, convert, where, depth + 1) for k, v in value.items()}
    items = [map_leaves(item, convert, where, depth + 1) for item in value]
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def leaves(value: Any, where: str) -> list[Any]:
    """Return the leaves and the keys of a value."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf  # a namedtuple may check its items

    map_leaves(value, note, where)
    return found


def live_leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the live values in a bound value, each with its place: `""`, `"_0"`, `"_key"`."""
    if is_live(value):
        yield "", value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from ((f"_{key}{place}", leaf) for place, leaf in live_leaves(item))


def bind_value(value: Any, where: str) -> Any:
    """Return a copy of a value, in which tensors are arrays and NumPy scalars Python numbers.

    Live values stay as they are. `where` names the argument in messages: `'x' of f()`.

    Raises:
        ArgumentError: The value is neither live nor a constant.
    """
    return map_leaves(value, functools.partial(_bind_leaf, where=where), where)


# In this order: a variable is also an array, and a live value or a Keras loss can be hashed.
def _bind_leaf(value: Any, where: str) -> Any:
    if type(value) in _ATOMS or is_live(value):
        return value
    is_variable = not _VARIABLES.isdisjoint(cls.__name__ for cls in type(value).__mro__)
    for cls, (kind, instead) in _INSTEAD.items():
        if isinstance(value, cls):
            raise ArgumentError(f"Cannot bind {where} to {kind}, {type(value).__name__}, {instead}")
    if isinstance(value, Iterator) or is_variable or getattr(value, "requires_grad", False):
        raise ArgumentError(
            f"Cannot bind {where} to a {type(value).__name__}: its current value would be baked "
            "into the compiled step. Give a keras.Variable, list(iterator), or a tensor at the "
            "call: loss(y_true, y_pred, name=...)."
        )
    if isinstance(value, keras.losses.Loss):
        return value
    if isinstance(value, np.generic) or hasattr(value, "__array__") or keras.ops.is_tensor(value):
        plain = _plain(value, where)
        return np.array(plain, order="C") if isinstance(plain, np.ndarray) else plain
    try:
        hash(value)
    except TypeError:
        raise ArgumentError(
            f"{where} is a {type(value).__name__}, which can change after it was bound. Give a "
            "number, a string, an array, or a list, tuple or dict of these."
        ) from None
    return value


def _plain(value: Any, where: str) -> Any:
    """Return a NumPy scalar as a Python number, an array or tensor as an array of numbers."""
    if isinstance(value, (np.str_, np.bytes_)):
        return value.item()
    is_scalar = isinstance(value, np.generic)
    is_masked = isinstance(value, np.ma.MaskedArray)
    if not (is_scalar or is_masked) and keras.ops.is_tensor(value):
        try:
            value = keras.ops.convert_to_numpy(value)
        except Exception as error:
            raise ArgumentError(
                f"{where} is a tensor of a step that is being traced ({type(value).__name__}). "
                "Give it at the call: loss(y_true, y_pred, name=...). If you compiled with the "
                "factory itself, call it: loss=factory(...)."
            ) from error
    array = without_ml_dtypes(np.asarray(value))
    if is_masked or array.dtype.char not in _NUMBERS:
        raise ArgumentError(
            f"{where} is {'a masked array' if is_masked else f'an array of {array.dtype}'}, which "
            "no backend can compute with. Give numbers, e.g. array.astype('float32'); text as a "
            "str; a mask as an argument."
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array.item() if is_scalar else array


def without_ml_dtypes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array of bfloat16 or float8 as float32, which has the same values."""
    return array.astype("float32") if array.dtype.isbuiltin == _USER_DEFINED else array


def to_tensors(value: Any, dtype: str, where: str) -> Any:
    """Return an argument for the user's function: arrays as tensors, floating-point ones cast."""

    def convert(leaf: Any) -> Any:
        if type(leaf) in _ATOMS:
            return leaf
        if isinstance(leaf, (np.ndarray, np.generic)):
            leaf = _plain(leaf, repr(where))
            if not isinstance(leaf, np.ndarray):
                return leaf
        elif not isinstance(leaf, keras.Variable) and not keras.ops.is_tensor(leaf):
            return leaf
        own = keras.backend.standardize_dtype(leaf.dtype)
        wanted = dtype if keras.backend.is_float_dtype(own) else None
        if wanted in (own, None) and not isinstance(leaf, (np.ndarray, keras.Variable)):
            return leaf
        try:
            return keras.ops.convert_to_tensor(leaf, dtype=wanted)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"{where!r} is an array of {own}, of which {keras.backend.backend()} has no "
                "tensors. Give another dtype, e.g. array.astype('int64')."
            ) from error

    return map_leaves(value, convert, repr(where))


def readonly_copy(value: Any) -> Any:
    """Return the value for `loss.args`: new containers, read-only arrays."""
    # `broadcast_to` returns a read-only view.
    return map_leaves(
        value, lambda v: np.broadcast_to(v, v.shape) if isinstance(v, np.ndarray) else v
    )


class _Pickler(pickle.Pickler):
    def persistent_id(self, part: Any) -> int | None:
        return id(part) if is_live(part) or isinstance(part, keras.losses.Loss) else None


def _pickled(value: Any) -> bytes | None:
    """Return the pickle of an object, or `None` if it has none."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.fast = True  # else it depends on which equal parts are one object
    with contextlib.suppress(Exception):
        pickler.dump(value)
        return file.getvalue()
    return None


def cache_key(value: Any) -> Hashable:
    """Return a key of a bound value that is equal for two values only if they compute the same."""
    cls: Any = type(value)
    if is_live(value) and not (isinstance(value, _COMPARABLE) and cls.__hash__):
        return cls, id(value)  # identity: the current value may change
    if isinstance(value, dict):
        return dict, tuple((cache_key(k), cache_key(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return cls, tuple(map(cache_key, value))
    if isinstance(value, np.ndarray):
        return cls, value.dtype, value.shape, hashlib.blake2b(value.tobytes()).digest()
    if cls in (float, complex):
        return cls, repr(value)  # 0.0 and -0.0 are equal, NaN is not
    if cls in _ATOMS or cls.__eq__ is object.__eq__ or isinstance(value, _COMPARABLE):
        return cls, value
    if hasattr(cls, "cache_key"):
        return cls, value.cache_key()
    # `P(1) == P(True)` for a dataclass P, but their pickles differ.
    return cls, _pickled(value) or id(value)


def describe_lists(args: Mapping[str, Any]) -> str:
    """Return a sentence about the arguments that are lists or tuples of numbers, or `""`."""
    lists = {n: keras.tree.flatten(v) for n, v in args.items() if isinstance(v, (list, tuple))}
    numbers = [n for n, v in lists.items() if v and all(isinstance(one, Number) for one in v)]
    kinds = ", ".join(f"`{n}` is a {type(args[n]).__name__}" for n in numbers)
    return kinds and f"{kinds}; if the function needs an array, bind `numpy.array(...)`."


class _Text(str):
    """Has itself as its `repr`, in containers too."""

    __slots__ = ()
    __repr__ = str.__str__


def format_value(value: Any) -> str:
    """Return the value for `repr`; a large array by its dtype and shape."""
    return repr(map_leaves(value, lambda leaf: _Text(_format_leaf(leaf))))


def _format_leaf(value: Any) -> str:
    if isinstance(value, np.ndarray):
        name, is_large = value.dtype.name, value.size > 8
        return f"<array {name} {value.shape}>" if is_large else f"array({value.tolist()}, {name})"
    if isinstance(value, keras.Variable):
        return f"<{'trainable ' * value.trainable}variable {value.name!r}>"
    if isinstance(value, keras.KerasTensor):
        return f"<symbolic tensor {value.name!r} {value.shape}>"
    if isinstance(value, keras.Layer):
        return str(value)
    cls: Any = type(value)
    return f"<{cls.__name__}>" if cls.__repr__ is object.__repr__ else repr(value)
