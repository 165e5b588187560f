"""The bound loss: a Keras loss, immutable, equal by value, callable anywhere."""

import collections
import copy
import pickle

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from helpers import BACKEND, nested_in_itself, raising, to_float
from lossargs import ArgumentError, BatchError, with_args
from losses import composed, described, flexible, masked, scaled, shifted, total

Y_TRUE, Y_PRED = np.zeros((2, 1), "float32"), np.array([[1.0], [3.0]], "float32")  # mse: 5


def test_is_a_keras_loss():
    loss = shifted(10)
    assert isinstance(loss, keras.losses.Loss)
    assert keras.losses.get(loss) is loss
    assert loss.name == "shifted"
    assert (loss.reduction, loss.dtype) == ("sum_over_batch_size", "float32")
    np.testing.assert_allclose(
        ops.convert_to_numpy(loss.call(ops.array(Y_TRUE), ops.array(Y_PRED))), [11, 19]
    )


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (shifted(10), "shifted(shift=10)"),
        (scaled(), "scaled()"),
        (masked(), "masked(mask=<from the batch>)"),
        (described(what="a"), "described(what='a')"),
        (described(what=[1, (2,), {"a": None}]), "described(what=[1, (2,), {'a': None}])"),
        (described(what=[np.arange(3)]), "described(what=[array([0, 1, 2], int64)])"),
        (described(what=np.zeros((3, 4), "float32")), "described(what=<array float32 (3, 4)>)"),
        (composed(main=shifted(1)), "composed(main=shifted(shift=1))"),
        (
            shifted.options(name="late", reduction="sum", dtype="float16")(1),
            "shifted.options(name='late', reduction='sum', dtype='float16')(shift=1)",
        ),
    ],
)
def test_repr(loss, text):
    assert repr(loss) == text


def test_args_are_read_only():
    loss = described(what={"list": [1, 2], "array": np.arange(3)})
    with pytest.raises(TypeError):
        loss.args["what"] = 1
    loss.args["what"]["list"].append(3)
    with pytest.raises(ValueError, match="read-only"):
        loss.args["what"]["array"][0] = 9
    assert loss.args["what"]["list"] == [1, 2]
    assert dict(scaled(3).args) == {"scale": 3}


def test_constants_are_taken_as_they_are_when_bound():
    values, array, tensor = [1.0], np.ones(2, "float32"), ops.ones(2)
    loss, nested = flexible(a=array, b=tensor), described(what=values)
    before = to_float(loss(Y_TRUE, Y_PRED))
    array += 100
    values.append(2.0)
    if hasattr(tensor, "add_"):  # torch tensors change in place
        tensor.add_(100)
    assert to_float(loss(Y_TRUE, Y_PRED)) == before == 7
    assert nested.args["what"] == [1.0]


def test_function_may_change_its_containers():
    @with_args
    def popping(y_true, y_pred, values):
        return keras.losses.mean_squared_error(y_true, y_pred) + values.pop() + values.pop()

    loss = popping([1.0, 2.0])
    assert to_float(loss(Y_TRUE, Y_PRED)) == to_float(loss(Y_TRUE, Y_PRED)) == 8


def own_dtype(array):
    """That of the backend's tensor; JAX has 32 bits."""
    return keras.backend.standardize_dtype(ops.convert_to_tensor(array).dtype)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "int64", "bool", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_arrays_reach_the_function_as_tensors(dtype):
    seen = []

    @with_args
    def watching(y_true, y_pred, values):
        seen.append(values["a"][0])
        return ops.mean(ops.multiply(values["a"][0], ops.square(y_true - y_pred)), axis=-1)

    array = np.array([1, 0]).astype(getattr(ml_dtypes, dtype, dtype))
    result = watching({"a": (array,)})(np.zeros((1, 2)), np.array([[1.0, 3.0]]))
    assert to_float(result) == 0.5
    assert ops.is_tensor(seen[0])
    expected = "float32" if "float" in dtype else own_dtype(array)
    assert keras.backend.standardize_dtype(seen[0].dtype) == expected


def test_equality_and_replace():
    assert described(what=np.arange(3)) not in (described(what=np.arange(4)), "described")
    loss = composed(main=shifted(1), weight=2.0)
    assert loss.args["main"] is shifted(1)
    assert loss == composed(weight=2.0, main=shifted(1)) != composed(main=shifted(2), weight=2.0)
    loss = scaled.options(name="late")(2, power=1.0)
    assert loss.replace(scale=3) == scaled.options(name="late")(3, power=1.0)
    assert loss.replace() is loss
    assert loss.args["scale"] == 2
    with raising(ArgumentError, "'pwoer'", "Did you mean 'power'"):
        loss.replace(pwoer=3)


def test_cannot_be_changed():
    loss, text = shifted(10), "Cannot change {!r} of shifted(shift=10): bound losses"
    for name, *instead in (
        ("shift", "Make another one, loss.replace(shift=...)."),
        ("reduction", "Make another one, shifted.options(reduction=...)."),
        ("_args",),
    ):
        with raising(AttributeError, text.format(name), *instead):
            setattr(loss, name, 5)
        with pytest.raises(AttributeError):
            delattr(loss, name)
    assert loss.args["shift"] == 10


@pytest.mark.parametrize("loss", [shifted(10), scaled.options(name="a")(np.arange(3)), masked()])
def test_pickle_and_copies(loss):
    assert pickle.loads(pickle.dumps(loss)) is copy.deepcopy(loss) is copy.copy(loss) is loss


class Checked(collections.namedtuple("Checked", "number")):  # noqa: PYI024, SLOT002
    def __new__(cls, number):
        return super().__new__(cls, float(number))


def test_extra_arguments_at_the_call():
    assert to_float(described()(Y_TRUE, Y_PRED, what=Checked(1))) == 5
    assert to_float(described(what=Checked(1))(Y_TRUE, Y_PRED)) == 5
    assert to_float(shifted()(y_true=Y_TRUE, y_pred=Y_PRED, shift=np.ones(2))) == 6
    weights = np.array([1.0, 0.0])
    assert to_float(shifted(10)(Y_TRUE, Y_PRED, sample_weight=weights, shift=1)) == 1
    with pytest.raises(ArgumentError, match="shifted has no argument 'shfit'.*mean 'shift'"):
        shifted(10)(Y_TRUE, Y_PRED, shfit=1)


def test_a_loss_at_the_call_reads_the_batch_as_a_bound_one():
    batch = {"sample_weight": np.array([1.0, 0.0]), "shift": np.array([2.0, 2.0])}
    for loss, extra in ((composed(main=shifted(1)), {}), (composed(), {"main": shifted(1)})):
        assert to_float(loss(Y_TRUE, Y_PRED, batch, **extra)) == 1.5


def test_wrong_values_at_the_call():
    for value, text in (
        (np.zeros(2, object), "'what' is an array of object"),
        (np.ma.zeros(2), "'what' is a masked array"),
        (nested_in_itself(), "'what' is nested more than 32 deep, or in itself"),
    ):
        with raising(ArgumentError, text):
            described()(Y_TRUE, Y_PRED, what=value)
    with raising(ArgumentError, "'what' of described() is nested more than 32 deep"):
        described(what=nested_in_itself())
    with raising(ArgumentError, "masked needs a value for 'mask'. Bind it, masked(mask=...)."):
        masked()(Y_TRUE, Y_PRED)
    with pytest.raises(ZeroDivisionError):  # of the function itself
        with_args(lambda y_true, y_pred, divisor: 1 / divisor)(0)(Y_TRUE, Y_PRED)


def test_wrong_batches():
    text = "The batch (third element of the data) has an entry 'maks', which masked does not take"
    with raising(BatchError, text, "mean 'mask'? Leave it"):
        masked()(Y_TRUE, Y_PRED, {"maks": Y_TRUE})
    with raising(BatchError, "entry 0, which masked"):
        masked()(Y_TRUE, Y_PRED, {0: Y_TRUE})
    with raising(BatchError, "has an entry 0, which flexible does not take"):
        flexible()(Y_TRUE, Y_PRED, {"a": Y_TRUE, 0: Y_TRUE})
    with raising(BatchError, "The batch entry 'mask' for masked is None. Leave it out"):
        masked()(Y_TRUE, Y_PRED, {"mask": None})


@pytest.mark.skipif(BACKEND != "torch", reason="the others have these tensors")
def test_dtype_without_tensors():
    with pytest.raises(ArgumentError, match="'what' is an array of uint64, of which torch"):
        described(what=np.zeros(2, "uint64"))(Y_TRUE, Y_PRED)


@pytest.mark.parametrize(
    ("batch", "shape"),
    [(Y_PRED[:, 0], ()), ({"sample_weight": Y_PRED[:, 0]}, (1,)), ([1.0, 3.0], (1, 1))],
)
def test_one_number_with_weights_of_samples(batch, shape):
    @with_args
    def lumped(y_true, y_pred):
        return ops.reshape(ops.mean(ops.square(y_true - y_pred)), shape)

    text = "lumped returned one number for the whole batch, and was given weights for its samples"
    with raising(BatchError, text):
        lumped()(Y_TRUE, Y_PRED, batch)
    assert to_float(lumped()(Y_TRUE[:1], Y_PRED[:1], 2.0)) == 2


def test_values():
    assert to_float(shifted(1)(Y_TRUE[:1], Y_PRED[:1], np.array([3.0]))) == 6
    assert to_float(composed(main=shifted(1), weight=2.0)(Y_TRUE, Y_PRED)) == 12
    for weight, expected in ((None, 5), (2.0, 10), ({}, 5)):
        assert to_float(total()(Y_TRUE, Y_PRED, weight)) == expected
    structured = with_args(lambda t, p: ops.mean(ops.square(t["a"] - p["a"]), axis=-1))
    assert to_float(structured()({"a": Y_PRED[:, 0]}, {"a": Y_PRED})) == 0  # of one rank
