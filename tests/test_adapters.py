"""A new kind of argument, added from outside: it is kept, saved, loaded and logged as any."""

import keras
import numpy as np
import pytest
from keras import ops

import kinds
import losses
import networks
from helpers import attached, error_of, linear_model, logs_of
from lossargs import Adapter, ArgumentError, AttachError, LossArgs, SavingError, attach

pytestmark = pytest.mark.fit


def test_moving_average_of_a_batch_value(data):
    model = kinds.averaging_model()
    assert kinds.averages(model, [8, 8, 0]) == [4, 6, 3]
    logs = logs_of(model, [data.x, np.ones(12)], data.y)  # which does not count
    assert logs == pytest.approx({"loss": error_of(data) + 2, "shift": 2}, rel=1e-5)
    assert kinds.averages(model, [1]) == [2]
    assert repr(model.loss) == "shifted(shift=<MovingAverage>)"


def test_type_that_an_adapter_adapts(data, tmp_path):
    model = attached(losses.shifted(kinds.Countdown(3)))
    seen = []
    for _ in range(4):
        model.reset_metrics()
        seen.append(model.train_on_batch(data.x, data.y, return_dict=True)["shift"])
    assert seen == [3, 2, 1, 0]
    assert logs_of(networks.saved(model, tmp_path), data.x, data.y)["shift"] == 0


def test_tensor_given_in_a_call_of_the_layer(data):
    class Subclassed(keras.Model):
        def __init__(self, loss):
            super().__init__()
            self.dense = keras.layers.Dense(2)
            self.loss_args = LossArgs(loss)

        def call(self, x):
            return self.loss_args(self.dense(x), shift=ops.sum(x, axis=-1))

    loss = losses.shifted(kinds.MovingAverage(decay=0.0))
    model = Subclassed(loss)
    model.compile("sgd", loss=loss)
    shift = logs_of(model, data.x, data.y)["shift"]
    assert shift == pytest.approx(data.x.sum(axis=1).mean(), rel=1e-4)


def test_object_that_an_adapter_hands_over(tmp_path):
    loss = networks.centred(kinds.Handing(networks.part_of("centre loss", None)))
    model, by_hand = attached(loss, rate=0.05), networks.by_hand("centre loss")
    by_hand.compile(keras.optimizers.SGD(0.05))
    networks.assert_trained_alike(model, by_hand)
    before = networks.weights_of(model)
    model.evaluate(networks.X, networks.Y, batch_size=8, verbose=0)
    np.testing.assert_equal(networks.weights_of(model), before)
    loaded = networks.saved(networks.saved(model, tmp_path), tmp_path)
    networks.assert_trained_alike(loaded, by_hand)


class Constant(Adapter):
    """Has a value that does not change."""

    shape, number = (), 1.0

    def __init__(self, held, **kwargs):
        super().__init__(**kwargs)

    def value(self, tensor, training):
        return ops.convert_to_tensor(self.number)


class Held:
    pass


def test_adapters_that_would_load_without_an_argument(tmp_path):
    class OfHeld(Constant):
        adapts = Held

    for value, words in (
        (Constant(2.0), r"Constant has no get_config.* without 'held'\. .*'held': self\.held}"),
        (Held(), "OfHeld has no get_config.* without 'held'"),
    ):
        model = attach(linear_model(), losses.shifted(value))
        with pytest.raises(SavingError, match=words):
            model.save(tmp_path / "model.keras")


def test_adapter_with_any_arguments():
    class Any(Adapter):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    assert Any(name="given").get_config()["name"] == "given"


def test_last_adapter_of_a_type(data):
    """A notebook cell that defines one is run again."""
    held = Held()
    for constant in (1.0, 2.0):

        class OfHeld(Constant):
            adapts, number = Held, constant

        assert logs_of(attached(losses.shifted(held)), data.x, data.y)["shift"] == constant


def test_adapters_that_are_wrong(data):
    with pytest.raises(AttachError, match="'shift'"):
        attach(linear_model(), losses.shifted(kinds.MovingAverage()))
    with pytest.raises(NotImplementedError, match="Adapter does not define .value"):
        attach(linear_model(), losses.shifted(Adapter()))(data.x)
    with pytest.raises(ArgumentError, match=r"MovingAverage was given array\(.*symbolic tensor"):
        kinds.MovingAverage(np.ones(3))
