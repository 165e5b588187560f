"""What one call of a loss checks, and what it says when something is wrong."""

import copy
import pickle
import sys

import keras
import numpy as np
import pytest
from keras import ops

import losses
from helpers import BACKEND, KERAS, linear_model, predictions, to_float
from lossargs import (
    ArgumentError,
    AttachError,
    BatchError,
    LossArgs,
    SavingError,
    attach,
    live_args,
    with_args,
)
from lossargs._keras import running_step

pytestmark = pytest.mark.fit

X, Y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")


def squares(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


def network(loss, units=1):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(units)])
    model.compile("sgd", loss=loss)
    return model


@with_args
def weighted(y_true, y_pred, w):
    return w * ops.square(y_true - y_pred)


def test_entry_that_makes_a_square():
    model = network(weighted())
    with pytest.raises(BatchError, match=r"'w' of shape \((8|None),\).*e\.g\. w\[:, None\]"):
        model.evaluate(X, Y, sample_weight={"w": np.arange(8.0)}, verbose=0)
    model.evaluate(X, Y, sample_weight={"w": np.ones((8, 1))}, verbose=0)


def contrastive(y_true, y_pred, group, scale):
    same = ops.equal(ops.reshape(group, (-1, 1)), ops.reshape(group, (1, -1)))
    return ops.cast(same, "float32") * ops.matmul(y_pred, ops.transpose(y_pred)) * scale


def ranked(y_true, y_pred, group):
    assert len(group.shape) == 1
    return ops.square(y_true - y_pred) - ops.expand_dims(group, 0)


@pytest.mark.parametrize(
    ("function", "batch"),
    [
        (contrastive, {"group": np.arange(8.0), "scale": np.ones((8, 1))}),
        (ranked, {"group": np.arange(8.0)}),
    ],
)
def test_entry_whose_square_is_on_purpose(function, batch):
    logs = network(with_args(function)()).evaluate(X, Y, sample_weight=batch, verbose=0)
    assert np.isfinite(logs)


def makes_a_loss():
    return squares


def test_function_that_returns_a_function():
    loss = with_args(lambda y_true, y_pred: makes_a_loss)()
    with pytest.raises(ArgumentError, match="returns a function.*Move the extra arguments"):
        network(loss).fit(X, Y, verbose=0)


def test_stand_ins_without_a_model():
    """Where Keras finds out the shape of a layer that calls a loss."""

    class Evaluating(keras.layers.Layer):
        def call(self, x):
            return losses.shifted(1.0)(x, x)

    assert Evaluating()(keras.Input((3,))).shape == ()


def test_inner_loss_is_the_bound_one():
    inner = losses.shifted(1.0)
    seen = []

    @with_args
    def outer(y_true, y_pred, main):
        seen.append((main == inner, inner == main, hash(main) == hash(inner), main.name))
        return main(y_true, y_pred)

    outer(inner)(Y, Y)
    assert seen == [(True, True, True, "shifted")]


def test_predictions_of_a_model_with_another_loss(data):
    first, second = losses.shifted(keras.Variable(1.0)), losses.shifted(2.0)
    y_pred = attach(linear_model(), first)(data.x)
    error = np.mean((data.y - predictions(data.x)) ** 2)
    assert to_float(second(data.y, y_pred)) == pytest.approx(error + 2, rel=1e-5)


@pytest.mark.skipif(KERAS < (3, 15), reason="older Keras hides the error of stand-ins")
def test_loss_of_another_model_beside_an_attached_one():
    one, two = losses.shifted(keras.Variable(1.0)), losses.masked()
    kept = LossArgs(two)  # of another model
    x = keras.Input((3,))
    outputs = {"a": keras.layers.Dense(1)(x), "b": keras.layers.Dense(1)(x)}
    model = keras.Model(x, {**outputs, "a": attach(outputs["a"], one)})
    model.compile("sgd", loss={"a": one, "b": two})
    with pytest.raises(ArgumentError, match="masked needs a value for 'mask'"):
        model.evaluate(X, {"a": Y, "b": Y}, verbose=0)
    assert kept.loss is two


def test_model_that_is_a_layer_beside_an_argument():
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    x = keras.Input((3,))
    attached = attach(keras.Model(x, inner(x)), losses.described(what=x[:, 0]))
    assert len(attached.inputs) == 1


def test_tensors_of_another_number():
    x = keras.Input((3,))
    layer = LossArgs(losses.described(what=x))
    with pytest.raises(AttachError, match="was called with 2 tensors in a list, and reads 1"):
        layer(x, [x, x])


def test_legacy_format_is_refused(tmp_path):
    loss = losses.shifted(keras.Variable(1.0))
    with pytest.raises(SavingError, match=r"HDF5.*model\.save"):
        attach(linear_model(), loss).save(tmp_path / "model.h5")


def test_loss_is_no_array():
    with pytest.raises(ArgumentError, match="is a loss and no number"):
        np.asarray(losses.shifted(1.0))


class Unpicklable:
    def __init__(self):
        self.function = lambda: None

    def __eq__(self, other):
        return isinstance(other, Unpicklable)

    def __hash__(self):
        return 0


def test_objects_that_cannot_be_compared_stay_apart():
    one, two = Unpicklable(), Unpicklable()
    assert losses.described(what=one) is losses.described(what=one)
    assert losses.described(what=one).args["what"] is one
    assert losses.described(what=two).args["what"] is two


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copy_of_a_variable_after_fit(copied):
    value = keras.Variable(1.0, trainable=False, name="value")
    loss = losses.shifted(value)
    model = attach(linear_model(), loss)
    model.compile("sgd", loss=loss)
    model.fit(X, np.zeros((8, 2)), verbose=0)
    other = copied(value)
    value.assign(5.0)
    assert (float(other.numpy()), type(other)) == (1.0, keras.Variable)
    assert live_args(model)["shift"] is value


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile")
@pytest.mark.parametrize("training", [False, True])
def test_step_that_is_compiled(training, monkeypatch):
    torch = sys.modules["torch"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.set_grad_enabled(training):
        step = running_step()
    assert (step.model, step.training, step.keeps_state) == (None, training, True)


@pytest.mark.skipif(BACKEND != "jax", reason="steps that pass their state on")
def test_own_step_that_freezes_a_weight():
    class Own(keras.Sequential):
        def compute_loss_and_updates(self, trainable, fixed, x, y):
            y_pred, fixed = self.stateless_call(trainable, fixed, x, training=True)
            return self.compute_loss(x, y, y_pred), fixed

        def train_step(self, state, data):
            import jax

            trainable, fixed, optimizer, metrics = state
            step = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)
            (loss, fixed), gradients = step(trainable, fixed, *data[:2])
            trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
            return {"loss": loss}, (trainable, fixed, optimizer, metrics)

    model = Own([keras.Input((3,)), keras.layers.Dense(1)])

    @with_args
    def decay(y_true, y_pred, scale):
        return squares(y_true, y_pred) + scale * ops.sum(ops.square(model.layers[0].kernel))

    model.compile("sgd", loss=decay(0.1))
    with pytest.raises(
        ArgumentError, match=r"outside of the model's state.*stateless_compute_loss"
    ):
        model.train_on_batch(X, Y)
