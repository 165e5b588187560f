"""One oracle: losses written with `keras.ops` against NumPy formulas in float64."""

import contextlib

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from helpers import BACKEND, gradient
from lossargs import with_args

DTYPES = ["float16", "bfloat16", "float32", "float64"]
CASES = {}

rng = np.random.default_rng(0)
SHAPE = (6, 4)
# No formula below has a kink where the error is within these, rounded and differentiated.
ERROR = rng.choice([-1, 1], SHAPE) * (rng.choice([0.2, 0.9], SHAPE) + rng.uniform(-0.1, 0.1, SHAPE))
TARGET, SPREAD, MEAN = rng.uniform(-1, 1, (3, *SHAPE))
LOGITS = rng.uniform(-3, 3, SHAPE)
POSITIVE = rng.uniform(0.5, 2, SHAPE)
LABEL = np.eye(4)[rng.integers(4, size=6)]


def mean(values):
    """Not by `keras.ops.mean`, which computes in float32 also what is in float64.

    So do `maximum` and `minimum` on PyTorch, which are written by `where` here.
    """
    return ops.sum(values, axis=-1) / values.shape[-1]


def case(factory, y_true, y_pred, **args):
    """Pair a loss with the NumPy formula below this, at a point where it is smooth."""

    def pair(oracle):
        CASES[factory.function.name] = factory, oracle, y_true, {"y_pred": y_pred, **args}

    return pair


@with_args
def weighted_mae(y_true, y_pred, weight):
    return ops.sum(weight * ops.abs(y_true - y_pred), axis=-1) / ops.sum(weight, axis=-1)


@case(weighted_mae, TARGET, TARGET + ERROR, weight=POSITIVE)
def _(t, p, weight):
    return np.array([np.average(e, weights=w) for e, w in zip(np.abs(t - p), weight, strict=True)])


@with_args
def smoothed_crossentropy(y_true, y_pred, smoothing, temperature):
    smooth = y_true * (1 - smoothing) + smoothing / y_true.shape[-1]
    return -ops.sum(smooth * ops.log_softmax(y_pred / temperature), axis=-1)


@case(smoothed_crossentropy, LABEL, LOGITS, smoothing=0.125, temperature=2.0)
def _(t, p, smoothing, temperature):
    z = p / temperature
    right = z[np.arange(6), t.argmax(-1)]
    return np.log(np.exp(z).sum(-1)) - (1 - smoothing) * right - smoothing * z.mean(-1)


@with_args
def vae(y_true, y_pred, z_mean, z_log_var, beta):
    kl = -0.5 * ops.sum(1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var), axis=-1)
    return ops.sum(ops.square(y_true - y_pred), axis=-1) + beta * kl


@case(vae, TARGET, TARGET + ERROR, z_mean=MEAN, z_log_var=SPREAD, beta=0.5)
def _(t, p, z_mean, z_log_var, beta):
    deviation = np.exp(z_log_var / 2)
    kl = (deviation**2 + z_mean**2) / 2 - np.log(deviation) - 0.5
    return ((t - p) ** 2 + beta * kl).sum(-1)


@with_args
def ppo(y_true, y_pred, advantage, epsilon):
    """Of log-probabilities, the old ones as targets."""
    ratio = ops.exp(y_pred - y_true)
    clipped = ops.clip(ratio, 1 - epsilon, 1 + epsilon)
    free, held = ratio * advantage, clipped * advantage
    return -mean(ops.where(free < held, free, held))


@case(ppo, TARGET, TARGET + ERROR, advantage=np.sign(MEAN) * POSITIVE, epsilon=0.5)
def _(t, p, advantage, epsilon):
    ratio, bound = np.exp(p) / np.exp(t), 1 + np.sign(advantage) * epsilon
    held = np.where(advantage > 0, ratio > bound, ratio < bound)
    return -(np.where(held, bound, ratio) * advantage).mean(-1)


def slope(function, value):
    """Of each result by each element: central differences of sixth order, exact to 1e-9."""
    step = 2.0**-10
    rows = np.eye(value.size).reshape(-1, *value.shape) * step
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    slopes = [
        sum(w * (function(value + k * r) - function(value - k * r)) for k, w in weights.items())
        for r in rows
    ]
    return np.stack(slopes, axis=-1).reshape(-1, *value.shape) / step


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_oracle(name, dtype):
    if (BACKEND, dtype) == ("numpy", "float64"):
        pytest.skip("Keras's NumPy backend computes float64 in float32")
    factory, oracle, y_true, args = CASES[name]
    own = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    # Rounded beforehand: what is compared is what the backend computes, not how it rounds inputs.
    exact = {n: np.float64(np.asarray(v).astype(own)) for n, v in args.items()}
    t = np.float64(y_true.astype(own))
    # Not every backend takes bfloat16 from NumPy. The loss casts, and the gradient passes the cast.
    wide = "float64" if dtype == "float64" else "float32"
    given = {n: np.asarray(v).astype(wide) for n, v in exact.items()}

    def expected(**changes):
        changed = {**exact, **changes}
        return oracle(t, changed.pop("y_pred"), **changed)

    def loss(reduction=None, **changes):
        changed = {**given, **changes}
        bound = factory.options(dtype=dtype, reduction=reduction)()
        value = bound(t.astype(wide), changed.pop("y_pred"), **changed)
        assert keras.backend.standardize_dtype(value.dtype) == dtype
        return ops.cast(value, wide)

    with computing_in(dtype):
        assert_close(ops.convert_to_numpy(loss()), expected(), dtype)
        if BACKEND == "numpy":  # has no gradients
            return
        for argument, value in exact.items():
            slopes = slope(lambda v, name=argument: expected(**{name: v}), value).sum(axis=0)
            found = gradient(lambda v, name=argument: loss("sum", **{name: v}), given[argument])
            # Differences are exact to 1e-9.
            assert_close(found, slopes.reshape(value.shape), dtype, exact_to=1e-9)
