"""Loss functions that tests import, here and in other processes."""

import functools

import keras
from keras import ops

from lossargs import with_args


@with_args
def shifted(y_true, y_pred, shift):
    return keras.losses.mean_squared_error(y_true, y_pred) + shift


@with_args
def masked(y_true, y_pred, *, mask):
    mask = ops.cast(mask, y_pred.dtype)
    return ops.mean(mask * ops.square(y_true - y_pred), axis=-1)


@with_args
def scaled(y_true, y_pred, scale=1.0, *, power=2.0):
    return scale * ops.mean(ops.power(ops.abs(y_true - y_pred), power), axis=-1)


@with_args
def flexible(y_true, y_pred, **extra):
    total = keras.losses.mean_squared_error(y_true, y_pred)
    for value in extra.values():
        total = total + value
    return total


@with_args
def total(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred))


@with_args
def described(y_true, y_pred, *, what=None):
    """Takes any value; the loss does not depend on it."""
    return keras.losses.mean_squared_error(y_true, y_pred)


@with_args
def composed(y_true, y_pred, *, main, weight=1.0):
    return weight * main(y_true, y_pred)


def times(factor):
    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return factor * function(*args, **kwargs)

        return wrapper

    return decorate


@with_args
@times(2)
def doubled(y_true, y_pred, shift):
    return keras.losses.mean_squared_error(y_true, y_pred) + shift


class Compiled:
    """Stands for what `jax.jit` or `tf.function` make of a function."""

    def __init__(self, function):
        functools.update_wrapper(self, function)

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(*args, **kwargs)


@with_args
@Compiled
def compiled(y_true, y_pred, shift):
    return keras.losses.mean_squared_error(y_true, y_pred) + shift


focal = with_args(keras.losses.categorical_focal_crossentropy)


@with_args
def kl_term(y_true, y_pred, *, z_mean, z_log_var):
    """Of a normal distribution to the standard one, for each sample."""
    terms = 1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var)
    return -0.5 * ops.sum(terms, axis=-1)


@with_args
def vae_loss(y_true, y_pred, *, z_mean, z_log_var, beta=1.0):
    error = ops.sum(ops.square(y_true - y_pred), axis=-1)
    return error + beta * kl_term.__wrapped__(y_true, y_pred, z_mean=z_mean, z_log_var=z_log_var)


@with_args
def gaussian(y_true, y_pred, *, log_var):
    """Kendall, Gal and Cipolla (2018), equation 7, with the logarithm of the variance."""
    error = ops.mean(ops.square(y_true - y_pred), axis=-1)
    return 0.5 * (ops.exp(-log_var) * error + log_var)


@with_args
def both(y_true, y_pred, *, first, second, factor):
    return first(y_true, y_pred) + factor * second(y_true, y_pred)


@with_args
def equation(y_true, y_pred, *, u_t, u_xx):
    return ops.square(y_true - y_pred) + ops.square(u_t - 0.5 * u_xx)
