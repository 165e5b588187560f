"""`schedule`: values, arguments, equality, losses and optimizers, files."""

import copy
import inspect
import json
import pickle
import sys

import keras
import numpy as np
import pytest
from keras import ops

import losses
import schedules
from helpers import (
    BACKEND,
    TESTS,
    each_writer,
    layer_of,
    linear_model,
    raising,
    run_python,
    to_float,
)
from lossargs import ArgumentError, LossArgsError, SavingError, attach, schedule
from schedules import cyclical, joined, warmup

sys.path.insert(0, str(TESTS / "models"))
import make_schedule

COSINE = keras.optimizers.schedules.CosineDecay(1.0, 10)


def cosine(step):
    return (1 + np.cos(np.pi * step / 10)) / 2


def reloaded(value):
    return keras.saving.deserialize_keras_object(
        json.loads(json.dumps(keras.saving.serialize_keras_object(value)))
    )


@schedule(package="tests")
def table(step, values, **extra):
    return ops.take(values, ops.cast(step, "int32")) + sum(extra.values())


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (warmup(4), lambda n: min((n + 1) / 4, 1)),
        (warmup(4, peak=3.0), lambda n: 3 * min((n + 1) / 4, 1)),
        (cyclical(6), lambda n: min((n % 6) / 3, 1)),
        (cyclical(6, ratio=1), lambda n: (n % 6) / 6),
        (joined([warmup(4), cyclical(6)], 3), lambda n: (n + 1) / 4 if n < 3 else (n - 3) % 6 / 3),
        (joined((warmup(9), COSINE), 3), lambda n: (n + 1) / 9 if n < 3 else cosine(n - 3)),
        (table(np.arange(9.0), shift=0.5), lambda n: n + 0.5),
    ],
)
def test_values(bound, expected):
    assert isinstance(bound, keras.optimizers.schedules.LearningRateSchedule)
    for step in (0, 1, 2, 5):
        for given in (step, np.int64(step), ops.convert_to_tensor(step)):
            assert to_float(bound(given)) == pytest.approx(expected(step), abs=1e-6)


def test_factory_tells_about_its_function():
    assert str(inspect.signature(warmup)) == "(steps, peak=1.0)"
    assert repr(warmup) == "<schedule factory warmup(steps, peak=1.0)>"
    assert warmup.__wrapped__.__name__ == warmup.__name__ == "warmup"
    assert pickle.loads(pickle.dumps(warmup)) == warmup != cyclical


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (warmup(4), "warmup(steps=4)"),
        (warmup(peak=0.5, steps=4), "warmup(steps=4, peak=0.5)"),
        (
            joined([warmup(4), cyclical(6)], 3),
            "joined(parts=[warmup(steps=4), cyclical(period=6)], boundary=3)",
        ),
        (table(np.arange(9.0)), "table(values=<array float64 (9,)>)"),
    ],
)
def test_equal_arguments_give_equal_schedules(one, text):
    assert repr(one) == text
    for same in (reloaded(one), pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert (same, hash(same)) == (one, hash(one))
    assert one not in (warmup(5), warmup(4.0), cyclical(4), cyclical(6), "warmup(steps=4)")
    assert losses.shifted(same) is losses.shifted(one)


VARIABLE = keras.Variable(1.0, name="outside")


@pytest.mark.parametrize(
    ("bind", "text"),
    [
        (warmup, "warmup() needs a value for 'steps'. Write warmup(steps=...)."),
        (lambda: warmup(stesp=4), "warmup has no argument 'stesp'. It takes 'steps', 'peak'."),
        (lambda: warmup(4, steps=4), "call it: learning_rate=warmup(...)."),
        (
            lambda: cyclical(6, 0.5),
            "too many positional arguments. It takes (period, *, ratio=0.5)",
        ),
        (lambda: warmup({4}), "'steps' of warmup() is a set, which can change"),
        (
            lambda: warmup([VARIABLE]),
            "warmup takes <trainable variable 'outside'> as 'steps'. A schedule reads",
        ),
        (lambda: losses.shifted(warmup), "holds the factory warmup, not a schedule. Call it"),
        (lambda: schedule(lambda: 0), "schedule() cannot use <function"),
        (lambda: schedule(lambda *, step: 0), "cannot be called as <lambda>(step). Write `def "),
        (lambda: schedule(COSINE), "it is not a function"),
        (lambda: schedule(warmup), "it is not a function"),
        (lambda: schedule(lambda s, step: 0), "'step' is reserved for"),
        (
            lambda: schedule(lambda s: ops.stack([s, s]))()(1),
            "<lambda>() returned a tensor of shape (2,)",
        ),
        (lambda: schedule(lambda s: s * VARIABLE)()(1), "<lambda> reads the variable 'outside'. A"),
    ],
)
def test_mistakes(bind, text):
    with raising(ArgumentError, text):
        bind()


# In compiled steps


def expected_weights(rates, y):
    """Those of `linear_model` after steps of gradient descent at these rates, told by NumPy."""
    kernel, bias = (w.astype("float64") for w in linear_model().get_weights())
    for rate in rates:
        slope = 2 * (make_schedule.X @ kernel + bias - y) / y.size
        kernel, bias = kernel - rate * make_schedule.X.T @ slope, bias - rate * slope.sum(0)
    return [kernel, bias]


@pytest.mark.fit
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_optimizer_and_loss(run_eagerly):
    schedules.received.clear()
    y = make_schedule.Y + 1
    model = attach(linear_model(), losses.shifted(cyclical(8)))
    optimizer = keras.optimizers.SGD(warmup(4, peak=0.1))
    # An equal loss is the same loss.
    model.compile(optimizer, loss=losses.shifted(cyclical(8)), run_eagerly=run_eagerly)
    history = model.fit(make_schedule.X, y, epochs=6, verbose=0).history
    np.testing.assert_allclose(history["shift"], [0, 0.25, 0.5, 0.75, 1, 1], atol=1e-6)
    rates = [0.025, 0.05, 0.075, 0.1, 0.1, 0.1]
    for ours, theirs in zip(model.get_weights()[:2], expected_weights(rates, y), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert to_float(optimizer.learning_rate) == pytest.approx(0.1)

    dtypes = {keras.backend.standardize_dtype(dtype) for dtype, _ in schedules.received}
    assert (dtypes, {shape for _, shape in schedules.received}) == ({"float32"}, {()})
    if not run_eagerly and BACKEND != "torch":
        traced = len(schedules.received)
        model.fit(make_schedule.X, y, epochs=3, verbose=0)
        assert len(schedules.received) == traced  # no trace for another step


@pytest.mark.fit
@pytest.mark.parametrize("place", ["loss", "optimizer"])
def test_function_that_reads_a_variable(place):
    bound = schedule(lambda step: step * VARIABLE)()
    model, loss = linear_model(), losses.shifted(bound if place == "loss" else 0.0)
    model = attach(model, loss) if place == "loss" else model
    rate = bound if place == "optimizer" else 0.1
    model.compile(keras.optimizers.SGD(rate), loss=loss)
    with pytest.raises(LossArgsError, match="<lambda> reads the variable 'outside'"):
        model.fit(make_schedule.X, make_schedule.Y, verbose=0)


# In files

LOAD = """
import json, sys, keras, lossargs
sys.path[:0] = ["models"]
try:
    keras.saving.load_model({plain!r})
except lossargs.SavingError as error:
    print(error)
assert not {{"schedules", "losses"}} & set(sys.modules)  # nothing that the file names was imported
import make_schedule
model = keras.saving.load_model({path!r})
assert model.optimizer._learning_rate == make_schedule.RATE and model.loss is make_schedule.LOSS
assert keras.saving.load_model({plain!r}).optimizer._learning_rate == make_schedule.RATE
print(json.dumps(make_schedule.trained(model)))
"""


def check(logs, expected):
    for name in ("loss", "shift"):
        assert logs[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.fit
def test_fresh_process(tmp_path):
    model = make_schedule.model()
    model.save(tmp_path / "model.keras")
    expected = make_schedule.trained(model)
    plain = linear_model()
    plain.compile(keras.optimizers.Adam(make_schedule.RATE), loss="mse")
    plain.save(tmp_path / "plain.keras")
    files = {"path": str(tmp_path / "model.keras"), "plain": str(tmp_path / "plain.keras")}
    output = run_python(LOAD.format(**files))
    assert "import the module that gives it to schedule: import schedules." in output
    check(json.loads(output.splitlines()[-1]), expected)


@pytest.mark.fit
@each_writer
def test_models_written_on_other_backends(written_on):
    path = TESTS / "models" / f"schedule-{written_on}.keras"
    # Keras stores torch's own class of optimizer, which no other backend can make.
    has_optimizer = written_on != "torch" or BACKEND == "torch"
    model = keras.saving.load_model(path, compile=has_optimizer)
    if not has_optimizer:
        model.compile(keras.optimizers.SGD(make_schedule.RATE), loss=layer_of(model).loss)
        model.optimizer.iterations.assign(2)
    assert model.optimizer._learning_rate == make_schedule.RATE
    assert model.loss == make_schedule.LOSS
    model.jit_compile = False  # a model written on JAX asks torch for a compilation of 20 seconds
    expected = json.loads((TESTS / "models" / "schedule.json").read_text())
    check(make_schedule.trained(model), expected)


def capturing():
    peak = 2.0

    @schedule
    def captured(step):
        return peak * step

    return captured


def test_what_cannot_be_saved():
    with raising(SavingError, "`def my_schedule(step): ...`."):
        schedule(lambda step: step)().get_config()
    problem = "captured captures 'peak' from the function around it. Saved files"
    with raising(SavingError, problem, "level of a module: `def captured(step, peak): ...`."):
        capturing()().get_config()
    with raising(SavingError, "'values' of table() is <function capturing"):
        table([{1: capturing}]).get_config()


NO_MATCH = "The saved schedule does not match the signature of its function: "


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"function": "os>system"}, "The saved schedule uses the function 'os>system'"),
        ({"function": "losses>shifted"}, "The saved schedule uses the function 'losses>shifted'"),
        ({"function": ["eval"]}, "The saved schedule cannot be read: 'function'"),
        ({"args": {"steps": {"kind": "live", "object": {"class_name": "Dog"}}}}, "cannot be read"),
        ({"args": {"stesp": 4}}, NO_MATCH),
        ({"args": {}}, f"{NO_MATCH}warmup() needs a value for 'steps'"),
    ],
)
def test_damaged_files(change, text):
    config = keras.saving.serialize_keras_object(warmup(4))
    config["config"].update(change)
    with raising(SavingError, text):
        keras.saving.deserialize_keras_object(config)


def test_saved_loss_of_a_schedule():
    as_loss = {**losses.shifted(1).get_config(), "function": "schedules>warmup"}
    with pytest.raises(SavingError, match="The saved loss uses the function 'schedules>warmup'"):
        type(losses.shifted(1)).from_config(as_loss)
