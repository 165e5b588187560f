"""One oracle: losses written with `keras.ops` against NumPy formulas in float64."""

import contextlib

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from helpers import BACKEND, gradient
from lossargs import with_args
from losses import vae_loss

RNG = np.random.default_rng(0)
SHAPE = (3, 4)
TARGET, SPREAD, MEAN = RNG.uniform(-1, 1, (3, *SHAPE))
PREDICTION = TARGET + RNG.choice([-1, 1], SHAPE) * RNG.uniform(0.1, 1, SHAPE)  # no error is zero
LOGITS, POSITIVE = RNG.uniform(-3, 3, SHAPE), RNG.uniform(0.5, 2, SHAPE)
LABEL = np.eye(4)[[2, 0, 3]]


@with_args
def weighted_mae(y_true, y_pred, weight):
    return ops.sum(weight * ops.abs(y_true - y_pred), axis=-1) / ops.sum(weight, axis=-1)


def weighted_mae_by_numpy(t, p, weight):
    return np.average(np.abs(t - p), axis=-1, weights=weight)


@with_args
def smoothed_crossentropy(y_true, y_pred, smoothing, temperature):
    smooth = y_true * (1 - smoothing) + smoothing / y_true.shape[-1]
    return -ops.sum(smooth * ops.log_softmax(y_pred / temperature), axis=-1)


def smoothed_crossentropy_by_numpy(t, p, smoothing, temperature):
    z = p / temperature
    right = np.sum(z * (t == 1), axis=-1)
    return np.log(np.exp(z).sum(-1)) - (1 - smoothing) * right - smoothing * z.mean(-1)


def vae_by_numpy(t, p, z_mean, z_log_var, beta):
    deviation = np.exp(z_log_var / 2)
    kl = (deviation**2 + z_mean**2) / 2 - np.log(deviation) - 0.5
    return ((t - p) ** 2 + beta * kl).sum(-1)


CASES = {
    "weighted MAE": (weighted_mae, weighted_mae_by_numpy, TARGET, PREDICTION, {"weight": POSITIVE}),
    "smoothed cross-entropy": (
        smoothed_crossentropy,
        smoothed_crossentropy_by_numpy,
        LABEL,
        LOGITS,
        {"smoothing": 0.125, "temperature": 2.0},
    ),
    "VAE": (
        vae_loss,
        vae_by_numpy,
        TARGET,
        PREDICTION,
        {"z_mean": MEAN, "z_log_var": SPREAD, "beta": 0.5},
    ),
}


def slope(function, value):
    """Of the sum by each element: central differences of sixth order, exact to 1e-9."""
    step = 2.0**-10
    rows = np.eye(value.size).reshape(-1, *value.shape) * step
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    slopes = [
        sum(
            w * np.sum(function(value + k * r) - function(value - k * r))
            for k, w in weights.items()
        )
        for r in rows
    ]
    return np.reshape(slopes, value.shape) / step


def computing_in(dtype):
    """Where the backend computes in this dtype: JAX has float64 only on demand."""
    if BACKEND == "jax" and dtype == "float64":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def assert_close(actual, expected, dtype, *, exact_to=0.0):
    """Within some ten operations, each exact to half an eps, on numbers of the largest size here.

    Where terms cancel, the larger terms count, which are of the order of 1.
    """
    scale = max(1.0, np.abs(expected).max())
    bound = 8 * float(ml_dtypes.finfo(dtype).eps) * scale
    np.testing.assert_allclose(actual, expected, rtol=0, atol=max(bound, exact_to))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_oracle(name, dtype):
    if (BACKEND, dtype) == ("numpy", "float64"):
        pytest.skip("Keras's NumPy backend computes float64 in float32")
    factory, oracle, y_true, y_pred, args = CASES[name]
    own = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    # Rounded beforehand: what is compared is what the backend computes, not how it rounds inputs.
    args = {"y_pred": y_pred, **args}
    exact = {n: np.float64(np.asarray(v).astype(own)) for n, v in args.items()}
    t = np.float64(y_true.astype(own))
    # Not every backend takes bfloat16 from NumPy. The loss casts, and the gradient passes the cast.
    wide = "float64" if dtype == "float64" else "float32"

    def expected(**changes):
        changed = {**exact, **changes}
        return oracle(t, changed.pop("y_pred"), **changed)

    def loss(reduction=None, **changes):
        changed = {**{n: np.asarray(v).astype(wide) for n, v in exact.items()}, **changes}
        bound = factory.options(dtype=dtype, reduction=reduction)()
        value = bound(t.astype(wide), changed.pop("y_pred"), **changed)
        assert keras.backend.standardize_dtype(value.dtype) == dtype
        return ops.cast(value, wide)

    with computing_in(dtype):
        assert_close(ops.convert_to_numpy(loss()), expected(), dtype)
        for argument, value in exact.items() if BACKEND != "numpy" else ():  # it has no gradients
            slopes = slope(lambda v, name=argument: expected(**{name: v}), value)
            point = np.asarray(value).astype(wide)
            found = gradient(lambda v, name=argument: loss("sum", **{name: v}), point)
            assert_close(found, slopes, dtype, exact_to=1e-9)  # of differences
