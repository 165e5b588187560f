"""What one call of a loss checks, and what it says when something is wrong."""

import sys

import keras
import numpy as np
import pytest
from keras import ops

import losses
from helpers import BACKEND, KERAS, attached, fixed, logs_of, raising, step_itself, to_float
from lossargs import ArgumentError, BatchError, LossArgs, attach, with_args

X, Y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")
each = pytest.mark.parametrize


def network(loss):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", loss=loss)
    return model


# ---- Entries that broadcast ----


@with_args
def weighted(y_true, y_pred, w):
    return w * ops.square(y_true - y_pred)


def test_entry_that_makes_a_square():
    model = network(weighted())
    with pytest.raises(BatchError, match=r"'w' of shape \((8|None),\).*e\.g\. w\[:, None\]"):
        model.evaluate(X, Y, sample_weight={"w": np.arange(8.0)}, verbose=0)
    model.evaluate(X, Y, sample_weight={"w": np.ones((8, 1))}, verbose=0)


def contrastive(y_true, y_pred, group):
    same = ops.equal(ops.reshape(group, (-1, 1)), ops.reshape(group, (1, -1)))
    return ops.cast(same, "float32") * ops.matmul(y_pred, ops.transpose(y_pred))


def ranked(y_true, y_pred, group):
    assert len(group.shape) == 1
    return ops.square(y_true - y_pred) - ops.expand_dims(group, 0)


def pairs(y_true, y_pred, group):
    difference = group[:, None] - group[None]
    return ops.square(ops.matmul(y_pred, ops.transpose(y_pred)) - difference)


def square(y_true, y_pred, group):
    """Takes an entry that is a square itself."""
    return group * ops.square(ops.matmul(y_pred, ops.transpose(y_pred)))


ROW, SQUARE = np.arange(8, dtype="float32"), np.arange(64, dtype="float32").reshape(8, 8)


@each(("function", "group"), [(contrastive, ROW), (ranked, ROW), (pairs, ROW), (square, SQUARE)])
def test_entry_whose_square_is_on_purpose(function, group):
    model = network(with_args(function)())
    tensors = map(ops.convert_to_tensor, (Y, model(X), group))
    expected = to_float(ops.mean(function(*tensors)))
    got = model.evaluate(X, Y, sample_weight={"group": group}, batch_size=8, verbose=0)
    assert got == pytest.approx(expected, rel=1e-5)


# ---- Functions and losses ----


def test_what_is_no_loss():
    loss = with_args(lambda y_true, y_pred: lambda: None)()
    with pytest.raises(ArgumentError, match="returns a function.*Move the extra arguments"):
        network(loss).evaluate(X, Y, verbose=0)
    two = with_args(lambda y_true, y_pred, a, b: a + b)
    for factory in (losses.shifted, losses.scaled, two):
        with raising(ArgumentError, "loss="):
            network(factory).evaluate(X, Y, verbose=0)
    with pytest.raises(ArgumentError, match="is a loss, not a number"):
        np.asarray(losses.shifted(1.0))


def test_stand_ins_without_a_model():
    """Where Keras finds out the shape of a layer that calls a loss."""

    class Evaluating(keras.layers.Layer):
        def call(self, x):
            return losses.shifted(1.0)(x, x)

    assert Evaluating()(keras.Input((3,))).shape == ()


def test_inner_loss_is_the_bound_one():
    inner, seen = losses.shifted(1.0), []
    with_args(lambda y_true, y_pred, main: (seen.append(main), 0.0)[1])(inner)(Y, Y)
    assert seen[0] == inner == seen[0]
    assert (hash(seen[0]), seen[0].name) == (hash(inner), "shifted")


def test_objects_that_cannot_be_compared_stay_apart():
    class Unpicklable:
        def __eq__(self, other):
            return isinstance(other, Unpicklable)

        def __hash__(self):
            return 0

    values = Unpicklable(), Unpicklable()
    bound = [losses.described(what=value) for value in values]
    for loss, value in zip(bound, values, strict=True):
        assert losses.described(what=value) is loss
        assert loss.args["what"] is value


@pytest.mark.skipif(KERAS < (3, 15), reason="older Keras hides the error of stand-ins")
def test_loss_of_another_model_beside_an_attached_one():
    one, other = losses.shifted(keras.Variable(1.0)), losses.masked()
    kept = LossArgs(other)  # of another model
    x = keras.Input((3,))
    outputs = {"a": keras.layers.Dense(1)(x), "b": keras.layers.Dense(1)(x)}
    model = keras.Model(x, {**outputs, "a": attach(outputs["a"], one)})
    model.compile("sgd", loss={"a": one, "b": other})
    with pytest.raises(ArgumentError, match="masked needs a value for 'mask'"):
        model.evaluate(X, {"a": Y, "b": Y}, verbose=0)
    assert kept.loss is other


# ---- Steps of a kind of their own ----


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile")
def test_step_that_torch_compiles(data, monkeypatch):
    """What `torch.compile` traces, is not measured by coverage; here the same runs as it is."""
    model = attached(losses.flexible(live=fixed(2.0), step=step_itself()))
    monkeypatch.setattr(sys.modules["torch"].compiler, "is_compiling", lambda: True)
    for step in range(3):
        model.reset_metrics()
        assert model.train_on_batch(data.x, data.y, return_dict=True)["step"] == step
        assert logs_of(model, data.x, data.y)["step"] == step + 1
