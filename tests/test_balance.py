"""`balance`: the rules against NumPy, saved state, logs, evaluation, and rules of one's own."""

import json
import pickle
import sys

import keras
import numpy as np
import pytest
from keras import ops

from helpers import (
    BACKEND,
    KERAS,
    TESTS,
    attached,
    each_writer,
    linear_model,
    logs_of,
    operations_of_train_step,
    raising,
    run_python,
    to_float,
)
from lossargs import ArgumentError, AttachError, LossArgs, SavingError, attach, balance, with_args
from lossargs.balancing import ReLoBRaLo, SoftAdapt, Uncertainty
from losses import masked

sys.path.insert(0, str(TESTS / "models"))
import make_balance

mse = with_args(keras.losses.mean_squared_error)
mae = with_args(keras.losses.mean_absolute_error)
log_cosh = with_args(keras.losses.log_cosh)
huber = with_args(keras.losses.huber)
NAMES = ("mean_squared_error", "log_cosh")
STEPS, RATE, MOMENTUM = 20, 0.05, 0.5
OPTIONS = {"alpha": 0.7, "temperature": 0.5, "lookback": 0.6, "seed": 3}
RULES = {
    "Uncertainty": Uncertainty,
    "SoftAdapt": lambda: SoftAdapt(beta=2.0),
    "ReLoBRaLo": lambda: ReLoBRaLo(**OPTIONS),
}
each = pytest.mark.parametrize
each_rule = each("rule", RULES)
fit = pytest.mark.fit


def balance_of(rule):
    return balance([mse(), log_cosh()], RULES[rule]())


def balanced(rule, **options):
    loss = balance_of(rule)
    model = attach(linear_model(), loss)
    model.compile(keras.optimizers.SGD(RATE, MOMENTUM), loss=loss, **options)
    return model


def train(model, data, first=0, last=STEPS):
    """The logs of each step, on a batch of its own."""
    logs = []
    for step in range(first, last):
        model.reset_metrics()
        batch = slice(step % 4, None, 4)
        logs.append(model.train_on_batch(data.x[batch], data.y[batch], return_dict=True))
    return [{name: float(value) for name, value in one.items()} for one in logs]


def assert_same_logs(logs, expected, rtol=1e-5, atol=1e-6):
    for step, (one, expected_one) in enumerate(zip(logs, expected, strict=True)):
        assert one == pytest.approx(expected_one, rel=rtol, abs=atol), step


def softmax(values):
    values = np.exp(values - np.max(values))
    return values / np.sum(values)


class Reference:
    """The three rules in NumPy: `weigh` returns weights, and what is added to the loss."""

    def __init__(self, rule):
        self.rule, self.step, self.s, self.velocity = rule, 0, np.zeros(2), np.zeros(2)
        generator = keras.random.SeedGenerator(OPTIONS["seed"])
        self.draws = [to_float(keras.random.uniform((), seed=generator)) for _ in range(STEPS)]

    def weigh(self, v):
        if self.rule == "Uncertainty":
            weights, extra = np.exp(-self.s), np.sum(self.s)
            self.velocity = MOMENTUM * self.velocity - RATE * (1 - weights * v)
            self.s = self.s + self.velocity
            return weights, extra
        weights = self.change(v) if self.step else np.ones(2) / (2 if self.rule[0] == "S" else 1)
        self.first = self.first if self.step else v
        self.last, self.weights, self.step = v, weights, self.step + 1
        return weights, 0.0

    def change(self, v):
        if self.rule == "SoftAdapt":
            return softmax(2.0 * (v - self.last))
        alpha, temperature = OPTIONS["alpha"], OPTIONS["temperature"]
        of_first, of_last = (
            2 * softmax(v / (temperature * one + 1e-7)) for one in (self.first, self.last)
        )
        rho = self.draws[self.step] < OPTIONS["lookback"]
        return alpha * (self.weights if rho else of_first) + (1 - alpha) * of_last


def expected_logs(rule, data, kernel):
    """The logs of training with a rule, and the kernel at the end, by NumPy."""
    reference, bias, logs = Reference(rule), np.zeros(2), []
    velocities = [0.0, 0.0]
    for step in range(STEPS):
        x, y = data.x[step % 4 :: 4], data.y[step % 4 :: 4]
        error = x @ kernel + bias - y
        values = np.array([np.mean(error**2), np.mean(np.log(np.cosh(error)))])
        weights, extra = reference.weigh(values)
        # Weights that are computed from values have no gradient.
        slope = (weights[0] * 2 * error + weights[1] * np.tanh(error)) / error.size
        slopes = x.T @ slope, slope.sum(axis=0)
        velocities = [MOMENTUM * v - RATE * s for v, s in zip(velocities, slopes, strict=True)]
        kernel, bias = kernel + velocities[0], bias + velocities[1]
        one = {"loss": weights @ values + extra, **dict(zip(NAMES, values, strict=True))}
        logs.append(one | {f"{n}_weight": w for n, w in zip(NAMES, weights, strict=True)})
    return logs, kernel


@fit
@each(("rule", "eager"), [*((rule, False) for rule in RULES), ("ReLoBRaLo", True)])
def test_a_rule_equals_numpy_also_when_saved_at_any_step(rule, eager, data, tmp_path):
    model = balanced(rule, run_eagerly=eager)
    expected, kernel = expected_logs(rule, data, model.get_weights()[0].astype("float64"))
    logs, saved = [], [] if eager else [1, 2, 7]
    for step in range(STEPS):
        if step in saved:
            model.save(tmp_path / f"{step}.keras")
        logs += train(model, data, step, step + 1)
    assert_same_logs(logs, expected, rtol=1e-6)
    np.testing.assert_allclose(model.get_weights()[0], kernel, rtol=1e-6, atol=1e-6)
    assert len({round(one["log_cosh_weight"], 6) for one in logs}) > STEPS // 2
    for step in saved:
        loaded = keras.saving.load_model(tmp_path / f"{step}.keras")
        assert type(loaded.loss.args["rule"]) is type(RULES[rule]())
        assert_same_logs(train(loaded, data, step), logs[step:], rtol=1e-6, atol=0)
        for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


LOAD = """
import json, sys, keras, lossargs
sys.path.insert(0, "models")
import make_balance
model = keras.saving.load_model({path!r})
print(json.dumps([make_balance.trained(model, 5), repr(model.loss["uncertainty"])]))
"""


@fit
def test_a_fresh_process_continues(tmp_path):
    model, losses = make_balance.model_and_losses()
    model.compile(keras.optimizers.SGD(0.05), loss=losses)
    logs = make_balance.trained(model, 5)
    names = {f"{n}_{t}{end}" for n in losses for t in NAMES for end in ("", "_weight")}
    assert set(logs[0]) == {"loss", *(f"{name}_loss" for name in losses), *names}
    model.save(tmp_path / "model.keras")
    code = LOAD.format(path=str(tmp_path / "model.keras"))
    logs, shown = json.loads(run_python(code).splitlines()[-1])
    assert_same_logs(logs, make_balance.trained(model, 5))
    assert shown.startswith("balance([mean_squared_error(), log_cosh()], <Uncertainty ")


@fit
@each_writer
def test_models_written_on_other_backends(written_on):
    folder = TESTS / "models"
    model = keras.saving.load_model(folder / f"balance-{written_on}.keras", compile=False)
    losses = [one.loss for one in model.layers if isinstance(one, LossArgs)]
    losses = {type(loss.args["rule"]).__name__.lower(): loss for loss in losses}
    model.compile(keras.optimizers.SGD(0.05), loss=losses)
    expected = json.loads((folder / "balance.json").read_text())
    assert_same_logs(make_balance.trained(model, 5), expected)


# ---- Steps ----


@fit
@each_rule
def test_evaluation_and_several_steps_per_execution_change_nothing(rule, data):
    x, y = np.concatenate([data.x] * 2), np.concatenate([data.y] * 2)
    # Keras has no steps_per_execution on torch.
    several = {} if BACKEND == "torch" else {"steps_per_execution": 3}
    one, two = balanced(rule), balanced(rule, **several)
    options = {"epochs": 2, "shuffle": False, "verbose": 0, "batch_size": 4}
    history = two.fit(x, y, validation_data=(data.x + 1, data.y), **options).history
    assert "val_log_cosh_weight" in history
    for name, values in one.fit(x, y, **options).history.items():
        assert history[name] == pytest.approx(values, rel=1e-5), name
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    before = [np.array(variable) for variable in one.weights]
    logs = logs_of(one, data.x, data.y)
    assert logs == logs_of(one, data.x, data.y)
    np.testing.assert_equal([np.array(variable) for variable in one.weights], before)
    weights = [logs[f"{name}_weight"] for name in NAMES]
    extra = np.sum(-np.log(weights)) if rule == "Uncertainty" else 0
    total = np.dot(weights, [logs[name] for name in NAMES]) + extra
    assert logs["loss"] == pytest.approx(total, rel=1e-5)


@fit
@pytest.mark.skipif(KERAS < (3, 15), reason="older Keras reads more numbers in Python")
def test_a_step_copies_nothing_to_the_host(data):
    """A number read in Python would be such a copy; a trace refuses it, or calls back."""
    words = ("callback", "pyfunc", "local_scalar", "infeed", "outfeed", "_to_cpu")
    copies = {}
    for name in ("fixed", *RULES):
        loss = mse() + log_cosh() if name == "fixed" else balance_of(name)
        operations = operations_of_train_step(attached(loss), (data.x, data.y))
        assert len(operations) > 20
        copies[name] = sum(any(word in one.lower() for word in words) for one in operations)
    # On PyTorch, the optimizer of Keras below 3.16 reads its learning rate, and a draw the seed.
    fixed = copies.pop("fixed")
    assert (fixed > 0) == (BACKEND == "torch" and KERAS < (3, 16))
    assert copies == dict.fromkeys(RULES, fixed) | {"ReLoBRaLo": fixed + (BACKEND == "torch")}


# ---- Rules of one's own ----


@keras.saving.register_keras_serializable(package="test_balance")
class Largest(keras.layers.Layer):
    def call(self, values):
        return ops.max(values)


@keras.saving.register_keras_serializable(package="test_balance")
class Average(keras.layers.Layer):
    """Weighs by the mean of earlier values. Returns a list, where others return a tuple."""

    def build(self, input_shape):
        self.mean = self.add_weight(shape=input_shape, initializer="ones", trainable=False)

    def call(self, values, training=False):
        weights = 1 / ops.convert_to_tensor(self.mean)
        if training:
            self.mean.assign(0.5 * self.mean + 0.5 * ops.stop_gradient(values))
        return [ops.sum(weights * values), weights]


@fit
def test_a_rule_without_weights_within_a_sum(data):
    """Its terms have sample weights and batch entries."""
    inner = balance([masked(), mae()], Largest(), name="largest")
    model = attached(inner * 0.5 + mse())
    given = {"mask": data.mask, "sample_weight": data.weight}
    logs = model.train_on_batch(data.x, data.y, sample_weight=given, return_dict=True)
    error = data.y - model.predict(data.x, verbose=0)
    values = {
        "masked": np.mean(data.weight * np.mean(data.mask * error**2, axis=-1)),
        "mean_absolute_error": np.mean(data.weight * np.mean(np.abs(error), axis=-1)),
        "mean_squared_error": np.mean(data.weight * np.mean(error**2, axis=-1)),
    }
    largest = max(values["masked"], values["mean_absolute_error"])
    values |= {"largest": largest, "loss": 0.5 * largest + values["mean_squared_error"]}
    assert {name: float(one) for name, one in logs.items()} == pytest.approx(values, rel=1e-5)


@fit
def test_a_rule_with_state(data, tmp_path):
    model = attached(balance([mse(), mse.options(name="again")()], Average()), rate=RATE)
    mean = 1.0
    for one in train(model, data, last=6):
        assert one["again_weight"] == pytest.approx(1 / mean, rel=1e-5)
        assert one["loss"] == pytest.approx(2 * one["again"] / mean, rel=1e-5)
        mean = 0.5 * mean + 0.5 * one["again"]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again, expected = (train(one, data, 6, 9) for one in (loaded, model))
    assert_same_logs(again, expected, rtol=1e-6)


@with_args
def half_of(y_true, y_pred, *, base, used=True):
    return 0.5 * base(y_true, y_pred) if used else ops.mean(ops.square(y_true - y_pred), axis=-1)


@fit
@each("used", [True, False])
def test_a_balanced_loss_as_an_inner_loss(used, data):
    model = attached(half_of(base=balance([mse(), log_cosh()], SoftAdapt()), used=used))
    assert [set(one) for one in train(model, data, last=2)] == [{"loss"}] * 2


# ---- As other losses ----


def test_equality_repr_and_replace():
    rule = SoftAdapt(name="rule")
    loss = balance([mse(), 2 * huber(delta=1.0)], rule)
    assert loss is balance([mse(), 2 * huber(delta=1.0)], rule)
    assert loss != balance([mse(), 2 * huber(delta=1.0)], SoftAdapt())
    shown = "balance([mean_squared_error(), 2 * huber(delta=1.0)], <SoftAdapt name=rule"
    assert repr(loss).startswith(shown)
    assert loss.args["rule"] is rule
    with pytest.raises(SavingError, match="'rule' .* is saved with its model only"):
        pickle.dumps(loss)
    changed = balance([mse(), 2 * huber(delta=2.0)], rule)
    assert loss.replace(delta=2.0) is changed
    assert (mae() + loss).replace(delta=2.0) is mae() + changed != mae() + loss
    with pytest.raises(ArgumentError, match="No term of .* takes 'scale'"):
        (mae() + loss).replace(scale=1.0)


def test_the_widest_dtype():
    terms = [mse(), mse.options(name="exact", dtype="float64")()]
    assert balance(terms, SoftAdapt()).dtype == sum(terms).dtype == "float64"


@each(
    ("terms", "rule", "said"),
    [
        ([], SoftAdapt, "balance() was given no terms"),
        ([mse()], lambda: len, "not a layer. Write balance(terms, lossargs.balancing.SoftAdapt())"),
        ([mse], SoftAdapt, "is not a loss. Call a factory: factory(...)"),
        ([mse(), 3.0], SoftAdapt, "3.0 is not a loss"),
        ([mse.options(reduction=None)()], SoftAdapt, "has one number per sample"),
        ([keras.losses.MeanAbsoluteError(reduction="none")], SoftAdapt, "one number per sample"),
    ],
    ids=["no terms", "function", "factory", "number", "not reduced", "not reduced by Keras"],
)
def test_wrong_calls(terms, rule, said):
    with raising(ArgumentError, said):
        balance(terms, rule())


def test_wrong_use_with_a_model(data):
    one_name = balance([mse(), mse.options(reduction="sum")()], SoftAdapt())
    words = r"have the name 'mean_squared_error' in .*options\(name="
    with pytest.raises(AttachError, match=words):
        attach(linear_model(), one_name)
    model = linear_model()
    model.compile(loss=balance([mse(), mae()], SoftAdapt()))  # not attached
    with pytest.raises(AttachError, match=r"live arguments \('rule'\)"):
        model.evaluate(data.x, data.y, verbose=0)
