"""Bound values: how each is taken, compared, handed on, shown, and saved."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import math
import textwrap
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Self

import keras
import numpy as np

from lossargs._errors import ArgumentError, LossArgsError, SavingError

_PLAIN = (type(None), bool, int, str)  # what JSON keeps as it is, but for floats
_LONG = 2048  # bits of an integer; Python refuses to write much longer ones in decimal
_DEEPEST = 32  # of containers in containers; Keras's serialization takes ten calls for each
_ATOMS = (*_PLAIN, float, complex, bytes)

_NO_NUMBERS = "SUMm"  # kinds of dtypes: text, dates and times
_USER_DEFINED = 2  # of `dtype.isbuiltin`: those of ml_dtypes, as bfloat16

# Holds variables, or is used up: as a constant it would be read once, when the step is traced.
_REFUSED = {
    "a layer": keras.Layer,
    "a metric": keras.Metric,
    "an optimizer": keras.Optimizer,
    "a seed generator": keras.random.SeedGenerator,
    "an iterator": Iterator,
}


# Types whose values change from step to step; `lossargs.Adapter` adds to them.
live_types: list[type] = []


@dataclasses.dataclass(frozen=True)
class Saved:
    """A live value of a loss that was saved: the layer saved with it keeps the value itself.

    Attributes:
        id: What the layer finds it by.
        shown: What it was.
    """

    id: str
    shown: str


@keras.saving.register_keras_serializable(package="lossargs")
@dataclasses.dataclass(frozen=True)
class Slot:
    """Stands in arguments for a value that each step fills in: its place in a list of values."""

    index: int

    def get_config(self) -> dict[str, int]:
        """For Keras to write it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, int]) -> Self:
        """For Keras to read it."""
        return cls(**config)


def is_live(value: Any) -> bool:
    """Whether the value changes from step to step, and has to be handed over in each."""
    return isinstance(value, (Saved, *live_types))


def live_leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """The live values in a bound one, each with where it stands: `""`, `"_0"`, `"_key"`."""
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
    """A tensor of the backend as it was when bound; torch could change the tensor itself."""

    array: np.ndarray[Any, Any]


def take(value: Any, where: str, depth: int = 0) -> Any:
    """A value that is to be bound: a copy, so that later changes change nothing, unless live.

    Args:
        value: What the user gave.
        where: The argument it was given for, for the message: `` `shift` of shifted() ``.
        depth: In how many containers it stands.

    Raises:
        ArgumentError: The value is neither live nor a constant.
    """
    if type(value) in _ATOMS or isinstance(value, _Tensor) or is_live(value):
        return value
    if isinstance(value, np.generic):
        _refuse_dtype(value.dtype, where)
        return value
    if depth > _DEEPEST and isinstance(value, (dict, list, tuple)):
        raise ArgumentError(
            f"{where} has more than {_DEEPEST} lists, tuples and dicts in one another, or one that "
            "contains itself, and could not be saved. Give a flatter value."
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
            f"{where} is {kind}: bound as a constant, it would keep the value it has now in the "
            "compiled step. Give a keras.Variable, which is followed and, if trainable, trained; "
            "or leave the argument unbound and give its value with the batch, "
            "fit(..., sample_weight={name: values}), or at the call, "
            "loss(y_true, y_pred, name=value)."
        )
    if isinstance(value, keras.losses.Loss):
        return value
    if not isinstance(value, np.ndarray) and keras.ops.is_tensor(value):
        return _Tensor(_value_of_tensor(value, where))
    if hasattr(value, "__array__"):
        return _take_array(value, where)
    try:
        hash(value)
    except TypeError:
        raise ArgumentError(
            f"{where} is a {type(value).__name__}, which can change after it was bound and cannot "
            "be compared. Give a number, a string, an array, or a list, tuple or dict of these."
        ) from None
    return value


def _take_array(value: Any, where: str) -> np.ndarray[Any, Any]:
    _refuse_mask(value, where)
    array = np.array(value, order="C")
    _refuse_dtype(array.dtype, where)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _refuse_mask(value: Any, where: str) -> None:
    if isinstance(value, np.ma.MaskedArray):
        raise ArgumentError(
            f"{where} is a masked array, and no backend has a tensor with a mask. Give its data "
            "and its mask as two arguments."
        )


def _refuse_dtype(dtype: np.dtype[Any], where: str) -> None:
    """Raise for a dtype that Keras does not know, but for text and dates."""
    if dtype.kind in _NO_NUMBERS:
        return
    try:
        keras.backend.standardize_dtype(dtype.name)
    except ValueError:
        raise ArgumentError(
            f"{where} is an array of {dtype}, which no backend can compute with. Give it a "
            "numeric dtype, e.g. `array.astype('float32')`."
        ) from None


def _value_of_tensor(value: Any, where: str) -> np.ndarray[Any, Any]:
    try:
        return np.array(keras.ops.convert_to_numpy(value))
    except Exception as error:
        raise ArgumentError(
            f"{where} is a tensor of a step that is being traced ({type(value).__name__}): it has "
            "no value yet that could be bound. Give it at the call, loss(y_true, y_pred, name=...)."
            " If you gave the factory itself to compile(loss=...), call it first:"
            " loss=factory(...)."
        ) from error


def _refused_kind(value: Any) -> str | None:
    """What a value is that can be neither followed nor bound, or `None`."""
    for kind, cls in _REFUSED.items():
        if isinstance(value, cls):
            return kind
    for cls in type(value).__mro__:
        library = cls.__module__.partition(".")[0]
        if (library, cls.__name__) in {
            ("tensorflow", "Variable"),
            ("torch", "Parameter"),
            ("flax", "Variable"),
        }:
            return f"a {library} {cls.__name__}"
    if getattr(value, "requires_grad", False):
        return "a torch tensor that requires a gradient"
    return None


def rebuilt(value: Any, convert: Callable[[Any], Any]) -> Any:
    """The value in new containers, with each leaf converted."""
    if isinstance(value, dict):
        return {k: rebuilt(v, convert) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(rebuilt(item, convert) for item in value)
    return convert(value)


def hand_on(value: Any, dtype: str, where: str) -> Any:
    """The value for the user's function, the same on every backend.

    Arrays and tensors become tensors that a step computes with: floats in `dtype`, as `y_true` and
    `y_pred` are, bool and integers in their own. Floats of NumPy, `np.float64(0.1)`, become those
    of Python, which take the dtype of what they are computed with. Containers are new, so that the
    function may change them.

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
    _refuse_mask(array, repr(where))
    _refuse_dtype(array.dtype, repr(where))
    own = keras.backend.standardize_dtype(array.dtype)
    is_float = keras.backend.is_float_dtype(own)
    if is_float and own != dtype and array.dtype.isbuiltin == _USER_DEFINED:
        array = array.astype("float32")  # torch leaves such an array in bfloat16, or refuses it
    try:
        # Without a dtype, Keras's NumPy backend makes float32 of float64.
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
    """The value for `loss.args`: containers and tensors are new, arrays read-only."""
    return rebuilt(value, _exhibited)


def identity(value: Any) -> Hashable:
    """A key that is equal for two values if they make the same compiled step.

    So 1, 1.0 and True differ, 0.0 and -0.0 differ, dicts in another order differ, and NaN equals
    itself.
    """
    if type(value) in (float, complex):
        return type(value), repr(value)
    if isinstance(value, tuple(live_types)):
        return type(value), id(value)  # which variable it is counts, and not what it holds now
    if isinstance(value, (np.str_, np.bytes_)):  # an array would drop zeros at the end
        return type(value), value[:]
    if isinstance(value, (np.ndarray, np.generic, _Tensor)):
        array = value.array if isinstance(value, _Tensor) else np.asarray(value)
        digest = hashlib.blake2b(array.tobytes()).digest()
        return type(value), array.dtype, array.shape, digest
    if isinstance(value, dict):
        return dict, tuple((identity(k), identity(v)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(identity(item) for item in value)
    return type(value), value


def show(value: Any) -> str:
    """The value for `repr`, large arrays by dtype and shape only."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}"
    if type(value) is list:
        return "[" + ", ".join(map(show, value)) + "]"
    if type(value) is tuple:
        return "(" + ", ".join(map(show, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, (np.ndarray, _Tensor)):
        kind = "tensor" if isinstance(value, _Tensor) else "array"
        array = value.array if isinstance(value, _Tensor) else value
        if array.size <= 8:
            return f"{kind}({array.tolist()}, {array.dtype.name})"
        return f"<{kind} {array.dtype.name} {array.shape}>"
    if isinstance(value, keras.Variable):
        trainable = "trainable " if value.trainable else ""
        return f"<{trainable}variable {value.name!r}>"
    if isinstance(value, keras.KerasTensor):
        return f"<symbolic tensor {value.name!r} {value.shape}>"
    if isinstance(value, Saved):
        return value.shown
    if _is_long(value):
        return f"<integer of {value.bit_length()} bits>"
    if is_live(value):
        return f"<{type(value).__name__}>"
    return repr(value)


def encode(value: Any, where: str) -> Any:
    """The value as JSON keeps it exactly, to be read by `decode`.

    Keras's own encoding of values loses what a loss can depend on: the dtype of NumPy scalars, the
    shape of empty arrays, tuples, and the keys of a dict that are not strings.

    Raises:
        SavingError: The value would not load again.
    """
    if _is_long(value):
        return {"kind": "integer", "data": hex(value)}
    if type(value) in (*_PLAIN, float):
        return value
    if type(value) is list:
        return [encode(item, where) for item in value]
    if type(value) is tuple:
        return {"kind": "tuple", "items": [encode(item, where) for item in value]}
    if isinstance(value, dict):
        items = [[encode(k, where), encode(v, where)] for k, v in value.items()]
        return {"kind": "dict", "items": items}
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
    if isinstance(value, Saved):
        return {"kind": "live", "id": value.id, "shown": value.shown}
    return _encode_object(value, where)


def _is_long(value: Any) -> bool:
    return type(value) is int and value.bit_length() > _LONG


def _encode_array(kind: str, array: np.ndarray[Any, Any]) -> dict[str, Any]:
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    # NumPy spells the dtypes of ml_dtypes (bfloat16, ...) as raw bytes; their name is exact.
    own = array.dtype.isbuiltin == _USER_DEFINED
    dtype = array.dtype.name if own else array.dtype.str
    data = base64.b64encode(array.tobytes()).decode()
    return {"kind": kind, "dtype": dtype, "shape": list(array.shape), "data": data}


def _encode_object(value: Any, where: str) -> dict[str, Any]:
    """By Keras's own serialization, which is not trusted: losses of Keras lose their arguments."""
    name = getattr(value, "__name__", None)
    reason = "a lambda has no name to be found by"
    if name != "<lambda>":
        try:
            config = json.loads(json.dumps(keras.saving.serialize_keras_object(value)))
            back = _decode_object(config)
            # A loss with live arguments finds their values by itself, and only in its model.
            holds_live = bool(getattr(value, "holds_live", False))
            if type(back) is type(value) and (holds_live or back == value):
                return {"kind": "keras", "object": config}
            reason = f"it came back as {back!r}, which is not equal to it"
        except SavingError:
            raise
        except Exception as error:  # noqa: BLE001 - of any class that a user registered
            reason = str(error)
    raise SavingError(
        f"{where} is {value!r}, which Keras does not save and load as it is: {reason}. Give a "
        "plain value; or, for a loss of Keras, with_args(keras.losses.huber)(delta=2.0), say; or "
        "register its class or function with @keras.saving.register_keras_serializable(), and let "
        "its class define equality."
    )


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a damaged or hostile file makes of the code inside is an error that says so.

    Raises:
        SavingError: In place of any exception but the errors of lossargs.
    """
    try:
        yield
    except LossArgsError:
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{error}", 1000, placeholder=" ...")
        raise damaged(what, f"{reason} ({type(error).__name__})") from error


def damaged(what: str, reason: str) -> SavingError:
    """The error for a part of a file that cannot be read."""
    return SavingError(
        f"{what} cannot be read: {reason}. The file is damaged, not written by lossargs, or "
        "written by a newer version of it."
    )


def checked(config: Any, name: str, *kinds: type) -> Any:
    """An entry of a config, if it is of one of these types.

    Raises:
        TypeError: It is of another one.
        ValueError: There is none, or the config is no dict.
    """
    if not isinstance(config, dict) or name not in config:
        raise ValueError(f"{name!r} is missing")
    if type(config[name]) not in kinds:
        raise TypeError(f"{name!r} is a {type(config[name]).__name__}")
    return config[name]


def decode(config: Any, depth: int = 0) -> Any:
    """The value that `encode` wrote.

    Args:
        config: What it wrote.
        depth: How deep in a value that is nested.

    Raises:
        SavingError: This is not what `encode` writes.
    """
    if type(config) is float:
        return config * 1.0  # JSON's NaN is one object, and as keys of a dict two would be one
    if type(config) in _PLAIN:
        return config
    with reading("A saved value"):
        if depth > _DEEPEST + 2:  # in the deepest container text of NumPy, and in that bytes
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        depth += 1
        if isinstance(config, list):
            return [decode(item, depth) for item in config]
        match checked(config, "kind", str):
            case "tuple":
                return tuple(decode(item, depth) for item in checked(config, "items", list))
            case "dict":
                items = checked(config, "items", list)
                if not all(isinstance(item, list) for item in items):
                    raise TypeError("an item of a dict is no pair")
                return {decode(k, depth): decode(v, depth) for k, v in items}
            case "integer":
                return int(checked(config, "data", str), 16)
            case "text":
                item = decode(config["item"], depth)
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
                return Saved(checked(config, "id", str), checked(config, "shown", str))
            case "keras":
                return _decode_object(checked(config, "object", dict))
            case kind:
                raise ValueError(f"unknown kind {kind!r}")


def _decode_array(config: dict[str, Any]) -> np.ndarray[Any, Any]:
    name, shape = checked(config, "dtype", str), checked(config, "shape", list)
    if "," in name or "(" in name:  # NumPy's notation of structures
        raise ValueError(f"no dtype of a bound array: {name!r}")
    dtype = np.dtype(name)
    if dtype.kind not in "biufcSUMm" and (dtype.hasobject or dtype.type is np.void):
        raise ValueError(f"no dtype of a bound array: {name!r}")
    data = base64.b64decode(checked(config, "data", str), validate=True)
    # Before NumPy sees the shape: nothing is allocated that the file does not hold.
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"no shape: {shape}")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no array of {dtype} and shape {shape}")
    array = np.frombuffer(data, dtype=dtype) if data else np.empty(0, dtype)
    return array.reshape(shape).copy()  # writable, and not tied to the text it was read from


def _decode_object(config: dict[str, Any]) -> Any:
    """A function, or an object of a class that defines equality: others are never written."""
    if checked(config, "class_name", str) != "function":
        return load_object(config, object)
    name = checked(config, "config", str)
    is_registered = keras.saving.get_registered_object(name) is not None
    if not is_registered and config.get("module") != "builtins":  # what Keras writes for its own
        raise ValueError(
            f"it names the function {name!r} of {config.get('module')!r}, which is not registered"
        )
    function = keras.saving.deserialize_keras_object(config)
    # The oldest Keras also finds those of Python there; of its own, some load something.
    is_keras = str(getattr(function, "__module__", None)).startswith("keras.")
    if not is_registered and (not is_keras or name in ("get", "serialize", "deserialize")):
        raise ValueError(f"it names {name!r}, which is no function of tensors")
    return function


def load_object(config: Any, kind: type) -> Any:
    """The object that a config of Keras describes, if it is of this kind.

    Keras would import what the config names, if it is a module of Keras, and make an object of
    whatever class. Here the class is known before: nothing is imported, and no other class is run.

    Args:
        config: The config; or the object itself, of which another one is made.
        kind: The class that it is to be of; with `object`, any that defines equality.

    Raises:
        ValueError: It is of another class.
    """
    if not isinstance(config, dict):
        config = keras.saving.serialize_keras_object(config)
    name = checked(config, "class_name", str)
    cls: Any = keras.saving.get_registered_object(config.get("registered_name") or name)
    if cls is None and str(config.get("module")).partition(".")[0] == "keras":
        cls = keras
        for part in (*config["module"].split(".")[1:], name):
            cls = getattr(cls, part, None) if isinstance(cls, types.ModuleType) else None
    right = isinstance(cls, type) and not name.startswith("__") and issubclass(cls, kind)
    if not right or (kind is object and cls.__eq__ is object.__eq__):
        wanted = "class that defines equality" if kind is object else kind.__name__
        raise ValueError(
            f"it names {name!r} of {config.get('module')!r}, which is no {wanted} that this "
            "process knows; lossargs never imports what a file names"
        )
    loaded = keras.saving.deserialize_keras_object(config)
    if not isinstance(loaded, kind):  # an object that Keras has under the same id
        raise TypeError(f"{type(loaded).__name__} is no {kind.__name__}")
    return loaded
