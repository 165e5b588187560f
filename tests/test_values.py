"""Values of arguments: converted when bound, written to configs and read back exactly."""

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

# Besides the numbers, containers and arrays of `test_properties.py`.
VALUES = [
    [None, True, 10, -0.0, float("nan"), float("inf"), 1e-300, "", "Größe\n\0", [], (), {}],
    [1, (2.0, [None, "a"]), {"a": {"b": (1,)}}],
    {0: 1.0, 1: 2.0, (2, None): 3.0},
    {"kind": "tuple", "items": [1]},
    {"class_name": "Dense", "config": {"units": 3}, "module": "keras.layers"},
    np.array([[1.5, np.nan], [-np.inf, -0.0]], ">f4"),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.array([[0, 1, 2], [3, 4, 5]], "int16"),
    keras.activations.relu,
    composed(main=shifted.options(reduction=None)(3), weight=2),
    losses.scaled.options(name="late", reduction="sum", dtype="float64")(2),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_value_comes_back_exactly(value):
    loss = described(what=value)
    back = keras.losses.deserialize(json.loads(json.dumps(keras.losses.serialize(loss))))
    assert back is loss
    if isinstance(value, np.ndarray):
        np.testing.assert_array_equal(back.args["what"], value)
        assert back.args["what"].dtype == value.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (ml_dtypes.bfloat16(0.5), 0.5),
        (np.complex64(1 + 2j), 1 + 2j),
        (np.str_("a"), "a"),
        (np.bytes_(b"a"), b"a"),
        (np.arange(4).astype(ml_dtypes.float8_e5m2), np.arange(4).astype("float32")),
        (keras.ops.convert_to_tensor([1.0, 2.0]), np.array([1.0, 2.0], "float32")),
        (collections.OrderedDict(b=1, a=np.int8(2)), {"b": 1, "a": 2}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_converted_when_bound(given, kept):
    assert described(what=[given]) is described(what=[kept])
    assert type(described(what=given).args["what"]) is type(kept)


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


def local_function(x):
    return x


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
        object(),
        Level.LOW,
        Pair(1, 2),
        b"bytes",
        2 + 3j,
        keras.losses.Huber(delta=0.1),  # Keras would lose delta
    ],
)
def test_values_that_would_not_load_are_refused_when_saving(value):
    with pytest.raises(SavingError) as error:
        described(what=value).get_config()
    text = message_of(error.value)
    assert text.startswith("'what' of described() is ")
    assert "which does not load as it was: " in text
    assert text.endswith("with @keras.saving.register_keras_serializable().")


def test_an_inner_loss_tells_its_own_reason():
    inner = with_args(lambda t, p: t - p)()
    with pytest.raises(SavingError, match="is a lambda"):
        described(what=[inner]).get_config()
    config = composed(main=shifted(3)).get_config()
    config["args"]["main"]["object"]["config"]["function"] = "gone>shifted"
    with pytest.raises(SavingError, match="The saved loss uses the function 'gone>shifted'"):
        type(inner).from_config(config)


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
    with pytest.raises(SavingError, match="A saved value cannot be read: 'nobody'"):
        _serialization.decode(config, lambda _: by_name["nobody"])
    with pytest.raises(SavingError, match="A saved value cannot be read: it cannot have the kind"):
        _serialization.decode(config)


def test_live_values_without_a_hook():
    with pytest.raises(SavingError) as error:
        encoded([(keras.Variable(1.0, name="beta"),)])
    assert message_of(error.value) == (
        "'what' is <trainable variable 'beta'>, which is saved with its model only. Attach the "
        "loss, and save the model: attach(model, loss).save(path)."
    )


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
