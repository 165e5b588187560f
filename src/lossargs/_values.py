"""Values of arguments: bind, compare, convert, show and save them."""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
import textwrap
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from numbers import Number
from typing import Any, Self

import keras
import numpy as np

from lossargs._errors import ArgumentError, LossArgsError, SavingError

_PLAIN = (type(None), bool, int, str)  # JSON keeps them exactly
_BEYOND = 10**4300  # Python does not print longer integers
_DEEPEST = 32  # nested containers; Keras's serialization needs ten calls for each
_ATOMS = (*_PLAIN, float, complex, bytes)

_NO_NUMBERS = "SUMm"  # kinds of dtypes: text, dates and times
_USER_DEFINED = 2  # `dtype.isbuiltin` of a dtype of ml_dtypes, e.g. bfloat16
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

# They hold variables or are used up. A constant is read once, when the step is traced.
_REFUSED = {
    "a layer": keras.Layer,
    "a metric": keras.Metric,
    "an optimizer": keras.Optimizer,
    "a seed generator": keras.random.SeedGenerator,
    "an iterator": Iterator,
}

# Types whose values change between steps; `lossargs.Adapter` adds to them.
live_types: list[type] = []


@keras.saving.register_keras_serializable(package="lossargs")
@dataclasses.dataclass(frozen=True)
class Slot:
    """Represents a value that each step fills in, by its index in a list."""

    index: int

    def get_config(self) -> dict[str, int]:
        """Return the config for Keras."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, int]) -> Self:
        """Make a slot from its config."""
        return cls(**config)


def is_live(value: Any) -> bool:
    """Return whether the value belongs to a model and can change between steps."""
    return isinstance(value, tuple(live_types))


def _is_live_loss(value: Any) -> bool:
    return isinstance(value, keras.losses.Loss) and getattr(value, "holds_live", False)


def live_leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the live values in a bound value, each with its place: `""`, `"_0"`, `"_key"`."""
    if is_live(value):
        yield "", value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from ((f"_{key}{place}", leaf) for place, leaf in live_leaves(item))
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from ((f"_{number}{place}", leaf) for place, leaf in live_leaves(item))


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A copy of a tensor of the backend; torch tensors can change in place."""

    array: np.ndarray[Any, Any]


def take(value: Any, where: str, depth: int = 0) -> Any:
    """Return a copy of a value that the user binds for `where`; live values are not copied.

    Raises:
        ArgumentError: The value is neither live nor a constant.
    """
    if type(value) in _ATOMS or isinstance(value, _Tensor) or is_live(value):
        _check_part(value, where)
        return value
    if isinstance(value, np.generic):
        _check_array(value, where)
        return value
    if depth > _DEEPEST and isinstance(value, (dict, list, tuple)):
        raise ArgumentError(
            f"{where} has more than {_DEEPEST} lists, tuples and dicts in one another, or one that "
            "contains itself. Give a flatter value."
        )
    if isinstance(value, dict):
        items = value.items()
        return {take(k, where, depth + 1): take(v, where, depth + 1) for k, v in items}
    if isinstance(value, list):
        return [take(item, where, depth + 1) for item in value]
    if type(value) is tuple:
        return tuple(take(item, where, depth + 1) for item in value)
    kind = _refused_kind(value)
    if kind is not None:
        raise ArgumentError(
            f"{where} is {kind}: bound as a constant, it would keep its current value in the "
            "compiled step. Give a keras.Variable. Or give the value with the batch, "
            "fit(..., sample_weight={name: values}), or at the call, loss(y_true, y_pred, name=...)"
        )
    if isinstance(value, keras.losses.Loss):
        return value
    if not isinstance(value, np.ndarray) and keras.ops.is_tensor(value):
        return _Tensor(_value_of_tensor(value, where))
    if hasattr(value, "__array__"):
        array = np.asanyarray(value)
        _check_array(array, where)
        return np.array(array, array.dtype.newbyteorder("="), order="C")
    _check_parts(value, where)
    try:
        hash(value)
    except TypeError:
        raise ArgumentError(
            f"{where} is a {type(value).__name__}, which can change after it was bound and cannot "
            "be compared. Give a number, a string, an array, a list, a tuple or a dict."
        ) from None
    return value


def _check_part(part: Any, where: str) -> None:
    if type(part) is int and abs(part) >= _BEYOND:
        raise ArgumentError(
            f"{where} has an integer of more than 4300 digits, which Python does not print. Give "
            "a float, or the digits as a string."
        )


def _check_parts(value: Any, where: str) -> None:
    """Raise if an object that is not copied holds a live value or a long integer."""
    parts, seen = [value], {}
    for part in parts:  # grows
        if id(part) in seen:
            continue
        seen[id(part)] = part
        _check_part(part, where)
        if is_live(part) or _is_live_loss(part):
            raise ArgumentError(
                f"{where} is a {type(value).__name__} that holds {show(part)}. The model finds "
                "live values and losses in tuples, lists and dicts only. Give one of these."
            )
        if isinstance(part, dict):
            parts += [*part, *part.values()]
        elif isinstance(part, (tuple, list, set, frozenset)):
            parts += part
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            parts += [getattr(part, field.name, None) for field in dataclasses.fields(part)]


def _check_array(array: Any, where: str) -> None:
    """Raise for a masked array, or a dtype that Keras does not know; text and dates are allowed."""
    if isinstance(array, np.ma.MaskedArray):
        raise ArgumentError(
            f"{where} is a masked array, and no backend has a tensor with a mask. Give its data "
            "and its mask as two arguments."
        )
    if array.dtype.kind in _NO_NUMBERS:
        return
    try:
        keras.backend.standardize_dtype(array.dtype.name)
    except ValueError:
        raise ArgumentError(
            f"{where} is an array of {array.dtype}, which no backend can compute with. Give it a "
            "numeric dtype, e.g. `array.astype('float32')`."
        ) from None


def _value_of_tensor(value: Any, where: str) -> np.ndarray[Any, Any]:
    try:
        array = np.array(keras.ops.convert_to_numpy(value))
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
    _check_array(array, where)
    return array


def _refused_kind(value: Any) -> str | None:
    """Return the kind of a value that cannot be bound, or `None`."""
    for kind, cls in _REFUSED.items():
        if isinstance(value, cls):
            return kind
    for cls in type(value).__mro__:
        kind = f"{cls.__module__.partition('.')[0]} {cls.__name__}"
        if kind in ("tensorflow Variable", "torch Parameter", "flax Variable"):
            return f"a {kind}"
    if getattr(value, "requires_grad", False):
        return "a torch tensor that requires a gradient"
    return None


def rebuilt(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return the value in new containers, with each leaf converted."""
    if isinstance(value, dict):
        return {k: rebuilt(v, convert) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(rebuilt(item, convert) for item in value)
    return convert(value)


def hand_on(value: Any, dtype: str, where: str) -> Any:
    """Return the value for the user's function, the same on every backend.

    Arrays and tensors become tensors. Those of floats have `dtype`, as `y_true` and `y_pred` have;
    those of bool and integers keep theirs. Floats of NumPy, `np.float64(0.1)`, become floats of
    Python, which adapt to the dtype of a tensor. Containers are new: the function may change them.

    Raises:
        ArgumentError: The backend has no tensor for an array.
    """

    def convert(leaf: Any) -> Any:
        if type(leaf) in _ATOMS:
            return leaf
        if isinstance(leaf, _Tensor):
            leaf = leaf.array
        elif isinstance(leaf, keras.Variable):
            leaf = leaf.value
        if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in _NO_NUMBERS:
            return leaf
        if isinstance(leaf, np.generic):
            number = leaf.item()
            return float(number) if isinstance(number, (float, np.floating)) else leaf
        if isinstance(leaf, np.ndarray):
            return _as_tensor(leaf, dtype, where)
        if keras.ops.is_tensor(leaf):
            own = keras.backend.standardize_dtype(leaf.dtype)
            cast = own != dtype and keras.backend.is_float_dtype(own)
            return keras.ops.convert_to_tensor(leaf, dtype=dtype if cast else None)
        return leaf

    try:
        return rebuilt(value, convert)
    except RecursionError as error:
        raise ArgumentError(
            f"{where!r} has too many lists, tuples and dicts in one another, or one that contains "
            "itself. Give a flatter value."
        ) from error


def _as_tensor(array: np.ndarray[Any, Any], dtype: str, where: str) -> Any:
    _check_array(array, repr(where))
    own = keras.backend.standardize_dtype(array.dtype)
    is_float = keras.backend.is_float_dtype(own)
    if is_float and own != dtype and array.dtype.isbuiltin == _USER_DEFINED:
        array = array.astype("float32")  # torch keeps or refuses bfloat16
    try:
        # Without a dtype, Keras's NumPy backend converts float64 to float32.
        return keras.ops.convert_to_tensor(array, dtype=dtype if is_float else None)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{where!r} is an array of {array.dtype}, of which {keras.backend.backend()} has no "
            "tensors. Give it another dtype, e.g. `array.astype('int64')`."
        ) from error


def _exhibited(leaf: Any) -> Any:
    if isinstance(leaf, _Tensor):
        return keras.ops.convert_to_tensor(leaf.array)
    if isinstance(leaf, np.ndarray):
        view = leaf.view()
        view.flags.writeable = False
        return view
    return leaf


def exhibit(value: Any) -> Any:
    """Return the value for `loss.args`: new containers and tensors, read-only arrays."""
    return rebuilt(value, _exhibited)


def identity(value: Any, seen: dict[int, tuple[Any, Hashable]] | None = None) -> Hashable:
    """Return a key that is equal for two values only if they compute the same.

    1, 1.0 and True differ, 0.0 and -0.0 differ, dicts in another order differ, and NaN equals
    itself. The parts of objects count in the same way; `seen` has the keys of objects by `id`.
    """
    seen = {} if seen is None else seen
    if type(value) in (float, complex):
        return type(value), repr(value)
    if isinstance(value, tuple(live_types)):
        return type(value), id(value)  # the current value of a variable does not count
    if isinstance(value, (np.str_, np.bytes_)):  # arrays drop zeros at the end
        return type(value), value[:]
    if isinstance(value, (np.ndarray, np.generic, _Tensor)):
        array = value.array if isinstance(value, _Tensor) else np.asarray(value)
        digest = hashlib.blake2b(array.tobytes()).digest()
        return type(value), array.dtype, array.shape, digest
    if isinstance(value, dict):
        return dict, tuple((identity(k, seen), identity(v, seen)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(identity(item, seen) for item in value)
    if keras.ops.is_tensor(value):
        return type(value), id(value)
    cls: Any = type(value)
    if cls in _ATOMS or cls.__eq__ is object.__eq__ or isinstance(value, keras.losses.Loss):
        return cls, value  # equal only if the same
    return _identity_of_object(value, seen)


def _identity_of_object(value: Any, seen: dict[int, tuple[Any, Hashable]]) -> Hashable:
    """Return the key of an object whose class may take different objects for equal.

    Beside the object, the key has its `repr` and the parts that `pickle` would write.
    """
    if id(value) in seen:
        return seen[id(value)][1]
    key: tuple[Any, ...] = type(value), _ADDRESS.sub("", repr(value))
    with contextlib.suppress(TypeError):
        hash(value)
        key = (*key, value)
    seen[id(value)] = value, key  # an object may hold itself
    with contextlib.suppress(Exception):  # it cannot be pickled
        key = (*key, identity(value.__reduce_ex__(2)[1:3], seen))
        seen[id(value)] = value, key
    return key


def describe_lists(args: Mapping[str, Any]) -> str:
    """Return a sentence about the arguments that are lists or tuples of numbers, or `""`."""
    kinds = [f"`{n}` is a {type(v).__name__}" for n, v in args.items() if _is_list_of_numbers(v)]
    if not kinds:
        return ""
    return f"{', '.join(kinds)}; if the function needs an array, bind `numpy.array(...)`."


def _is_list_of_numbers(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and len(value) > 0
    return is_list and all(isinstance(v, Number) or _is_list_of_numbers(v) for v in value)


def show(value: Any) -> str:
    """Return the value for `repr`; a large array by its dtype and shape."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}"
    if type(value) is list:
        return "[" + ", ".join(map(show, value)) + "]"
    if type(value) is tuple:
        return "(" + ", ".join(map(show, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, (np.ndarray, _Tensor)):
        kind, array = ("tensor", value.array) if isinstance(value, _Tensor) else ("array", value)
        if array.size <= 8:
            return f"{kind}({array.tolist()}, {array.dtype.name})"
        return f"<{kind} {array.dtype.name} {array.shape}>"
    if isinstance(value, keras.Variable):
        trainable = "trainable " if value.trainable else ""
        return f"<{trainable}variable {value.name!r}>"
    if isinstance(value, keras.KerasTensor):
        return f"<symbolic tensor {value.name!r} {value.shape}>"
    if is_live(value):
        return str(value) if isinstance(value, keras.Layer) else f"<{type(value).__name__}>"
    return repr(value)


def encode(value: Any, where: str, encode_live: Callable[[Any], Any] | None = None) -> Any:
    """Return the value as JSON that keeps it exactly, for `decode`.

    Keras's own encoding loses the dtype of NumPy scalars, the shape of empty arrays, tuples, and
    the keys of a dict that are not strings.

    `encode_live` returns the object of Keras that is serialized for a live value.

    Raises:
        SavingError: The value cannot be loaded exactly, or is live and `encode_live` is missing.
    """
    if type(value) in (*_PLAIN, float):
        return value
    if type(value) is list:
        return [encode(item, where, encode_live) for item in value]
    if type(value) is tuple:
        return {"kind": "tuple", "items": encode(list(value), where, encode_live)}
    if isinstance(value, dict):
        pairs = [list(item) for item in value.items()]
        return {"kind": "dict", "items": encode(pairs, where, encode_live)}
    if type(value) is complex:
        return {"kind": "complex", "items": [value.real, value.imag]}
    if type(value) is bytes:
        return {"kind": "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return _encode_array("array", value)
    if isinstance(value, (np.str_, np.bytes_)):
        return {"kind": "text", "item": encode(value[:], where)}
    if isinstance(value, np.generic):
        return _encode_array("scalar", np.asarray(value))
    if isinstance(value, _Tensor):
        return _encode_array("tensor", value.array)
    if is_live(value):
        if encode_live is None:
            raise SavingError(
                f"{where} is {show(value)}, which is saved with its model only. Attach the loss, "
                "and save the model: attach(model, loss).save(path)."
            )
        return {"kind": "live", "object": keras.saving.serialize_keras_object(encode_live(value))}
    return _encode_object(value, where)


def _encode_array(kind: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    # NumPy writes the dtypes of ml_dtypes (bfloat16, ...) as raw bytes; their name is exact.
    own = array.dtype.isbuiltin == _USER_DEFINED
    dtype = array.dtype.name if own else array.dtype.str
    data = base64.b64encode(array.tobytes()).decode()
    return {"kind": kind, "dtype": dtype, "shape": list(array.shape), "data": data}


def _encode_object(value: Any, where: str) -> dict[str, Any]:
    """Serialize by Keras, and check the result: losses of Keras lose their arguments."""
    name = getattr(value, "__name__", None)
    reason = "a lambda has no name to be found by"
    if name != "<lambda>":
        try:
            config = keras.saving.serialize_keras_object(value)
            if _is_live_loss(value):  # it would come back with other variables
                return {"kind": "keras", "object": config}
            config = json.loads(json.dumps(config))
            back = _decode_object(config)
            if type(back) is type(value) and back == value:
                return {"kind": "keras", "object": config}
            reason = f"it came back as {back!r}, which is not equal to it"
        except SavingError:
            raise
        except Exception as error:  # noqa: BLE001 - of any class that a user registered
            reason = str(error)
    raise SavingError(
        f"{where} is {value!r}, which Keras does not save and load as it is: {reason}. Give a "
        "plain value or a bound loss, with_args(keras.losses.huber)(). Or define `__eq__`, and "
        "register its class or function with @keras.saving.register_keras_serializable()."
    )


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Convert the exceptions that a damaged or hostile file causes.

    Raises:
        SavingError: The code inside raised an exception that is not of lossargs.
    """
    try:
        yield
    except LossArgsError:
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{error}", 1000, placeholder=" ...")
        raise damaged(what, f"{reason} ({type(error).__name__})") from error


def damaged(what: str, reason: str) -> SavingError:
    """Return the error for a part of a file that cannot be read."""
    return SavingError(
        f"{what} cannot be read: {reason}. The file is damaged, or from a newer lossargs."
    )


def checked(config: Any, name: str, *kinds: type) -> Any:
    """Return an entry of a config that has one of these types.

    Raises:
        TypeError: The entry has another type.
        ValueError: There is no such entry, or the config is not a dict.
    """
    if not isinstance(config, dict) or name not in config:
        raise ValueError(f"{name!r} is missing")
    if type(config[name]) not in kinds:
        raise TypeError(f"{name!r} is a {type(config[name]).__name__}")
    return config[name]


def decode(
    config: Any, decode_live: Callable[[dict[str, Any]], Any] | None = None, depth: int = 0
) -> Any:
    """Return the value that `encode` wrote.

    `decode_live` returns the live value for the serialized object of `encode_live`.

    Raises:
        SavingError: The config is damaged, or has a live value and `decode_live` is missing.
    """
    if type(config) is float:
        return config * 1.0  # JSON's NaN is one object; two keys of a dict would become one
    if type(config) in _PLAIN:
        return config
    with reading("A saved value"):
        if depth > _DEEPEST + 2:  # NumPy's text in the deepest container, and its bytes
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        inner = functools.partial(decode, decode_live=decode_live, depth=depth + 1)
        if isinstance(config, list):
            return [inner(item) for item in config]
        match checked(config, "kind", str):
            case "tuple":
                return tuple(inner(item) for item in checked(config, "items", list))
            case "dict":
                items = checked(config, "items", list)
                if not all(isinstance(item, list) for item in items):
                    raise TypeError("an item of a dict is no pair")
                return {inner(k): inner(v) for k, v in items}
            case "text":
                item = inner(config["item"])
                return np.str_(item) if isinstance(item, str) else np.bytes_(item)
            case "complex":
                real, imaginary = checked(config, "items", list)
                return complex(float(real), float(imaginary))
            case "bytes":
                return base64.b64decode(checked(config, "data", str), validate=True)
            case "array":
                return _decode_array(config)
            case "scalar":
                if config["shape"]:
                    raise ValueError("a scalar has no shape")
                return _decode_array(config)[()]
            case "tensor":
                return _Tensor(_decode_array(config))
            case "live":
                if decode_live is None:
                    raise ValueError("it has a live value, which belongs to a model")
                return decode_live(checked(config, "object", dict))
            case "keras":
                return _decode_object(checked(config, "object", dict))
            case kind:
                raise ValueError(f"unknown kind {kind!r}")


def _decode_array(config: dict[str, Any]) -> np.ndarray[Any, Any]:
    name, shape = checked(config, "dtype", str), checked(config, "shape", list)
    if "," in name or "(" in name:  # NumPy's notation for structures
        raise ValueError(f"no dtype of a bound array: {name!r}")
    dtype = np.dtype(name)
    if dtype.kind not in "biufcSUMm" and (dtype.hasobject or dtype.type is np.void):
        raise ValueError(f"no dtype of a bound array: {name!r}")
    data = base64.b64decode(checked(config, "data", str), validate=True)
    # Checked before NumPy allocates an array of this shape.
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"no shape: {shape}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no array of {dtype} and shape {shape}")
    array = np.frombuffer(data, dtype=dtype) if data else np.empty(0, dtype)
    return array.reshape(shape).copy()  # writable


def _decode_object(config: dict[str, Any]) -> Any:
    """Return a function, or an object of a class that defines equality."""
    if checked(config, "class_name", str) != "function":
        return load_object(config, object)
    name = checked(config, "config", str)
    is_registered = keras.saving.get_registered_object(name) is not None
    if not is_registered and config.get("module") != "builtins":  # what Keras writes for its own
        raise ValueError(
            f"it names the function {name!r} of {config.get('module')!r}, which is not registered"
        )
    function = keras.saving.deserialize_keras_object(config)
    # The oldest Keras also finds functions of Python here. Some of its own load files.
    is_keras = str(getattr(function, "__module__", None)).startswith("keras.")
    if not is_registered and (not is_keras or name in ("get", "serialize", "deserialize")):
        raise ValueError(f"it names {name!r}, which is no function of tensors")
    return function


def load_object(config: Any, *kinds: type) -> Any:
    """Return the object of one of these classes that a config of Keras describes.

    Keras itself imports the modules of Keras that a config names, and makes an object of any class.
    This function finds the class first: it imports nothing and calls no other class.

    Args:
        config: The config; or an object, to make another one like it.
        *kinds: The classes; with `object`, any class that defines equality.

    Raises:
        ValueError: The config names another class.
    """
    if not isinstance(config, dict):
        config = keras.saving.serialize_keras_object(config)
    name = checked(config, "class_name", str)
    cls: Any = keras.saving.get_registered_object(config.get("registered_name") or name)
    if cls is None and str(config.get("module")).partition(".")[0] == "keras":
        cls = keras
        for part in (*config["module"].split(".")[1:], name):
            cls = getattr(cls, part, None) if isinstance(cls, types.ModuleType) else None
    right = isinstance(cls, type) and not name.startswith("__") and issubclass(cls, kinds)
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not right or (kinds == (object,) and cls.__eq__ is object.__eq__):
        wanted = "class that defines equality" if kinds == (object,) else wanted
        raise ValueError(
            f"it names {name!r} of {config.get('module')!r}, which is no {wanted} that this "
            "process knows; lossargs never imports what a file names"
        )
    loaded = keras.saving.deserialize_keras_object(config)
    if not isinstance(loaded, kinds):  # Keras has another object under this id
        raise TypeError(f"{type(loaded).__name__} is no {wanted}")
    return loaded
