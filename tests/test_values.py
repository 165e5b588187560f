"""Values of arguments in configs: written and read back exactly, or refused."""

import collections
import enum
import json

import keras
import ml_dtypes
import numpy as np
import pytest

import losses
from helpers import message_of
from lossargs import SavingError, _serialization, _values, with_args
from losses import composed, described, shifted


def reloaded(loss):
    """The loss after its config went through JSON, as in a model file."""
    config = keras.losses.serialize(loss)
    return keras.losses.deserialize(json.loads(json.dumps(config)))


VALUES = [
    None,
    True,
    10,
    -0.0,
    float("nan"),
    float("inf"),
    1e-300,
    2 + 3j,
    "",
    "Größe\n\0",
    b"\xff\x00",
    [],
    (),
    {},
    [1, (2.0, [None, "a"])],
    {"a": {"b": (1,)}},
    {0: 1.0, 1: 2.0, (2, None): 3.0},
    {"kind": "tuple", "items": [1]},
    {"class_name": "Dense", "config": {"units": 3}, "module": "keras.layers"},
    np.float32(0.1),
    np.int8(-3),
    np.array([True])[0],
    np.array(3.0),
    np.zeros((0, 3), "float16"),
    np.array([[1.5, np.nan], [-np.inf, -0.0]], ">f4"),
    np.array(["a", "bcd"]),
    np.array(["2026-11-23"], "datetime64[D]"),
    np.array([1 + 2j], "complex64"),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.arange(4).astype(ml_dtypes.bfloat16),
    np.arange(4).astype(ml_dtypes.float8_e5m2),
    np.str_("a\0"),
    np.bytes_(b"a\0"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_value_comes_back_exactly(value):
    assert reloaded(described(what=value)) == described(what=value)


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"]
)
def test_arrays_of_every_dtype_come_back(dtype):
    array = np.array([[0, 1, 2], [3, 4, 5]], dtype)
    back = reloaded(described(what=array)).args["what"]
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype


def test_tensor_is_bound_as_an_array():
    loss = described(what=keras.ops.convert_to_tensor([1.0, 2.0]))
    assert loss is described(what=np.array([1.0, 2.0], "float32"))
    assert reloaded(loss) is loss
    assert repr(loss) == "described(what=array([1.0, 2.0], float32))"
    assert repr(described(what=keras.ops.zeros((3, 4)))) == "described(what=<array float32 (3, 4)>)"


@pytest.mark.parametrize(
    ("scalar", "number"),
    [
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (ml_dtypes.bfloat16(0.5), 0.5),
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.bool_(True), True),
        (np.complex64(1 + 2j), 1 + 2j),
        (np.str_("a\0"), "a\0"),
        (np.bytes_(b"a\0"), b"a\0"),
    ],
)
def test_scalars_of_numpy_are_bound_as_those_of_python(scalar, number):
    assert described(what=[scalar]) is described(what=[number])
    assert type(described(what=scalar).args["what"]) is type(number)


def test_arrays_of_ml_dtypes_are_bound_as_float32():
    array = np.arange(4).astype(ml_dtypes.bfloat16)
    assert described(what=array) is described(what=np.arange(4).astype("float32"))


def test_loss_as_a_value_comes_back():
    loss = composed(main=shifted.options(reduction=None)(3), weight=2)
    assert reloaded(loss) == loss


def test_registered_functions_as_values_come_back():
    assert reloaded(described(what=keras.activations.relu)) == described(
        what=keras.activations.relu
    )


def test_unknown_function_inside_a_value_tells_its_own_reason():
    config = composed(main=shifted(3)).get_config()
    config["args"]["main"]["object"]["config"]["function"] = "gone>shifted"
    with pytest.raises(SavingError, match="The saved loss uses the function 'gone>shifted'"):
        type(shifted(3)).from_config(config)


def test_text_reaches_the_function_as_it_is():
    y = np.zeros((2, 1))
    text = np.array(["a", "b"])
    assert float(described(what=text)(y, y)) == 0
    assert described(what=text).args["what"].tolist() == ["a", "b"]


@with_args
def discounted(y_true, y_pred, s):
    return keras.ops.exp(-s) * keras.losses.mean_squared_error(y_true, y_pred)


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_float_of_numpy_computes_as_one_of_python(kind):
    """TensorFlow would make a float64 tensor of it, and have no product with a float32 one."""
    y_true, y_pred = np.zeros((2, 1), "float32"), np.ones((2, 1), "float32")
    for value in (
        discounted(kind(0.5))(y_true, y_pred),
        discounted()(y_true, y_pred, s=kind(0.5)),
        discounted()(y_true, y_pred, {"s": kind(0.5)}),
    ):
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        assert float(value) == pytest.approx(np.exp(-0.5), rel=1e-6)


def test_options_come_back():
    loss = losses.scaled.options(name="late", reduction="sum", dtype="float64")(2)
    back = reloaded(loss)
    assert (back.name, back.reduction, back.dtype) == ("late", "sum", "float64")
    assert back is loss


def local_function(x):
    return x


class Unregistered:
    pass


def relu(x):
    return 100 * x


class Level(enum.IntEnum):
    LOW = 1


Pair = collections.namedtuple("Pair", "a b")  # noqa: PYI024


@pytest.mark.parametrize(
    "value",
    [
        local_function,
        relu,  # Keras would load its own
        lambda x: x,
        Unregistered(),
        object(),
        Level.LOW,
        Pair(1, 2),
        keras.losses.Huber(delta=0.1),  # Keras would lose delta
    ],
)
def test_values_that_would_not_load_are_refused_when_saving(value):
    with pytest.raises(SavingError) as error:
        described(what=value).get_config()
    assert message_of(error.value).startswith("'what' of described() is ")
    assert "register its class or function with @keras.saving.register" in message_of(error.value)


def test_unsaveable_loss_inside_a_value_tells_its_own_reason():
    inner = with_args(lambda t, p: t - p)()
    with pytest.raises(SavingError, match="is a lambda"):
        described(what=[inner]).get_config()


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "function"},
        {"kind": "function", "name": "system"},
        {"kind": ["tuple"]},
        {"no": "kind"},
        {"kind": "array", "data": "AAAA"},
        {"kind": "bytes", "data": "not base64!"},
        {"kind": "complex", "items": [1, 2, 3]},
        {"kind": "keras", "object": {"module": "os", "class_name": "system", "config": {}}},
        {"kind": "dict", "items": [[1]]},
        {"kind": "dict", "items": [[[], 1]]},
    ],
    ids=repr,
)
def test_damaged_values(value):
    config = described(what=1).get_config()
    config["args"]["what"] = value
    with pytest.raises(SavingError, match="A saved value cannot be read"):
        type(described()).from_config(config)


@pytest.mark.parametrize("key", ["function", "module", "args", "name", "reduction", "dtype"])
def test_damaged_config(key):
    config = described(what=1).get_config()
    del config[key]
    with pytest.raises(SavingError, match=f"config of a lossargs loss cannot be read: .*{key}"):
        type(described()).from_config(config)


def encoded(value, encode_live=None):
    return json.loads(json.dumps(_serialization.encode(value, "'what'", encode_live)))


def test_live_values_are_written_by_a_hook():
    one, other = keras.Variable(1.0, name="one"), keras.Variable(2.0, name="other")
    keepers = {id(one): keras.layers.Identity(name="a"), id(other): keras.layers.Identity(name="b")}
    by_name = {"a": one, "b": other}
    value = {"z": [one, (other, 1)], 2: 3.0, "a": {"deep": other}, "one": one}

    config = encoded(value, lambda leaf: keepers[id(leaf)])
    back = _serialization.decode(config, lambda config: by_name[config["config"]["name"]])
    assert list(back) == list(value)
    assert back["z"][0] is back["one"] is one
    assert back["z"][1] == (other, 1)
    assert back["a"]["deep"] is other
    assert encoded(one, lambda leaf: keepers[id(leaf)]) == {
        "kind": "live",
        "object": json.loads(json.dumps(keras.saving.serialize_keras_object(keepers[id(one)]))),
    }


def test_live_values_without_a_hook():
    variable = keras.Variable(1.0, name="beta")
    with pytest.raises(SavingError) as error:
        encoded([(variable,)])
    assert message_of(error.value) == (
        "'what' is <trainable variable 'beta'>, which is saved with its model only. Attach the "
        "loss, and save the model: attach(model, loss).save(path)."
    )
    config = encoded(variable, lambda _: keras.layers.Identity())
    with pytest.raises(SavingError, match="A saved value cannot be read: it has a live value"):
        _serialization.decode([config])
    with pytest.raises(SavingError, match="A saved value cannot be read: no such adapter"):
        _serialization.decode(config, unknown)


def unknown(config):
    raise LookupError("no such adapter")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({}, ""),
        ({"a": 1.0, "b": "text", "c": np.arange(3), "d": None, "e": {"f": [1]}}, ""),
        ({"a": [], "b": [[], ()], "c": ["x", 1], "d": [1, None], "e": [np.arange(3)]}, ""),
        ({"a": 1, "weights": [1.0, 2.0]}, "`weights` is a list; if"),
        ({"weights": ((1, 2), [3, 4.5])}, "`weights` is a tuple; if"),
        ({"a": [True], "b": (np.float32(1), np.int8(2), 3j)}, "`a` is a list, `b` is a tuple; if"),
    ],
)
def test_lists_where_an_array_may_be_meant(args, text):
    rest = " the function needs an array, bind `numpy.array(...)`."
    assert _values.describe_lists(args) == (text and text + rest)
