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
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert logs_of(loaded, data.x, data.y)["shift"] == 0


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
    logs = logs_of(model, data.x, data.y)
    assert logs["shift"] == pytest.approx(data.x.sum(axis=1).mean(), rel=1e-4)


def test_object_that_an_adapter_hands_over(tmp_path):
    loss = networks.centred(centres=kinds.Handing(networks.part_of("centre loss", None)))
    model = attach(linear_model(), loss)
    model.compile(keras.optimizers.SGD(0.05), loss=loss)
    by_hand = networks.by_hand("centre loss")
    by_hand.compile(keras.optimizers.SGD(0.05))
    for _ in range(2):
        expected = networks.fitted(by_hand)["loss"]
        assert networks.fitted(model)["loss"] == pytest.approx(expected, rel=1e-5)
        before = [np.array(variable) for variable in model.weights]
        model.evaluate(networks.X, networks.Y, verbose=0)
        np.testing.assert_equal([np.array(variable) for variable in model.weights], before)
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")


def test_adapter_without_a_config_of_its_arguments(tmp_path):
    class Shifting(Adapter):
        shape = ()

        def __init__(self, by, **kwargs):
            super().__init__(**kwargs)
            self.by = by

        def value(self, tensor, training):
            return ops.convert_to_tensor(self.by)

    model = attach(linear_model(), losses.shifted(Shifting(2.0)))
    words = r"Shifting has no get_config, and would load without 'by'\. .*'by': self\.by}"
    with pytest.raises(SavingError, match=words):
        model.save(tmp_path / "model.keras")


def test_adapter_that_loads_without_the_object(tmp_path):
    class Held:
        pass

    class OfHeld(Adapter):
        adapts = Held

        def __init__(self, held, **kwargs):
            super().__init__(**kwargs)

        def value(self, tensor, training):
            return ops.ones(())

    model = attach(linear_model(), losses.shifted(Held()))
    with pytest.raises(SavingError, match="OfHeld has no get_config.* without 'held'"):
        model.save(tmp_path / "model.keras")


def test_adapter_with_any_arguments():
    class Any(Adapter):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    assert Any().get_config()["name"] == "any"


class Thing:
    pass


THING = Thing()


def test_last_adapter_of_a_type(data):
    """A notebook cell that defines one is run again."""
    for constant in (1.0, 2.0):

        class OfThing(Adapter):
            adapts = Thing
            shape = ()
            factor = constant

            def __init__(self, thing, **kwargs):
                super().__init__(**kwargs)

            def value(self, tensor, training):
                return ops.convert_to_tensor(self.factor)

        logs = logs_of(attached(losses.shifted(THING)), data.x, data.y)
        assert logs["shift"] == constant


def test_adapters_that_are_wrong(data):
    with pytest.raises(AttachError, match="'shift'"):
        attach(linear_model(), losses.shifted(kinds.MovingAverage()))
    with pytest.raises(NotImplementedError, match="Adapter does not define .value"):
        attach(linear_model(), losses.shifted(Adapter()))(data.x)
    with pytest.raises(ArgumentError, match=r"MovingAverage was given array\(.*symbolic tensor"):
        kinds.MovingAverage(np.ones(3))
