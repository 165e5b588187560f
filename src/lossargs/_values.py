"""Values of arguments: bind, convert to tensors, compare and format them."""

import contextlib
import dataclasses
import functools
import hashlib
import pickle
from collections.abc import Callable, Hashable, Iterator, Mapping
from numbers import Number
from typing import Any, Self

import keras
import numpy as np

from lossargs._errors import ArgumentError

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_DEEPEST = 32  # nested containers; Keras's serialization needs ten calls for each

_NO_NUMBERS = "SUMm"  # kinds of dtypes: text, dates and times
_USER_DEFINED = 2  # `dtype.isbuiltin` of a dtype of ml_dtypes, e.g. bfloat16

# They hold variables that the model does not know.
_INSTEAD = {
    keras.Metric: (
        "which Keras would neither reset nor log here. Give a layer that holds the metric, and "
        "update it in the loss. Or give its number: a keras.Variable that you assign."
    ),
    keras.Optimizer: (
        "whose variables belong to compile. Give what the loss reads of it: a "
        "LearningRateSchedule, or a keras.Variable that you assign in a callback."
    ),
}
_VARIABLES = ("tensorflow Variable", "torch Parameter", "flax Variable")

# Types whose values change between steps; `lossargs.Adapter` adds to them.
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


def live_leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the live values in a bound value, each with its place: `""`, `"_0"`, `"_key"`."""
    if is_live(value):
        yield "", value
    elif isinstance(value, dict) or type(value) in (list, tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from ((f"_{key}{place}", leaf) for place, leaf in live_leaves(item))


def map_leaves(
    value: Any, convert: Callable[[Any], Any], where: str = "A value", depth: int = 0
) -> Any:
    """Return the value in new containers, with each leaf and each key converted."""
    if not isinstance(value, (dict, list)) and type(value) is not tuple:
        return convert(value)
    if depth > _DEEPEST:
        raise ArgumentError(
            f"{where} is nested more than {_DEEPEST} deep, or in itself. Give a flatter value."
        )
    if isinstance(value, dict):
        return {convert(k): map_leaves(v, convert, where, depth + 1) for k, v in value.items()}
    items = [map_leaves(item, convert, where, depth + 1) for item in value]
    return tuple(items) if type(value) is tuple else items


def bind_value(value: Any, where: str) -> Any:
    """Return a copy of a bound value: scalars as Python's, tensors as arrays, live values as such.

    Raises:
        ArgumentError: The value is neither live nor a constant.
    """
    return map_leaves(value, functools.partial(_bind_leaf, where=where), where)


def _bind_leaf(value: Any, where: str) -> Any:
    if type(value) in _ATOMS or is_live(value):
        return value
    for cls, instead in _INSTEAD.items():
        if isinstance(value, cls):
            what = f"{'an' if cls is keras.Optimizer else 'a'} {cls.__name__.lower()}"
            raise ArgumentError(f"{where} is {what}, {type(value).__name__}, {instead}")
    if kind := _changing_kind(value):
        raise ArgumentError(
            f"{where} is a {kind}: bound as a constant, it would keep its current value in the "
            "compiled step. Give a keras.Variable. Or give the value with the batch, "
            "fit(..., sample_weight={name: values}), or at the call, loss(y_true, y_pred, name=...)"
        )
    if isinstance(value, keras.losses.Loss):
        return value
    if not isinstance(value, (np.ndarray, np.generic)) and keras.ops.is_tensor(value):
        value = _array_of_tensor(value, where)
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        value = _plain(value, where)
        is_array = isinstance(value, np.ndarray)
        return np.array(value, value.dtype.newbyteorder("="), order="C") if is_array else value
    _check_parts(value, where)
    try:
        hash(value)
    except TypeError:
        raise ArgumentError(
            f"{where} is a {type(value).__name__}, which can change after it was bound and cannot "
            "be compared. Give a number, a string, an array, a list, a tuple or a dict."
        ) from None
    return value


def _check_parts(value: Any, where: str) -> None:
    """Raise if an object that is not copied holds a live value."""
    parts, seen = [value], {}
    for part in parts:  # grows
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if is_live(part) or is_live_loss(part):
            raise ArgumentError(
                f"{where} is a {type(value).__name__} that holds {format_value(part)}. The "
                "model finds live values and losses in tuples, lists and dicts only. Give one of "
                "these."
            )
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, (tuple, list, set, frozenset)):
            parts += part
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            parts += [getattr(part, field.name, None) for field in dataclasses.fields(part)]


def _plain(value: Any, where: str) -> Any:
    """Return a scalar of NumPy as one of Python, and others as an array of NumPy's dtypes."""
    if isinstance(value, (np.str_, np.bytes_)):
        return value[:]  # arrays drop zeros at the end
    array = np.asanyarray(value)
    if isinstance(array, np.ma.MaskedArray):
        raise ArgumentError(
            f"{where} is a masked array, and no backend has a tensor with a mask. Give its data "
            "and its mask as two arguments."
        )
    if array.dtype.kind in _NO_NUMBERS:
        return array
    try:
        keras.backend.standardize_dtype(array.dtype.name)
    except ValueError:
        raise ArgumentError(
            f"{where} is an array of {array.dtype}, which no backend can compute with. Give it a "
            "numeric dtype, e.g. `array.astype('float32')`."
        ) from None
    array = without_ml_dtypes(array)
    return array.item() if isinstance(value, np.generic) else array


def without_ml_dtypes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return an array of bfloat16 or float8 as float32, which has the same values."""
    return array.astype("float32") if array.dtype.isbuiltin == _USER_DEFINED else array


def _array_of_tensor(value: Any, where: str) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(keras.ops.convert_to_numpy(value))
    except Exception as error:
        raise ArgumentError(
            f"{where} is a tensor of a step that is being traced ({type(value).__name__}) and has "
            "no value yet. Give it at the call, loss(y_true, y_pred, name=...). If you compiled "
            "with the factory itself, call it: loss=factory(...)."
        ) from error
    if array.dtype.kind in "OSU":
        raise ArgumentError(
            f"{where} is a tensor of strings. Give the text as a str or as a NumPy array of str."
        )
    return array


def _changing_kind(value: Any) -> str | None:
    """Return the kind of a value that changes between steps and cannot be bound, or `None`."""
    if isinstance(value, Iterator):
        return type(value).__name__
    if getattr(value, "requires_grad", False) and type(value).__name__ != "Parameter":
        return "torch tensor that requires a gradient"
    kinds = (f"{c.__module__.partition('.')[0]} {c.__name__}" for c in type(value).__mro__)
    return next((kind for kind in kinds if kind in _VARIABLES), None)


def to_tensors(value: Any, dtype: str, where: str) -> Any:
    """Return the value for the user's function: arrays as tensors, those of floats of `dtype`."""

    def convert(leaf: Any) -> Any:
        if type(leaf) in _ATOMS:
            return leaf
        if isinstance(leaf, (np.ndarray, np.generic)):
            leaf = _plain(leaf, repr(where))
            if not isinstance(leaf, np.ndarray) or leaf.dtype.kind in _NO_NUMBERS:
                return leaf
        elif not isinstance(leaf, keras.Variable) and not keras.ops.is_tensor(leaf):
            return leaf
        own = keras.backend.standardize_dtype(leaf.dtype)
        try:
            is_float = keras.backend.is_float_dtype(own)
            return keras.ops.convert_to_tensor(leaf, dtype=dtype if is_float else None)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"{where!r} is an array of {own}, of which {keras.backend.backend()} has no "
                "tensors. Give it another dtype, e.g. `array.astype('int64')`."
            ) from error

    return map_leaves(value, convert, repr(where))


def readonly_copy(value: Any) -> Any:
    """Return the value for `loss.args`: new containers, read-only arrays."""

    def readonly(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = leaf.view()
            leaf.flags.writeable = False
        return leaf

    return map_leaves(value, readonly)


def cache_key(value: Any) -> Hashable:
    """Return a key of a bound value that is equal for two values only if they compute the same."""
    cls: Any = type(value)
    if cls in (float, complex):
        return cls, repr(value)
    if is_live(value):
        return cls, id(value)  # the current value of a variable does not count
    if cls is np.ndarray:
        return cls, value.dtype, value.shape, hashlib.blake2b(value.tobytes()).digest()
    if isinstance(value, dict):
        return dict, tuple((cache_key(k), cache_key(v)) for k, v in value.items())
    if cls in (list, tuple):
        return cls, tuple(cache_key(item) for item in value)
    if cls in _ATOMS or cls.__eq__ is object.__eq__ or isinstance(value, keras.losses.Loss):
        return cls, value  # equal only if the same
    with contextlib.suppress(Exception):  # it cannot be pickled
        return cls, value, pickle.dumps(value)
    return cls, id(value)


def describe_lists(args: Mapping[str, Any]) -> str:
    """Return a sentence about the arguments that are lists or tuples of numbers, or `""`."""
    lists = {n: keras.tree.flatten(v) for n, v in args.items() if isinstance(v, (list, tuple))}
    numbers = [n for n, v in lists.items() if v and all(isinstance(one, Number) for one in v)]
    kinds = ", ".join(f"`{n}` is a {type(args[n]).__name__}" for n in numbers)
    return kinds and f"{kinds}; if the function needs an array, bind `numpy.array(...)`."


def format_value(value: Any) -> str:
    """Return the value for `repr`; a large array by its dtype and shape."""
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{format_value(k)}: {format_value(v)}" for k, v in value.items()) + "}"
        )
    if type(value) is list:
        return "[" + ", ".join(map(format_value, value)) + "]"
    if type(value) is tuple:
        return "(" + ", ".join(map(format_value, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, np.ndarray):
        large = value.size > 8
        name = value.dtype.name
        return f"<array {name} {value.shape}>" if large else f"array({value.tolist()}, {name})"
    if isinstance(value, keras.Variable):
        return f"<{'trainable ' * value.trainable}variable {value.name!r}>"
    if isinstance(value, keras.KerasTensor):
        return f"<symbolic tensor {value.name!r} {value.shape}>"
    if is_live(value) and not isinstance(value, keras.Layer):
        return f"<{type(value).__name__}>"
    return str(value) if is_live(value) else repr(value)
