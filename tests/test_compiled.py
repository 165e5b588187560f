"""The compiled step of a loss with constants is that of the hand-written closure."""

import keras
import numpy as np
import pytest
from keras import ops

from helpers import BACKEND, KERAS, linear_model, operations_of_train_step
from lossargs import with_args

pytestmark = pytest.mark.fit


def shifted(y_true, y_pred, shift, scale):
    return scale * ops.mean(ops.square(y_true - y_pred), axis=-1) + shift


def closure(shift, scale):
    def loss(y_true, y_pred):
        return scale * ops.mean(ops.square(y_true - y_pred), axis=-1) + shift

    return loss


def step_with(loss, data):
    model = linear_model()
    model.compile(keras.optimizers.SGD(0.1), loss=loss)
    return len(operations_of_train_step(model, (data.x, data.y)))


def test_same_program_as_the_closure(data):
    of_closure = step_with(closure(10.0, 2.0), data)
    for shift in (10.0, 10, np.float32(10)):
        assert step_with(with_args(shifted)(shift, scale=2.0), data) == of_closure

    def longer(y_true, y_pred):
        return shifted(y_true, y_pred, 10.0, 2.0) + ops.sum(ops.exp(y_pred), axis=-1)

    assert step_with(longer, data) > of_closure  # the comparison can fail


def test_a_step_is_traced_once(data):
    traces = []

    @with_args
    def counting(y_true, y_pred, *, shift, mask):
        if BACKEND != "torch":  # where nothing is traced, the function runs each time
            traces.append(type(mask).__name__)
        return ops.mean(ops.square(y_true - y_pred), axis=-1) * mask + shift

    model = linear_model()
    model.compile("sgd", loss=counting(shift=10))
    counts = []
    for _ in range(5):
        model.train_on_batch(data.x, data.y, sample_weight={"mask": data.weight})
        counts.append(len(traces))
    assert counts == [counts[0]] * 5
    assert counts[0] <= 3


@pytest.mark.skipif(BACKEND != "torch" or KERAS < (3, 12), reason="torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_torch_compiles_as_often_as_for_a_closure():
    """Also where the model is several graphs."""
    import torch
    from torch._dynamo.utils import counters

    x, graphs = np.ones((32, 4), "float32"), []
    for loss in (with_args(shifted)(10, 1), closure(10, 1)):
        torch.compiler.reset()
        counters.clear()
        inputs = keras.Input((4,))
        # Random numbers break the graph: `y_pred` is not made in the graph of the loss.
        noisy = keras.layers.GaussianNoise(0.1)(keras.layers.Dense(4)(inputs))
        model = keras.Model(inputs, noisy)
        model.compile("sgd", loss=loss, jit_compile=True)
        graphs.append([])
        # Not by pytest's monkeypatch: undone, it leaves torch without the setting.
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            for _ in range(3):
                model.fit(x, x, batch_size=8, verbose=0)
                graphs[-1].append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]
    assert 0 < graphs[0][0] == graphs[0][-1]
