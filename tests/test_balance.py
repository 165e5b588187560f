"""`balance`: the rules against NumPy, and runs that were saved and continue."""

import keras
import numpy as np
import pytest

from helpers import linear_model, to_float
from lossargs import attach, balance, with_args
from lossargs.balancing import ReLoBRaLo, SoftAdapt, Uncertainty

mse = with_args(keras.losses.mean_squared_error)
NAMES = ("mean_squared_error", "log_cosh")
STEPS, RATE = 50, 0.05
OPTIONS = {"alpha": 0.7, "temperature": 0.5, "lookback": 0.6, "seed": 3}
RULES = {
    "Uncertainty": Uncertainty,
    "SoftAdapt": lambda: SoftAdapt(beta=2.0),
    "ReLoBRaLo": lambda: ReLoBRaLo(**OPTIONS),
}
each_rule = pytest.mark.parametrize("rule", RULES)
fit = pytest.mark.fit


def log_cosh():
    return with_args(keras.losses.log_cosh)()


def attached(loss, optimizer=None, **options):
    model = attach(linear_model(), loss)
    model.compile(optimizer or keras.optimizers.SGD(RATE), loss=loss, **options)
    return model


def balanced(rule, optimizer=None, **options):
    return attached(balance([mse(), log_cosh()], RULES[rule]()), optimizer, **options)


def train(model, x, y, first=0, last=STEPS):
    """The logs of each step, on a batch of its own."""
    logs = []
    for step in range(first, last):
        model.reset_metrics()
        batch = slice(step % 4, None, 4)
        logs.append(model.train_on_batch(x[batch], y[batch], return_dict=True))
    return [{name: float(value) for name, value in one.items()} for one in logs]


def softmax(values):
    values = np.exp(values - np.max(values))
    return values / np.sum(values)


class Reference:
    """The three rules in NumPy: `weigh` returns weights, and what is added to the loss."""

    def __init__(self, rule):
        self.rule, self.step, self.s = rule, 0, np.zeros(2)
        generator = keras.random.SeedGenerator(OPTIONS["seed"])
        self.draws = [to_float(keras.random.uniform((), seed=generator)) for _ in range(STEPS)]

    def weigh(self, v):
        if self.rule == "Uncertainty":
            weights, extra = np.exp(-self.s), np.sum(self.s)
            self.s = self.s - RATE * (1 - weights * v)
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


@fit
@each_rule
@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=["compiled", "eager"])
def test_a_rule_equals_numpy(rule, options, data):
    model, reference = balanced(rule, **options), Reference(rule)
    kernel, bias = (weight.astype("float64") for weight in model.get_weights()[:2])
    logs = train(model, data.x, data.y)
    for step, found in enumerate(logs):
        x, y = data.x[step % 4 :: 4], data.y[step % 4 :: 4]
        error = x @ kernel + bias - y
        values = np.array([np.mean(error**2), np.mean(np.log(np.cosh(error)))])
        weights, extra = reference.weigh(values)
        # Weights that are computed from values have no gradient.
        slope = (weights[0] * 2 * error + weights[1] * np.tanh(error)) / error.size
        kernel, bias = kernel - RATE * x.T @ slope, bias - RATE * slope.sum(axis=0)
        expected = {"loss": weights @ values + extra}
        expected |= dict(zip(NAMES, values, strict=True))
        expected |= {f"{n}_weight": w for n, w in zip(NAMES, weights, strict=True)}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), step
    np.testing.assert_allclose(model.get_weights()[0], kernel, rtol=1e-6, atol=1e-6)
    assert len({round(one["log_cosh_weight"], 6) for one in logs}) > STEPS // 2


@fit
@each_rule
def test_a_run_saved_at_any_step_continues(rule, data, tmp_path):
    model = balanced(rule, keras.optimizers.Adam(0.01))
    chosen = sorted(map(int, np.random.default_rng(1).choice(STEPS, 10, replace=False)))
    logs = []
    for step in range(STEPS):
        if step in chosen:
            model.save(tmp_path / f"{step}.keras")
        logs += train(model, data.x, data.y, step, step + 1)
    for step in chosen:
        loaded = keras.saving.load_model(tmp_path / f"{step}.keras")
        assert isinstance(loaded.loss.args["rule"], type(RULES[rule]()))
        again = train(loaded, data.x, data.y, step)
        for one, expected in zip(again, logs[step:], strict=True):
            assert one == pytest.approx(expected, rel=1e-6), step
        for one, expected in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-6)
