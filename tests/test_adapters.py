"""A new kind of argument, added from outside: it is kept, saved, loaded and logged as any."""

import json
import textwrap

import keras
import numpy as np
import pytest
from keras import ops

import kinds
import losses
from helpers import linear_model, predictions, run_python
from lossargs import Adapter, ArgumentError, AttachError, LossArgs, attach

pytestmark = pytest.mark.fit


def averaging_model():
    network = linear_model()
    rewards = keras.Input((), name="rewards")
    loss = losses.shifted(kinds.MovingAverage(rewards, decay=0.5))
    model = attach(network, loss)
    model.compile(keras.optimizers.SGD(0.0), loss=loss)
    return model, loss


def steps(model, data, rewards):
    averages = []
    for reward in rewards:
        model.reset_metrics()
        inputs = [data.x, np.full(12, reward, "float32")]
        averages.append(model.train_on_batch(inputs, data.y, return_dict=True)["shift"])
    return averages


def test_moving_average_of_a_batch_value(data):
    model, loss = averaging_model()
    assert steps(model, data, [8, 8, 0]) == [4, 6, 3]
    logs = model.evaluate([data.x, np.ones(12)], data.y, verbose=0, return_dict=True)
    assert logs["shift"] == 2  # which does not count
    error = np.mean((data.y - predictions(data.x)) ** 2)
    assert logs["loss"] == pytest.approx(error + 2, rel=1e-5)
    assert steps(model, data, [1]) == [2]
    assert repr(loss) == "shifted(shift=<MovingAverage>)"


LOAD = """
    import json, keras, kinds, losses
    import numpy as np
    model = keras.saving.load_model({path!r})
    x = np.zeros((12, 3), "float32")
    logs = model.train_on_batch([x, np.ones(12, "float32")], x[:, :2], return_dict=True)
    print(json.dumps(float(logs["shift"])))
"""


def test_it_is_saved_and_loaded(data, tmp_path):
    model, _ = averaging_model()
    steps(model, data, [8, 8])
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert steps(loaded, data, [0, 1]) == [3, 2]
    output = run_python(textwrap.dedent(LOAD.format(path=path)))
    assert json.loads(output.splitlines()[-1]) == 3.5


def test_type_that_an_adapter_adapts(data, tmp_path):
    loss = losses.shifted(kinds.Countdown(3))
    model = attach(linear_model(), loss)
    model.compile(keras.optimizers.SGD(0.0), loss=loss)
    seen = []
    for _ in range(4):
        model.reset_metrics()
        seen.append(model.train_on_batch(data.x, data.y, return_dict=True)["shift"])
    assert seen == [3, 2, 1, 0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(data.x, data.y, verbose=0, return_dict=True)["shift"] == 0


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
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert logs["shift"] == pytest.approx(data.x.sum(axis=1).mean(), rel=1e-4)


def test_adapter_without_its_tensor():
    with pytest.raises(AttachError, match="'shift' of .* reads one, and this call of LossArgs giv"):
        attach(linear_model(), losses.shifted(kinds.MovingAverage()))


def test_adapter_without_a_value(data):
    loss = losses.shifted(Adapter())
    with pytest.raises(NotImplementedError, match="Adapter has to say in .value. what"):
        attach(linear_model(), loss)(data.x)


def test_an_adapter_of_no_symbolic_tensor():
    text = r"MovingAverage was given array\(.*, and reads a symbolic tensor. Give the output of a "
    with pytest.raises(ArgumentError, match=text):
        kinds.MovingAverage(np.ones(3))
