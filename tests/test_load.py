"""Many steps, threads, models and arguments: nothing grows, nothing mixes."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import losses
from helpers import (
    BACKEND,
    attached,
    error_of,
    fixed,
    linear_model,
    objects_of_lossargs,
    to_float,
    values_on_tensors,
)
from lossargs import live_args, with_args

THREADS = 16
STATM = Path("/proc/self/statm")


def make_data(samples):
    rng = np.random.default_rng(0)
    x, y, more = rng.normal(size=(3, samples, 4)).astype("float32")
    return x, y[:, :2], {"advantage": more[:, 0]}


def attached_model(**live):
    x = keras.Input((4,))
    code = keras.layers.Dense(8, "tanh")(x)
    live = {
        "offset": 1.0,
        "live": fixed(0.5),
        "schedule": keras.optimizers.schedules.PolynomialDecay(0.0, 100, 1.0),
        "code": ops.mean(code**2, axis=-1),
        **live,
    }
    return attached(losses.flexible(**live), keras.Model(x, keras.layers.Dense(2)(code)), 0.01)


# Memory over many steps


class Measuring(keras.callbacks.Callback):
    """Assigns a live value now and then, and measures after each epoch."""

    def on_train_begin(self, logs=None):
        self.objects, self.memory = [], []

    def on_train_batch_end(self, batch, logs=None):
        if batch % 10 == 0:
            live_args(self.model)["live"].assign(batch / 1000)

    def on_epoch_end(self, epoch, logs=None):
        gc.collect()
        self.objects.append(len(gc.get_objects()))
        self.memory.append(int(STATM.read_text().split()[1]) * 4096 if STATM.exists() else 0)


def grows(values, steps, limit):
    """Whether more than `limit` was added in each of the steps since the first quarter."""
    quarter = len(values) // 4
    return min(values[-quarter:]) - min(values[quarter : 2 * quarter]) > limit * steps * 2 * quarter


@pytest.mark.fit
@pytest.mark.parametrize("leaking", [False, True])
@pytest.mark.parametrize(
    ("epochs", "steps"), [(4, 25), pytest.param(20, 1000, marks=pytest.mark.nightly)]
)
def test_steps_leave_nothing_behind(epochs, steps, leaking):
    """What leaks on purpose is seen."""
    measured, kept = Measuring(), []
    leak = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: kept.append([bytes(1000)])
    )
    x, y, more = make_data(2 * steps)
    model = attached_model()
    model.fit(
        x, y, sample_weight=more, batch_size=2, epochs=epochs, shuffle=False, verbose=0,
        callbacks=[leak, measured] if leaking else [measured],
    )  # fmt: skip
    step = next(v for v in model.non_trainable_variables if v.path.endswith("/step"))
    assert to_float(step) == epochs * steps
    assert grows(measured.objects, steps, 0.1) == leaking, measured.objects
    if steps == 1000:  # fewer show nothing beside what the allocators do
        assert grows(measured.memory, steps, 400) == leaking, measured.memory
    assert not values_on_tensors()


# Threads

MEETING = threading.Barrier(THREADS, timeout=60)


def in_threads(function):
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, range(THREADS)))


@with_args
def meeting(y_true, y_pred, *, shift):
    MEETING.wait()  # all threads are in the call now, each with its own values
    return ops.mean(ops.square(y_true - y_pred), axis=-1) + shift


@pytest.mark.parametrize("calls", [20, pytest.param(500, marks=pytest.mark.nightly)])
def test_threads_never_see_each_others_arguments(calls):
    y, loss = np.zeros((4, 2), "float32"), meeting(shift=7.0)

    def call(thread):
        pred = np.full((4, 2), thread, "float32")
        return [to_float(loss(y, pred, shift=1000 * thread + n)) for n in range(calls)]

    expected = [[t**2 + 1000 * t + n for n in range(calls)] for t in range(THREADS)]
    assert in_threads(call) == expected


def test_threads_that_bind_equal_constants_get_one_object():
    def bind(thread):
        MEETING.wait()
        return [losses.shifted(1000.5 + number) for number in range(200)]

    for same in zip(*in_threads(bind), strict=True):
        assert all(loss is same[0] for loss in same)


def test_threads_share_an_attached_model():
    model = attached_model(offset=2.0, live=fixed(3.0), schedule=0.5)
    inputs = np.random.default_rng(0).normal(size=(THREADS, 5, 4)).astype("float32")
    target = np.zeros((5, 2), "float32")

    def value(thread):
        y_pred = model(inputs[thread])
        MEETING.wait()  # the predictions of all threads carry what their losses need
        return to_float(model.loss(target, y_pred, advantage=np.full(5, thread, "float32")))

    weights = [ops.convert_to_numpy(v.value) for v in model.trainable_variables]
    expected = []
    for thread, batch in enumerate(inputs):
        hidden = np.tanh(batch @ weights[0] + weights[1])
        pred = hidden @ weights[2] + weights[3]
        expected.append(np.mean(pred**2) + 2 + 3 + thread + 0.5 + np.mean(hidden**2))
    np.testing.assert_allclose(in_threads(value), expected, rtol=1e-5)
    gc.collect()
    assert not values_on_tensors()


# Models


def alive():
    """How many objects of lossargs' own classes are alive."""
    keras.backend.clear_session()
    gc.collect()
    return objects_of_lossargs()


@pytest.mark.fit
@pytest.mark.parametrize("count", [2, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.filterwarnings("ignore")  # TensorFlow: that many steps are traced
def test_models_that_are_dropped_leave_nothing(count):
    data = make_data(4)
    attached_model().train_on_batch(*data)  # to warm up
    before = alive()
    model = attached_model()
    model.train_on_batch(*data)
    kinds = alive() - before  # one that is kept is seen
    assert kinds["BoundLoss"] == kinds["LossArgs"] == kinds["VariableAdapter"] == 1
    del model
    for _ in range(count - 1):
        attached_model().train_on_batch(*data)
    kinds = alive() - before
    if BACKEND == "tensorflow":
        # TensorFlow keeps the graph of a step, and with it a tensor and what that carries, which
        # is neither the loss, the layer nor the model.
        assert kinds.pop("Step", 0) + kinds.pop("StepValues", 0) <= 2 * (count + 1)
    assert not kinds


# Arguments


@pytest.mark.fit
def test_64_live_arguments(data, tmp_path):
    network, live = linear_model(), {}
    for n in range(16):
        live |= {f"v{n}": fixed(float(n)), f"t{n}": keras.Variable(0.5 * n)}
        live[f"s{n}"] = keras.optimizers.schedules.PolynomialDecay(float(n), 10, 0.0)
        live[f"x{n}"] = ops.mean(network.inputs[0] * n, axis=-1)
    model = attached(losses.flexible(**live), network, 0.01)

    logs = model.train_on_batch(data.x, data.y, return_dict=True)
    rest = sum(range(16)) * (1 + 0.5 + 1 + np.mean(data.x))
    assert logs["loss"] == pytest.approx(error_of(data) + rest, rel=1e-5)
    for number in range(16):
        assert logs[f"v{number}"] == logs[f"s{number}"] == number
        assert logs[f"t{number}"] == 0.5 * number  # of the step, before it was trained
        assert to_float(live[f"t{number}"]) == pytest.approx(0.5 * number - 0.01, abs=1e-6)
    live["v3"].assign(103.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    values, again = ({n: to_float(v) for n, v in live_args(m).items()} for m in (model, loaded))
    assert again == values
    assert (len(values), values["v3"]) == (32, 103.0)
    model.reset_metrics()  # the oldest Keras continues with the mean
    logs, again = (m.train_on_batch(data.x, data.y, return_dict=True) for m in (model, loaded))
    assert again.keys() == logs.keys()
    for name, value in again.items():
        assert value == pytest.approx(logs[name], rel=1e-6), name
    assert again["s10"] == pytest.approx(9.0)  # the second step
