"""Terms and sums that tests import, here and in other processes."""

import keras
import numpy as np
from keras import ops

from helpers import attached
from lossargs import with_args


@with_args
def mse(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


@with_args
def mae(y_true, y_pred, *, scale=1.0):
    return scale * ops.mean(ops.abs(y_true - y_pred), axis=-1)


@with_args
def size(y_true, y_pred, *, of):
    """One number for each sample; the targets do not matter."""
    return ops.mean(ops.square(of), axis=-1)


@with_args
def masked(y_true, y_pred, *, mask):
    return ops.mean(ops.cast(mask, y_pred.dtype) * ops.square(y_true - y_pred), axis=-1)


@with_args
def total(y_true, y_pred):
    """One number for the batch."""
    return ops.mean(ops.square(y_true - y_pred))


@keras.saving.register_keras_serializable("sums")
class Shifted(keras.losses.Loss):
    """A plain Keras loss whose config leaves out what it holds."""

    def __init__(self, shift=0.0, name="shifted", **kwargs):
        super().__init__(name=name, **kwargs)
        self.shift = shift

    def call(self, y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred), axis=-1) + self.shift


# What users of segmentation_models add. Masks and predictions of shape (batch, height, width,
# classes), one number for each image.


@with_args
def dice(y_true, y_pred, *, class_weights=1.0, smooth=1.0):
    both, true, found = (ops.sum(v, axis=(1, 2)) for v in (y_true * y_pred, y_true, y_pred))
    return 1 - ops.mean(class_weights * (2 * both + smooth) / (true + found + smooth), axis=-1)


crossentropy = with_args(keras.losses.categorical_crossentropy, name="crossentropy")
WEIGHTS = {"crossentropy": 1.0, "dice": 2.0, "mean_absolute_error": -1.0}


def segmented():
    """A model with a sum of these and of one of Keras's own, and its data."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4, 4, 2)).astype("float32")
    y = np.eye(3, dtype="float32")[rng.integers(0, 3, (8, 4, 4))]
    network = keras.Sequential(
        [keras.Input((4, 4, 2)), keras.layers.Conv2D(3, 1, activation="softmax")]
    )
    overlap = dice(class_weights=np.array([1.0, 2.0, 0.5]))
    loss = crossentropy() + 2 * overlap - keras.losses.MeanAbsoluteError() + 10
    return attached(loss, network, 0.1), x, y


def everything(code):
    """A sum with each kind of term and weight, at a tensor of a network."""
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)
    return (
        mse()
        + size(of=code) * keras.Variable(0.5, trainable=False, name="fixed")
        + schedule * mae(scale=2.0)
        - 0.25 * masked.options(reduction="sum")() / keras.Variable(2.0, name="trained")
        + keras.losses.Huber(delta=0.5)
        + 10
    )
