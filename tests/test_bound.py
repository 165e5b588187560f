"""The bound loss: a Keras loss, immutable, equal by value, callable anywhere."""

import copy
import pickle
import threading

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import losses
from helpers import BACKEND, message_of, to_float
from lossargs import ArgumentError, BatchError, ImmutableError, with_args
from losses import composed, described, flexible, masked, scaled, shifted, total

Y_TRUE, Y_PRED = np.zeros((2, 1), "float32"), np.array([[1.0], [3.0]], "float32")  # mse: 5


def test_is_a_keras_loss():
    loss = shifted(10)
    assert isinstance(loss, keras.losses.Loss)
    assert keras.losses.get(loss) is loss
    assert loss.name == "shifted"
    assert (loss.reduction, loss.dtype) == ("sum_over_batch_size", "float32")


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (shifted(10), "shifted(shift=10)"),
        (scaled(), "scaled()"),
        (scaled(power=3), "scaled(power=3)"),
        (masked(), "masked(mask=<from the batch>)"),
        (described(what="a"), "described(what='a')"),
        (described(what=[1, (2,), {"a": None}]), "described(what=[1, (2,), {'a': None}])"),
        (described(what=np.arange(3)), "described(what=array([0, 1, 2], int64))"),
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
    loss = flexible(a=array, b=tensor)
    nested = described(what=values)
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


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "bool"])
def test_arrays_reach_the_function_as_tensors(dtype):
    seen = []

    @with_args
    def watching(y_true, y_pred, values):
        seen.append(values["a"][0])
        return ops.mean(ops.multiply(values["a"][0], ops.square(y_true - y_pred)), axis=-1)

    array = np.array([1, 0], dtype)
    result = watching({"a": (array,)})(np.zeros((1, 2)), np.array([[1.0, 3.0]]))
    assert to_float(result) == 0.5
    assert ops.is_tensor(seen[0])
    as_tensor = ops.convert_to_tensor(array).dtype  # JAX has 32 bits
    own = keras.backend.standardize_dtype(as_tensor)
    expected = "float32" if dtype.startswith("float") else own
    assert keras.backend.standardize_dtype(seen[0].dtype) == expected


def test_equality_and_hash():
    one, other = described(what=np.arange(3)), described(what=np.arange(3))
    assert one == other
    assert hash(one) == hash(other)
    assert one != described(what=np.arange(4))
    assert one != "described"
    assert {shifted(1): "a"}[shifted(1)] == "a"


def test_replace():
    loss = scaled.options(name="late")(2, power=1.0)
    assert loss.replace(scale=3) == scaled.options(name="late")(3, power=1.0)
    assert loss.replace() is loss
    assert loss.args["scale"] == 2
    with pytest.raises(ArgumentError, match="'pwoer'.*Did you mean 'power'"):
        loss.replace(pwoer=3)


@pytest.mark.parametrize("name", ["shift", "reduction", "name", "_args"])
def test_cannot_be_changed(name):
    loss = shifted(10)
    with pytest.raises(ImmutableError) as error:
        setattr(loss, name, 5)
    with pytest.raises(ImmutableError):
        delattr(loss, name)
    instead = {"shift": "loss.replace", "_args": None}.get(name, "shifted.options")
    text = message_of(error.value)
    assert text.startswith(f"shifted(shift=10) cannot be changed ({name!r})")
    assert text.endswith(f"Make another one, {instead}({name}=...)." if instead else "one object.")
    assert loss.args["shift"] == 10


def test_pickle_and_copies():
    for loss in (shifted(10), scaled.options(reduction="sum")(np.arange(3)), masked()):
        assert pickle.loads(pickle.dumps(loss)) is loss
        assert copy.deepcopy(loss) is loss
        assert copy.copy(loss) is loss


def test_extra_arguments_at_the_call():
    assert to_float(shifted(10)(Y_TRUE, Y_PRED, shift=1)) == 6
    assert to_float(shifted()(y_true=Y_TRUE, y_pred=Y_PRED, shift=np.ones(2))) == 6
    assert to_float(masked()(Y_TRUE, Y_PRED, mask=np.array([[True], [False]]))) == 0.5
    weights = np.array([1.0, 0.0])
    assert to_float(shifted(10)(Y_TRUE, Y_PRED, sample_weight=weights, shift=1)) == 1
    with pytest.raises(ArgumentError, match="shifted was called with 'shfit'.*mean 'shift'"):
        shifted(10)(Y_TRUE, Y_PRED, shfit=1)


def test_parameter_called_self():
    assert to_float(flexible(self=1)(Y_TRUE, Y_PRED, self=2)) == 7


def test_order_of_precedence():
    loss, batch = scaled(power=2.0), {"scale": np.array([2.0, 2.0]), "power": 1.0}
    assert to_float(loss(Y_TRUE, Y_PRED)) == 5  # default scale
    assert to_float(scaled(3)(Y_TRUE, Y_PRED)) == 15  # bound before default
    assert to_float(scaled(3)(Y_TRUE, Y_PRED, batch)) == 4  # batch before bound
    assert to_float(scaled(3)(Y_TRUE, Y_PRED, batch, scale=1.0)) == 2  # call before batch


def test_missing_argument():
    with pytest.raises(ArgumentError) as error:
        masked()(Y_TRUE, Y_PRED)
    assert message_of(error.value) == (
        "masked needs a value for 'mask'. Bind it, masked(mask=...). Or give it with the batch, "
        "fit(x, y, sample_weight={'mask': ...}), also for validation and evaluate; a loss in "
        "metrics=[...] gets nothing from the batch."
    )


def test_unknown_entry_of_the_batch():
    with pytest.raises(BatchError) as error:
        masked()(Y_TRUE, Y_PRED, {"maks": Y_TRUE})
    text = message_of(error.value)
    assert text.startswith(
        "The batch (third element of the data) has an entry 'maks', which masked"
    )
    assert "Did you mean 'mask'?" in text
    assert text.endswith("add **extra to its parameters.")


def test_entry_of_the_batch_without_a_name():
    with pytest.raises(BatchError, match="has an entry 0, which masked does not take"):
        masked()(Y_TRUE, Y_PRED, {0: Y_TRUE})
    with pytest.raises(BatchError, match="has an entry 0, which flexible does not take"):
        flexible()(Y_TRUE, Y_PRED, {"a": Y_TRUE, 0: Y_TRUE})


def test_arrays_that_are_no_tensors():
    loop = []
    loop.append(loop)
    for value, text in (
        (np.zeros(2, object), "'what' is an array of object"),
        (np.zeros(2, "longdouble"), "'what' is an array of float128"),
        (np.ma.zeros(2), "'what' is a masked array"),
        (loop, "'what' is nested more than 32 deep, or in itself"),
    ):
        with pytest.raises(ArgumentError, match=text):
            described()(Y_TRUE, Y_PRED, what=value)
    if BACKEND == "torch":
        with pytest.raises(ArgumentError, match="'what' is an array of uint64, of which torch"):
            described(what=np.zeros(2, "uint64"))(Y_TRUE, Y_PRED)
    with pytest.raises(ArgumentError, match="'what' of described.. is nested more than 32 deep"):
        described(what=loop)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_small_floats_reach_the_function_in_the_dtype_of_the_loss(dtype):
    seen = []

    @with_args
    def watching(y_true, y_pred, value):
        seen.append(keras.backend.standardize_dtype(value.dtype))
        return ops.mean(value * ops.square(y_true - y_pred), axis=-1)

    array = np.array([1.5], ml_dtypes.finfo(dtype).dtype)
    assert to_float(watching(array)(Y_TRUE, Y_PRED)) == 7.5
    assert seen == ["float32"]


def test_entry_of_the_batch_that_is_none():
    with pytest.raises(BatchError, match="The batch entry 'mask' for masked is None. Leave it out"):
        masked()(Y_TRUE, Y_PRED, {"mask": None})


@pytest.mark.parametrize("batch", [Y_PRED[:, 0], {"sample_weight": Y_PRED[:, 0]}, [1.0, 3.0]])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_with_weights_of_samples(batch, shape):
    @with_args
    def lumped(y_true, y_pred):
        return ops.reshape(ops.mean(ops.square(y_true - y_pred)), shape)

    with pytest.raises(BatchError) as error:
        lumped()(Y_TRUE, Y_PRED, batch)
    assert message_of(error.value).startswith(
        "lumped returned one number for the whole batch, and was given weights for its samples"
    )
    assert to_float(lumped()(Y_TRUE[:1], Y_PRED[:1], 2.0)) == 2


def test_batch_of_one_sample_with_its_weight():
    assert to_float(shifted(1)(Y_TRUE[:1], Y_PRED[:1], np.array([3.0]))) == 6


def test_scalar_loss_without_weights_of_samples():
    assert to_float(total()(Y_TRUE, Y_PRED)) == 5
    assert to_float(total()(Y_TRUE, Y_PRED, 2.0)) == 10
    assert to_float(total()(Y_TRUE, Y_PRED, {})) == 5


def test_loss_as_an_argument():
    loss = composed(main=shifted(1), weight=2.0)
    assert to_float(loss(Y_TRUE, Y_PRED)) == 12
    assert loss.args["main"] is shifted(1)
    assert loss == composed(weight=2.0, main=shifted(1))


def test_call_gives_the_loss_of_each_sample():
    np.testing.assert_allclose(
        ops.convert_to_numpy(shifted(1).call(ops.array(Y_TRUE), ops.array(Y_PRED))), [2, 10]
    )


def test_error_of_the_function_comes_through():
    @with_args
    def failing(y_true, y_pred, divisor):
        return 1 / divisor

    with pytest.raises(ZeroDivisionError):
        failing(0)(Y_TRUE, Y_PRED)


def test_threads_never_see_each_others_arguments():
    loss, wrong = shifted(0), []

    def work(number):
        values = {to_float(loss(Y_TRUE, Y_PRED, shift=number)) for _ in range(50)}
        if values != {5 + number}:
            wrong.append(values)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_get_the_same_object():
    bound, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        bound.extend(losses.described(what=number) for number in range(200))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(loss) for loss in bound}) == 200


@pytest.mark.fit
def test_symbolic_tensor_from_outside():
    x = keras.Input((3,))
    hidden = keras.layers.Dense(2)(x)

    def reads_hidden(y_true, y_pred):
        return keras.losses.mean_squared_error(y_true, y_pred) + keras.ops.mean(hidden)

    model = keras.Model(x, keras.layers.Dense(1)(hidden))
    model.compile("sgd", loss=with_args(reads_hidden)())
    for _ in range(2):
        with pytest.raises(ArgumentError, match="reads_hidden uses a symbolic tensor"):
            model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
