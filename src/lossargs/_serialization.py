"""Bound values in configs: written as JSON, and read from files that are not trusted."""

import base64
import contextlib
import io
import json
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from lossargs._errors import ArgumentError, LossArgsError, SavingError
from lossargs._values import format_value, is_live, is_live_loss, without_ml_dtypes

_PLAIN = (type(None), bool, int, float, str)  # JSON keeps them exactly

NOT_LOSSES = ("get", "serialize", "deserialize")  # functions beside those of keras.losses


def encode(value: Any, where: str, encode_live: Callable[[Any], Any] | None = None) -> Any:
    """Return the value as JSON for `decode`; `encode_live` returns a Keras object for a live one.

    Keras's own encoding loses tuples, shapes of empty arrays, and keys that are not strings.
    """
    if type(value) in _PLAIN:
        return value
    if type(value) is list:
        return [encode(item, where, encode_live) for item in value]
    if type(value) is tuple:
        return {"kind": "tuple", "items": encode(list(value), where, encode_live)}
    if isinstance(value, dict):
        pairs = [list(item) for item in value.items()]
        return {"kind": "dict", "items": encode(pairs, where, encode_live)}
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        array = np.array(without_ml_dtypes(value), order="C")
        np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
        return {"kind": "array", "data": base64.b64encode(file.getvalue()).decode()}
    if is_live(value):
        if encode_live is None:
            raise SavingError(
                f"{where} is {format_value(value)}, which is saved with its model only. "
                "Attach the loss, and save the model: attach(model, loss).save(path)."
            )
        config: Any = keras.saving.serialize_keras_object(encode_live(value))
        config.pop("compile_config", None)  # of a network that was trained before
        return {"kind": "live", "object": config}
    try:
        return _encode_object(value)
    except SavingError:
        raise
    except Exception as error:
        is_loss = isinstance(value, keras.losses.Loss)
        plain = "with_args(keras.losses.huber)()" if is_loss else "plain values"
        raise SavingError(
            f"{where} is {value!r}, which does not load as it was: {error}. Give {plain}. Or "
            "define `__eq__`, and register it with @keras.saving.register_keras_serializable()."
        ) from error


def _encode_object(value: Any) -> dict[str, Any]:
    """Serialize a function or an object, and check that it loads as an equal one."""
    if isinstance(value, types.FunctionType):
        config = {"kind": "function", "name": keras.saving.get_registered_name(value)}
    else:
        config = {"kind": "keras", "object": keras.saving.serialize_keras_object(value)}
    if not is_live_loss(value):  # it would come back with other variables
        back = _decode(json.loads(json.dumps(config)), None)
        if type(back) is not type(value) or back != value:
            raise ValueError(f"it came back as {back!r}, which is not equal to it")
    return config


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Convert the exceptions that a damaged or hostile file causes to a `SavingError`."""
    try:
        yield
    except ArgumentError as error:
        raise SavingError(
            f"{what} does not match the signature of its function: {error}"
        ) from error
    except LossArgsError:
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{error}", 1000, placeholder=" ...")
        raise damaged(what, f"{reason} ({type(error).__name__})") from error


def damaged(what: str, reason: str) -> SavingError:
    """Return the error for a part of a file that cannot be read."""
    return SavingError(
        f"{what} cannot be read: {reason}. The file is damaged, or from a newer lossargs: "
        "python -m pip install --upgrade lossargs."
    )


def checked(config: Any, name: str, *kinds: type) -> Any:
    """Return an entry of a config that has one of these types, or raise."""
    if not isinstance(config, dict) or name not in config:
        raise ValueError(f"{name!r} is missing")
    if type(config[name]) not in kinds:
        raise TypeError(f"{name!r} is a {type(config[name]).__name__}")
    return config[name]


def decode(config: Any, decode_live: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Return the value that `encode` wrote; `decode_live` returns a live value for its object."""
    with reading("A saved value"):
        return _decode(config, decode_live)


def _decode(config: Any, decode_live: Callable[[dict[str, Any]], Any] | None) -> Any:
    if type(config) in _PLAIN:
        return config
    if isinstance(config, list):
        return [_decode(item, decode_live) for item in config]
    match config["kind"]:
        case "tuple":
            return tuple(_decode(config["items"], decode_live))
        case "dict":
            return dict(_decode(config["items"], decode_live))
        case "array":
            return _decode_array(base64.b64decode(config["data"], validate=True))
        case "function":
            return _find_function(config["name"])
        case "live" if decode_live is not None:
            return decode_live(config["object"])
        case "keras":
            return load_object(config["object"], object)
        case kind:
            raise ValueError(f"it cannot have the kind {kind!r}")


def _decode_array(data: bytes) -> np.ndarray[Any, Any]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"it has an array of version {version}")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    # `read_array` would allocate an array of this shape before it reads.
    array: np.ndarray[Any, Any] = np.frombuffer(data[file.tell() :], dtype).reshape(shape)
    return array.copy()


def _find_function(name: str) -> Any:
    """Return a function that is registered, or an activation or loss of Keras."""
    found = keras.saving.get_registered_object(name)
    if found is None and name not in NOT_LOSSES:
        found = getattr(keras.activations, name, None) or getattr(keras.losses, name, None)
    if not isinstance(found, types.FunctionType):
        raise TypeError(f"it names the function {name!r}, which is not registered")
    return found


def load_object(config: Any, *kinds: type) -> Any:
    """Return the object of one of these classes that a config of Keras describes.

    Keras imports the modules that a config names, so this function finds the class first. With
    `object`, any class that defines equality is allowed. If `config` is an object, copy it.
    """
    if not isinstance(config, dict):
        config = keras.saving.serialize_keras_object(config)
    name, module = config["class_name"], config["module"]
    cls: Any = keras.saving.get_registered_object(config["registered_name"] or name)
    if cls is None and str(module).partition(".")[0] == "keras":
        cls = keras
        for part in (*module.split(".")[1:], name):
            cls = getattr(cls, part, None) if isinstance(cls, types.ModuleType) else None
    # Names such as `__class__` lead to classes that are not of Keras.
    right = isinstance(cls, type) and not name.startswith("__") and issubclass(cls, kinds)
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not right or (kinds == (object,) and cls.__eq__ is object.__eq__):
        raise ValueError(
            f"it names {name!r} of {module!r}, which is no {wanted} that this process knows"
        )
    loaded = keras.saving.deserialize_keras_object(config)
    if not isinstance(loaded, kinds):  # Keras has another object under this id
        raise TypeError(f"{type(loaded).__name__} is no {wanted}")
    return loaded
