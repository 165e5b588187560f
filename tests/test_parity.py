"""A bound loss behaves as the same plain function given to `compile`, and as Keras's own class."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import lossargs
from helpers import BACKEND, TESTS, gradient, linear_model, logs_of, to_float
from lossargs import with_args
from losses import shifted

REDUCTIONS = ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none", None]


def class_of(function):
    """The Keras class of a loss function: `Huber` for `huber`."""
    name = function.__name__.replace("_", "")
    return next(c for n, c in vars(keras.losses).items() if n.lower() == name and c is not function)


FUNCTIONS = {
    name: function
    for name, function in vars(keras.losses).items()
    if inspect.isfunction(function)
    and name == function.__name__
    and list(inspect.signature(function).parameters)[:2] == ["y_true", "y_pred"]
}

# What some functions need to give one number for each sample, or to be called at all.
ARGUMENTS = {
    "dice": {"axis": (1, 2)},
    "tversky": {"axis": (1, 2), "alpha": 0.3},
    "huber": {"delta": 0.5},
    "categorical_generalized_cross_entropy": {"q": 0.5},
    "binary_crossentropy": {"label_smoothing": 0.1},
}


def batch_for(name):
    """Targets, predictions and weights that the loss of this name takes."""
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(3), size=4).astype("float32")
    weights = np.array([0.5, 2.0, 0.0, 1.0], "float32")
    if name == "ctc":
        return np.array([[1, 2]] * 4), rng.normal(size=(4, 5, 3)).astype("float32"), weights
    if name in ("dice", "tversky"):
        targets = rng.integers(0, 2, size=(4, 3, 2)).astype("float32")
        return targets, rng.random((4, 3, 2)).astype("float32"), weights
    if name == "circle" or name.startswith(("sparse_", "categorical_generalized_")):
        return np.array([0, 1, 2, 1]), probabilities, weights
    return np.eye(3, dtype="float32")[[0, 1, 2, 1]], probabilities, weights


def test_the_functions_of_keras_are_found():
    assert len(FUNCTIONS) >= 20


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("reduction", "weighted"),
    [(REDUCTIONS[0], False), *((reduction, True) for reduction in REDUCTIONS)],
)
def test_every_keras_loss_equals_its_class(name, weighted, reduction):
    arguments = ARGUMENTS.get(name, {})
    ours = with_args(FUNCTIONS[name], reduction=reduction)(**arguments)
    theirs = class_of(FUNCTIONS[name])(reduction=reduction, **arguments)
    y_true, y_pred, weights = batch_for(name)
    weights = weights if weighted else None

    values = [ops.convert_to_numpy(loss(y_true, y_pred, weights)) for loss in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(values[0]))
    if BACKEND != "numpy" and reduction == REDUCTIONS[0]:
        slopes = [
            gradient(lambda p, f=loss: ops.sum(f(y_true, p, weights)), y_pred)
            for loss in (ours, theirs)
        ]
        np.testing.assert_allclose(*slopes, rtol=1e-6, atol=1e-6)
        assert np.any(slopes[0] != 0)


@pytest.mark.parametrize("name", ["dice", "tversky"])
def test_losses_of_the_whole_batch_equal_their_class(name):
    y_true, y_pred, _ = batch_for(name)
    ours, theirs = with_args(FUNCTIONS[name])(), class_of(FUNCTIONS[name])()
    assert to_float(ours(y_true, y_pred)) == to_float(theirs(y_true, y_pred))


def test_keras_own_tests_of_its_losses():
    """Run with each class of loss replaced by its function through `with_args`."""
    reason = "this Keras does not come with its tests"
    losses_test = pytest.importorskip("keras.src.losses.losses_test", reason=reason)
    source = Path(lossargs.__file__).parents[1]
    # Keras's own tests, so neither our settings nor our conftest.
    options = ["-q", "-c", os.devnull, "-p", "no:cacheprovider", "-p", "replaced_losses"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, losses_test.__file__],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{TESTS}"},
        cwd=TESTS,
    )
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(summary.split(" passed")[0].split()[-1]) >= 120, summary


def plain(y_true, y_pred, shift=3.0):
    return ops.mean(ops.square(y_true - y_pred), axis=-1) + shift


bound = with_args(plain)(3.0)


@pytest.mark.fit
@pytest.mark.parametrize(
    "given",
    [
        {"sample_weight": np.linspace(0, 1, 12), "validation_split": 0.25, "batch_size": 5},
        {"class_weight": {0: 0.5, 1: 2.0}},
    ],
    ids="+".join,
)
def test_training_equals_the_plain_function(data, given):
    y = (data.y[:, :1] > 0).astype("float32")

    def train(loss):
        model = linear_model()
        model.compile("sgd", loss=loss, metrics=["mae"])
        history = model.fit(data.x, y, epochs=2, verbose=0, shuffle=False, **given).history
        return [*history.values(), *model.get_weights()]

    for plainly, boundly in zip(train(plain), train(bound), strict=True):
        np.testing.assert_array_equal(plainly, boundly)


@pytest.mark.parametrize(
    ("true_shape", "pred_shape"), [((6,), (6, 1)), ((6, 1), (6,)), ((6, 1), (6, 1)), ((6,), (6,))]
)
def test_ranks_are_squeezed(true_shape, pred_shape):
    y = np.arange(6.0)
    loss = with_args(lambda t, p, s: ops.square(t - p) + s, reduction=None)(1)
    values = ops.convert_to_numpy(loss(y.reshape(true_shape), y.reshape(pred_shape)))
    np.testing.assert_array_equal(values.ravel(), np.ones(6))


@pytest.mark.parametrize("weight", [None, np.linspace(0, 1, 8).reshape(2, 4)], ids=str)
def test_masks_of_the_model_count(weight):
    table = np.linspace(-1, 1, 10, dtype="float32").reshape(5, 2)
    embedding = keras.layers.Embedding(5, 2, mask_zero=True, weights=[table])
    model = keras.Sequential([keras.Input((4,), dtype="int32"), embedding])
    x, y = np.array([[1, 2, 0, 0], [3, 0, 0, 0]], "int32"), np.ones((2, 4, 2), "float32")
    results = []
    for loss in (plain, bound):
        model.compile(loss=loss)
        results.append(model.evaluate(x, y, sample_weight=weight, verbose=0))
    assert results[0] == results[1]
    assert results[1] != pytest.approx(to_float(bound(y, model.predict(x, verbose=0), weight)))


@pytest.mark.fit
@pytest.mark.parametrize("loss", [plain, bound])
def test_several_outputs_are_named_alike(data, loss):
    inputs = keras.Input((3,))
    outputs = {n: keras.layers.Dense(2, name=n)(inputs) for n in ("left", "right")}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss=dict.fromkeys(outputs, loss), metrics={"left": [loss, loss]})
    logs = logs_of(model, data.x, dict.fromkeys(outputs, data.y))
    assert set(logs) == {"loss", "left_loss", "right_loss", "left_plain", "left_plain_1"}


def test_name_is_what_keras_calls_a_function():
    def HTTPLossOfV2(y_true, y_pred):  # noqa: N802
        return ops.mean(y_true - y_pred, axis=-1)

    model = linear_model()
    model.compile(loss="mse", metrics=[HTTPLossOfV2])
    logs = logs_of(model, np.zeros((2, 3)), np.zeros((2, 2)))
    assert with_args(HTTPLossOfV2)().name in logs


def test_metrics_have_stable_distinct_names(data):
    model = linear_model()
    late = shifted.options(name="late")
    for _ in range(2):
        model.compile(loss="mse", metrics=[shifted(1), shifted(2), late(3)])
        logs = logs_of(model, data.x, data.y)
        assert list(logs) == ["late", "loss", "shifted", "shifted_1"]
        assert logs["shifted_1"] - logs["shifted"] == pytest.approx(1, abs=1e-5)
        assert logs["late"] - logs["loss"] == pytest.approx(3, abs=1e-5)


def test_metric_of_each_sample_is_weighted_as_a_function_is(data):
    metric = with_args(plain).options(reduction=None, name="bound")(3.0)
    model = linear_model()
    model.compile(loss="mse", weighted_metrics=[plain, metric])
    logs = logs_of(model, data.x, data.y, sample_weight=data.weight, batch_size=5)
    assert logs["plain"] == logs["bound"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_dtype_is_what_the_loss_computes_in(dtype):
    losses = with_args(plain, dtype=dtype)(1e-3), keras.losses.MeanSquaredError(dtype=dtype)
    ours, theirs = (loss(np.zeros((2, 2)), np.full((2, 2), 0.1)) for loss in losses)
    assert ours.dtype == theirs.dtype
    assert to_float(ours) == pytest.approx(to_float(theirs) + 1e-3, rel=2e-2)


@pytest.mark.fit
def test_mixed_precision(data):
    def train(loss):
        model = linear_model()
        model.compile("sgd", loss=loss)
        history = model.fit(data.x, data.y, verbose=0, epochs=2).history
        assert model.layers[-1].compute_dtype == "float16"
        return [*history["loss"], *np.ravel(model.get_weights()[0])]

    keras.config.set_dtype_policy("mixed_float16")
    try:
        np.testing.assert_allclose(train(plain), train(bound), rtol=1e-6)
    finally:
        keras.config.set_dtype_policy("float32")
    assert bound.dtype == "float32"
