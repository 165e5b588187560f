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
    each_writer,
    linear_model,
    message_of,
    operations_of_train_step,
    run_python,
    to_float,
)
from lossargs import ArgumentError, AttachError, LossArgs, SavingError, attach, balance, with_args
from lossargs.balancing import ReLoBRaLo, SoftAdapt, Uncertainty

sys.path.insert(0, str(TESTS / "models"))
import make_balance

mse = with_args(keras.losses.mean_squared_error)
mae = with_args(keras.losses.mean_absolute_error)
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


def balance_of(rule):
    return balance([mse(), log_cosh()], RULES[rule]())


def balanced(rule, optimizer=None, **options):
    return attached(balance_of(rule), optimizer, **options)


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


LOAD = """
import json, sys, keras, lossargs
sys.path.insert(0, "models")
import make_balance
model = keras.saving.load_model({path!r})
print(json.dumps([make_balance.trained(model, 5), repr(model.loss["uncertainty"])]))
"""


def assert_same_logs(logs, expected):
    for one, expected_one in zip(logs, expected, strict=True):
        assert one == pytest.approx(expected_one, rel=1e-5, abs=1e-6)


@fit
def test_a_fresh_process_goes_on(tmp_path):
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
def test_evaluation_changes_nothing(rule, data):
    model = balanced(rule)
    train(model, data.x, data.y, last=3)
    before = [np.array(variable) for variable in model.variables]
    state = before[: len(model.weights)]
    logs = [model.evaluate(data.x, data.y, verbose=0, return_dict=True) for _ in range(2)]
    assert logs[0] == logs[1]
    weights = [logs[0][f"{name}_weight"] for name in NAMES]
    extra = np.sum(-np.log(weights)) if rule == "Uncertainty" else 0
    terms = [logs[0][name] for name in NAMES]
    assert logs[0]["loss"] == pytest.approx(np.dot(weights, terms) + extra, rel=1e-5)
    np.testing.assert_equal([np.array(variable) for variable in model.weights], state)
    # Nor does a validation within `fit`.
    one, two = balanced(rule), balanced(rule)
    options = {"epochs": 3, "shuffle": False, "verbose": 0, "batch_size": 4}
    histories = [
        one.fit(data.x, data.y, **options).history,
        two.fit(data.x, data.y, **options, validation_data=(data.x + 1, data.y)).history,
    ]
    for name, values in histories[0].items():
        assert histories[1][name] == pytest.approx(values, rel=1e-6), name
    assert "val_log_cosh_weight" in histories[1]


@fit
@each_rule
@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on torch")
def test_several_steps_per_execution(rule, data):
    x, y = np.concatenate([data.x] * 2), np.concatenate([data.y] * 2)
    options = {"epochs": 2, "shuffle": False, "verbose": 0, "batch_size": 4}
    one, two = balanced(rule), balanced(rule, steps_per_execution=3)
    history = two.fit(x, y, **options).history
    for name, values in one.fit(x, y, **options).history.items():
        assert history[name] == pytest.approx(values, rel=1e-5), name
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@fit
def test_terms_have_sample_weights_and_batch_entries(data):
    @with_args
    def masked(y_true, y_pred, mask):
        return ops.sum(mask * ops.square(y_true - y_pred), axis=-1)

    model = attached(balance([masked(), mae()], Uncertainty()), keras.optimizers.SGD(0.0))
    mask = (data.x[:, :2] > 0).astype("float32")
    weight = np.arange(len(mask), dtype="float32")
    given = {"mask": mask, "sample_weight": weight}
    logs = model.evaluate(data.x, data.y, sample_weight=given, verbose=0, return_dict=True)
    error = data.y - model.predict(data.x, verbose=0)
    terms = np.sum(mask * error**2, axis=-1), np.mean(np.abs(error), axis=-1)
    expected = [np.mean(weight * term) for term in terms]
    assert [logs["masked"], logs["mean_absolute_error"]] == pytest.approx(expected, rel=1e-5)
    assert logs["loss"] == pytest.approx(sum(expected), rel=1e-5)


# ---- Rules of one's own ----


@keras.saving.register_keras_serializable(package="test_balance")
class Largest(keras.layers.Layer):
    def call(self, values):
        return ops.max(values)


class Listing(keras.layers.Layer):
    """Returns a list, where others return a tuple."""

    def call(self, values):
        weights = ops.ones_like(values)
        return [ops.sum(values), weights]


@keras.saving.register_keras_serializable(package="test_balance")
class Average(keras.layers.Layer):
    """Weighs by the mean of earlier values."""

    def build(self, input_shape):
        self.mean = self.add_weight(shape=input_shape, initializer="ones", trainable=False)

    def call(self, values, training=False):
        weights = 1 / ops.convert_to_tensor(self.mean)
        if training:
            self.mean.assign(0.5 * self.mean + 0.5 * ops.stop_gradient(values))
        return ops.sum(weights * values), weights


@fit
def test_a_rule_without_weights(data):
    model = attached(balance([mse(), log_cosh()], Largest()))
    (logs,) = train(model, data.x, data.y, last=1)
    assert set(logs) == {"loss", *NAMES}
    assert logs["loss"] == pytest.approx(max(logs[name] for name in NAMES), rel=1e-6)


@fit
def test_a_rule_that_returns_a_list(data):
    (logs,) = train(attached(balance([mse(), log_cosh()], Listing())), data.x, data.y, last=1)
    assert logs["loss"] == pytest.approx(sum(logs[name] for name in NAMES))
    assert [logs[f"{name}_weight"] for name in NAMES] == [1, 1]


@fit
@each_rule
@pytest.mark.skipif(KERAS < (3, 15), reason="older Keras reads more numbers in Python")
def test_a_step_copies_nothing_to_the_host(rule, data):
    """A number read in Python would be such a copy; a trace refuses it, or calls back."""
    words = ("callback", "pyfunc", "local_scalar", "infeed", "outfeed", "_to_cpu")
    copies = {}
    for name, loss in {"fixed": mse() + log_cosh(), rule: balance_of(rule)}.items():
        operations = operations_of_train_step(attached(loss), (data.x, data.y))
        assert len(operations) > 20
        found = [one for one in operations if any(word in one.lower() for word in words)]
        copies[name] = len(found)
    # On PyTorch, Keras's optimizer reads its learning rate, and a draw reads the seed.
    is_drawn = rule == "ReLoBRaLo" and BACKEND == "torch"
    assert (copies["fixed"] > 0) == (BACKEND == "torch")
    assert copies[rule] == copies["fixed"] + is_drawn


@fit
def test_a_rule_with_state(data, tmp_path):
    model = attached(balance([mse(), mse.options(name="again")()], Average()))
    logs = train(model, data.x, data.y, last=6)
    mean = 1.0
    for one in logs:
        assert one["again_weight"] == pytest.approx(1 / mean, rel=1e-5)
        assert one["loss"] == pytest.approx(2 * one["again"] / mean, rel=1e-5)
        mean = 0.5 * mean + 0.5 * one["again"]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again, expected = (train(one, data.x, data.y, 6, 9) for one in (loaded, model))
    assert [[*one.values()] for one in again] == [
        pytest.approx([*one.values()], rel=1e-6) for one in expected
    ]


@with_args
def half_of(y_true, y_pred, *, base, used=True):
    return 0.5 * base(y_true, y_pred) if used else ops.mean(ops.square(y_true - y_pred), axis=-1)


@fit
@pytest.mark.parametrize("used", [True, False])
def test_a_balanced_loss_as_an_inner_loss(used, data):
    model = attached(half_of(base=balance([mse(), log_cosh()], SoftAdapt()), used=used))
    logs = train(model, data.x, data.y, last=2)
    assert [set(one) for one in logs] == [{"loss"}] * 2


@fit
def test_balanced_terms_within_a_sum(data):
    inner = balance([mse(), log_cosh()], Largest(), name="largest")
    model = attached(inner * 0.5 + mae(), keras.optimizers.SGD(0.0))
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert set(logs) == {"loss", "largest", "mean_absolute_error", *NAMES}
    assert logs["largest"] == pytest.approx(logs["mean_squared_error"])
    expected = 0.5 * logs["largest"] + logs["mean_absolute_error"]
    assert logs["loss"] == pytest.approx(expected, rel=1e-6)


# ---- As other losses ----


def test_replace_reaches_the_terms_of_a_sum():
    rule = SoftAdapt(name="rule")
    loss = mse() + balance([mae(), with_args(keras.losses.huber)(delta=1.0)], rule)
    changed = loss.replace(delta=2.0)
    assert repr(changed) == repr(loss).replace("delta=1.0", "delta=2.0") != repr(loss)
    with pytest.raises(ArgumentError, match="No term of .* takes 'scale'"):
        loss.replace(scale=1.0)


def test_the_widest_dtype():
    terms = [mse(), mse.options(name="exact", dtype="float64")()]
    assert balance(terms, SoftAdapt()).dtype == sum(terms).dtype == "float64"


def test_equality_and_repr():
    rule = SoftAdapt(name="rule")
    loss = balance([mse(), 2 * log_cosh()], rule)
    assert loss is balance([mse(), 2 * log_cosh()], rule)
    assert loss != balance([mse(), 2 * log_cosh()], SoftAdapt())
    shown = "balance([mean_squared_error(), 2 * log_cosh()], <SoftAdapt name=rule"
    assert repr(loss).startswith(shown)
    assert loss.args["rule"] is rule
    with pytest.raises(SavingError, match="'rule' .* is saved with its model only"):
        pickle.dumps(loss)
    delta = with_args(keras.losses.huber)
    changed = balance([mse(), delta(delta=1.0)], rule).replace(delta=2.0)
    assert changed is balance([mse(), delta(delta=2.0)], rule)


@pytest.mark.parametrize(
    ("terms", "rule", "said"),
    [
        ([], SoftAdapt(), "balance() was given no terms"),
        (
            [mse()],
            lambda values: values,
            "not a layer. Write balance(terms, lossargs.balancing.SoftAdapt())",
        ),
        ([mse], SoftAdapt(), "is not a loss. Call a factory: factory(...)"),
        ([mse(), 3.0], SoftAdapt(), "3.0 is not a loss"),
        ([mse.options(reduction=None)()], SoftAdapt(), "has one number per sample"),
        ([keras.losses.MeanAbsoluteError(reduction="none")], SoftAdapt(), "one number per sample"),
    ],
    ids=["no terms", "function", "factory", "number", "not reduced", "not reduced by Keras"],
)
def test_wrong_calls(terms, rule, said):
    with pytest.raises(ArgumentError) as caught:
        balance(terms, rule)
    assert said in message_of(caught.value)


@fit
def test_terms_of_one_name():
    sums = mse.options(reduction="sum")
    with pytest.raises(
        AttachError, match=r"have the name 'mean_squared_error' in .*options\(name="
    ):
        attach(linear_model(), balance([mse(), sums()], SoftAdapt()))


@fit
def test_not_attached(data):
    loss = balance([mse(), mae()], SoftAdapt())
    model = linear_model()
    model.compile("sgd", loss=loss)
    with pytest.raises(AttachError, match=r"live arguments \('rule'\)"):
        model.fit(data.x, data.y, verbose=0)
