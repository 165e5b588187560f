"""On a GPU, losses give the numbers of the CPU, and their values stay there.

Skipped where the backend sees no GPU: CI's versions of the backends are for CPUs.
"""

import contextlib

import keras
import numpy as np
import pytest
from measuring import accelerators

import vaes
from helpers import BACKEND
from lossargs import live_args
from losses import shifted

pytestmark = [pytest.mark.fit, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def gpu():
    if BACKEND == "numpy" or not accelerators():
        pytest.skip("no GPU")


def is_on_gpu(variable):
    if BACKEND == "jax":
        return all(device.platform != "cpu" for device in variable.value.devices())
    if BACKEND == "tensorflow":
        return "GPU" in variable.value.device
    return variable.value.device.type == "cuda"


def trained(where):
    with where:
        beta = keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0)
        model, loss = vaes.model_and_loss(beta, sampled=False)
        model.compile(keras.optimizers.SGD(0.01), loss=loss)
        x = vaes.data()
        history = model.fit(x, x, batch_size=10, shuffle=False, epochs=3, verbose=0).history
    return history, model


def test_numbers_of_the_cpu():
    on_gpu, _ = trained(contextlib.nullcontext())
    on_cpu, _ = trained(keras.device("cpu"))
    assert len(on_gpu["loss"]) == 3
    for name, values in on_cpu.items():
        np.testing.assert_allclose(on_gpu[name], values, rtol=1e-3, err_msg=name)


def test_live_values_stay_on_the_gpu():
    _, model = trained(contextlib.nullcontext())
    variables = [*live_args(model).values(), *model.variables]
    # TensorFlow keeps integers, such as counters, in the memory of the CPU.
    assert all(is_on_gpu(v) for v in variables if "int" not in v.dtype)


def test_a_bound_array_meets_tensors_of_the_gpu():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", loss=shifted(np.float32([1.0])))
    x, y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")
    expected = np.mean((y - model.predict(x, verbose=0)) ** 2) + 1
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-3)
