"""Many steps, threads, models and arguments: nothing grows, nothing mixes."""

import collections
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import losses
from helpers import BACKEND, linear_model, predictions, to_float, values_on_tensors
from lossargs import attach, live_args, with_args

THREADS = 16
STATM = Path("/proc/self/statm")


@with_args
def everything(y_true, y_pred, offset, *, advantage, live, schedule, code):  # noqa: PLR0913
    error = ops.mean(ops.square(y_true - y_pred), axis=-1)
    return error + offset + live * advantage + schedule * ops.mean(ops.square(code), axis=-1)


def make_schedule():
    return keras.optimizers.schedules.PolynomialDecay(0.0, 100, 1.0)


def make_data(samples):
    rng = np.random.default_rng(0)
    x, y, more = rng.normal(size=(3, samples, 4)).astype("float32")
    return x, y[:, :2], {"advantage": more[:, 0]}


def network():
    x = keras.Input((4,))
    code = keras.layers.Dense(8, "tanh")(x)
    return x, code, keras.layers.Dense(2)(code)


def attached_model():
    x, code, y = network()
    live = keras.Variable(0.5, trainable=False)
    loss = everything(1.0, live=live, schedule=make_schedule(), code=code)
    model = keras.Model(x, attach(y, loss))
    model.compile("sgd", loss=loss)
    return model


class State(keras.layers.Layer):
    """The live values of `everything`, kept by hand."""

    def __init__(self):
        super().__init__()
        self.live = self.add_weight(shape=(), initializer="ones", trainable=False)
        self.step = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="int")
        self.schedule, self.built = make_schedule(), True


class ByHand(keras.Model):
    """What one would write without lossargs: an override of `compute_loss`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.state = State()
        self.logged = [keras.metrics.Mean(name=name) for name in ("live", "schedule")]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        (y_pred, code), live = y_pred, self.state.live
        schedule = self.state.schedule(self.state.step.value)
        self.state.step.assign_add(1)
        for metric, value in zip(self.logged, (live.value, schedule), strict=True):
            metric.update_state(value)
        y, advantage = (ops.convert_to_tensor(one) for one in (y, sample_weight["advantage"]))
        error = ops.mean(ops.square(y - y_pred), axis=-1)
        activity = ops.mean(ops.square(code), axis=-1)
        return ops.mean(error + 1.0 + live * advantage + schedule * activity)


def model_by_hand():
    x, code, y = network()
    model = ByHand(x, [y, code])
    model.compile("sgd")
    return model


# Memory over many steps


def resident_bytes():
    return int(STATM.read_text().split()[1]) * 4096


class Measuring(keras.callbacks.Callback):
    """Assigns a live value now and then, and measures after each epoch."""

    def __init__(self):
        super().__init__()
        self.objects, self.memory = [], []

    def on_train_batch_end(self, batch, logs=None):
        if batch % 10 == 0:
            live_args(self.model)["live"].assign(batch / 1000)

    def on_epoch_end(self, epoch, logs=None):
        gc.collect()
        self.objects.append(len(gc.get_objects()))
        if STATM.exists():
            self.memory.append(resident_bytes())


class Leaking(keras.callbacks.Callback):
    """Keeps something of each step, as code does that leaks."""

    def __init__(self, make):
        super().__init__()
        self.make, self.kept = make, []

    def on_train_batch_end(self, batch, logs=None):
        self.kept.append(self.make())


def trained(epochs, steps, *callbacks):
    measuring = Measuring()
    x, y, more = make_data(2 * steps)
    model = attached_model()
    model.fit(
        x, y, sample_weight=more, batch_size=2, epochs=epochs, shuffle=False, verbose=0,
        callbacks=[*callbacks, measuring],
    )  # fmt: skip
    step = next(v for v in model.non_trainable_variables if v.path.endswith("/step"))
    assert to_float(step) == epochs * steps
    return measuring


def grows(values, steps, limit):
    """Whether more than `limit` was added in each of the steps since the first quarter."""
    quarter = len(values) // 4
    return min(values[-quarter:]) - min(values[quarter : 2 * quarter]) > limit * steps * 2 * quarter


OBJECT, BYTES = 0.1, 400  # in each step; one kept tensor takes more


@pytest.mark.fit
@pytest.mark.parametrize(
    "epochs_and_steps", [(8, 25), pytest.param((20, 1000), marks=pytest.mark.nightly)]
)
def test_steps_leave_nothing_behind(epochs_and_steps):
    epochs, steps = epochs_and_steps
    measured = trained(epochs, steps)
    assert len(measured.objects) == epochs
    assert not grows(measured.objects, steps, OBJECT), measured.objects
    if steps == 1000:  # fewer show nothing beside what the allocators do
        assert not grows(measured.memory, steps, BYTES), measured.memory
    assert not values_on_tensors()


@pytest.mark.fit
def test_objects_that_are_left_behind_are_seen():
    measured = trained(8, 25, Leaking(lambda: [None]))
    assert grows(measured.objects, 25, OBJECT)


@pytest.mark.fit
@pytest.mark.nightly
def test_memory_that_is_left_behind_is_seen():
    measured = trained(8, 1000, Leaking(lambda: bytes(1000)))  # not one object to the collector
    assert grows(measured.memory, 1000, BYTES), measured.memory
    assert not grows(measured.objects, 1000, OBJECT)


# Threads


def in_threads(function):
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, range(THREADS)))


MEETING = threading.Barrier(THREADS, timeout=60)


@with_args
def meeting(y_true, y_pred, *, shift):
    MEETING.wait()  # all threads are in the call now, each with its own values
    return ops.mean(ops.square(y_true - y_pred), axis=-1) + shift


class Remembering(keras.losses.Loss):
    """As one would write it by hand: what a call is given is kept on the loss."""

    def __call__(self, y_true, y_pred, sample_weight=None, *, shift):
        self.shift = shift
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true, y_pred):
        MEETING.wait()
        return ops.mean(ops.square(y_true - y_pred), axis=-1) + self.shift


def values_seen(loss, calls):
    y = np.zeros((4, 2), "float32")

    def call(thread):
        pred = np.full((4, 2), thread, "float32")
        return [to_float(loss(y, pred, shift=1000 * thread + n)) for n in range(calls)]

    return in_threads(call)


@pytest.mark.parametrize("calls", [20, pytest.param(500, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("bound", [{}, {"shift": 7.0}])
def test_threads_never_see_each_others_arguments(calls, bound):
    expected = [[t**2 + 1000 * t + n for n in range(calls)] for t in range(THREADS)]
    assert values_seen(meeting(**bound), calls) == expected


def test_threads_see_them_where_the_loss_keeps_them():
    values = values_seen(Remembering(), 1)
    assert values != [[t**2 + 1000 * t] for t in range(THREADS)]


def test_threads_that_bind_equal_constants_get_one_object():
    def bind(thread):
        MEETING.wait()
        return [losses.shifted(1000.5 + number) for number in range(200)]

    for same in zip(*in_threads(bind), strict=True):
        assert all(loss is same[0] for loss in same)


def test_threads_share_an_attached_model():
    x, code, y = network()
    loss = everything(2.0, live=keras.Variable(3.0, trainable=False), schedule=0.5, code=code)
    model = keras.Model(x, attach(y, loss))
    inputs = np.random.default_rng(0).normal(size=(THREADS, 5, 4)).astype("float32")
    target = np.zeros((5, 2), "float32")

    def value(thread):
        y_pred = model(inputs[thread])
        MEETING.wait()  # the predictions of all threads carry what their losses need
        return to_float(loss(target, y_pred, advantage=np.full(5, thread, "float32")))

    weights = [ops.convert_to_numpy(v.value) for v in model.trainable_variables]
    expected = []
    for thread, batch in enumerate(inputs):
        hidden = np.tanh(batch @ weights[0] + weights[1])
        pred = hidden @ weights[2] + weights[3]
        expected.append(np.mean(pred**2) + 2 + 3 * thread + 0.5 * np.mean(hidden**2))
    np.testing.assert_allclose(in_threads(value), expected, rtol=1e-5)
    gc.collect()
    assert not values_on_tensors()


# Models


def left():
    """What is alive of lossargs' own classes, and how many objects there are in all."""
    keras.backend.clear_session()
    for _ in range(3):
        gc.collect()
    objects = gc.get_objects()
    kinds = collections.Counter(
        type(one).__name__
        for one in objects
        if str(getattr(type(one), "__module__", "")).startswith("lossargs.")
    )
    return kinds, len(objects)


def growth(make, count):
    """What `count` models leave behind that were made, trained for one step, and dropped."""
    x, y, more = make_data(4)
    for number in (1, count):  # the first to warm up
        before, objects = left()
        for _ in range(number):
            make().train_on_batch(x, y, more)
    after, objects_after = left()
    return after - before, objects_after - objects


@pytest.mark.fit
@pytest.mark.parametrize("count", [2, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.filterwarnings("ignore")  # TensorFlow: that many steps are traced
def test_models_that_are_dropped_leave_nothing(count):
    kinds, objects = growth(attached_model, count)
    if BACKEND == "tensorflow":
        # TensorFlow keeps the graph of a step, and with it a tensor and what that carries, which
        # is neither the loss, the layer nor the model.
        assert kinds.pop("Step", 0) + kinds.pop("StepValues", 0) <= 2 * (count + 1)
    assert not kinds
    if count == 200:  # of few, caches that still fill are the most
        _, by_hand = growth(model_by_hand, count)
        assert objects <= by_hand * 1.05 + 10


@pytest.mark.fit
def test_models_that_are_kept_are_seen():
    kept = []

    def keep():
        kept.append(attached_model())
        return kept[-1]

    kinds, _ = growth(keep, 2)
    assert kinds["BoundLoss"] == kinds["LossArgs"] == kinds["VariableAdapter"] == 2


# Arguments


@pytest.mark.fit
def test_64_live_arguments(data, tmp_path):
    x = keras.Input((3,))
    y = linear_model()(x)
    variables = {f"v{n}": keras.Variable(float(n), trainable=False) for n in range(16)}
    trainable = {f"t{n}": keras.Variable(0.5 * n) for n in range(16)}
    schedules = {
        f"s{n}": keras.optimizers.schedules.PolynomialDecay(float(n), 10, 0.0) for n in range(16)
    }
    tensors = {f"x{n}": ops.mean(x * n, axis=-1) for n in range(16)}
    loss = losses.flexible(**variables, **trainable, **schedules, **tensors)
    model = keras.Model(x, attach(y, loss))
    model.compile(keras.optimizers.SGD(0.01), loss=loss)
    assert len(model.layers[-1].adapters) == 64

    logs = model.train_on_batch(data.x, data.y, return_dict=True)
    error = np.mean((data.y - predictions(data.x)) ** 2)
    rest = sum(range(16)) * (1 + 0.5 + 1 + np.mean(data.x))
    assert logs["loss"] == pytest.approx(error + rest, rel=1e-5)
    for number in range(16):
        assert logs[f"v{number}"] == logs[f"s{number}"] == number
        assert logs[f"t{number}"] == 0.5 * number  # of the step, before it was trained
    for number, one in enumerate(trainable.values()):
        assert to_float(one) == pytest.approx(0.5 * number - 0.01, abs=1e-6)
    variables["v3"].assign(103.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert to_float(live_args(loaded)["v3"]) == 103.0
    model.reset_metrics()  # the oldest Keras goes on with the mean
    again = [m.train_on_batch(data.x, data.y, return_dict=True) for m in (model, loaded)]
    again = [{name: float(value) for name, value in logs.items()} for logs in again]
    assert again[1] == pytest.approx(again[0], rel=1e-6)
    assert again[1]["s10"] == pytest.approx(9.0)  # the second step
    live = [{n: to_float(v) for n, v in live_args(m).items()} for m in (model, loaded)]
    assert live[1] == pytest.approx(live[0], rel=1e-6)
    assert len(live[0]) == 32
