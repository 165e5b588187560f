"""A variational autoencoder twice: with live arguments, and as it is written by hand."""

import keras
import numpy as np
from keras import ops

from lossargs import attach
from losses import kl_term, vae_loss

SIZE, LATENT = 6, 2


@keras.saving.register_keras_serializable("vaes")
class Sampling(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator(7)

    def call(self, z_mean, z_log_var):
        noise = keras.random.normal(ops.shape(z_mean), seed=self.generator)
        return z_mean + ops.exp(0.5 * z_log_var) * noise


def data(samples=40):
    return np.random.default_rng(0).normal(size=(samples, SIZE)).astype("float32")


def tensors(sampled=True):
    """Input, code and output of a small network, the same each time."""
    keras.utils.set_random_seed(0)
    x = keras.Input((SIZE,), name="x")
    hidden = keras.layers.Dense(8, activation="tanh", name="hidden")(x)
    z_mean = keras.layers.Dense(LATENT, name="z_mean")(hidden)
    z_log_var = keras.layers.Dense(LATENT, name="z_log_var")(hidden)
    z = Sampling(name="z")(z_mean, z_log_var) if sampled else z_mean
    return x, z_mean, z_log_var, keras.layers.Dense(SIZE, name="x_hat")(z)


def model_and_loss(beta, sampled=True):
    x, z_mean, z_log_var, x_hat = tensors(sampled)
    loss = vae_loss(z_mean=z_mean, z_log_var=z_log_var, beta=beta)
    kl = kl_term(z_mean=z_mean, z_log_var=z_log_var)
    return keras.Model(x, attach(x_hat, loss, track=[kl])), loss


class ByHand(keras.Model):
    """What one writes in Keras: a `compute_loss` that holds the schedule and a step."""

    def __init__(self, beta):
        super().__init__()
        x, z_mean, z_log_var, x_hat = tensors()
        self.network = keras.Model(x, {"x_hat": x_hat, "mean": z_mean, "log_var": z_log_var})
        self.beta = beta
        self.step = self.add_weight(shape=(), dtype="int", trainable=False, initializer="zeros")
        self.beta_metric = keras.metrics.Mean(name="beta")
        self.kl_metric = keras.metrics.Mean(name="kl_term")

    def call(self, x):
        return self.network(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        beta = self.beta(self.step)
        if training:
            self.step.assign_add(1)
        error = ops.mean(ops.sum(ops.square(y - y_pred["x_hat"]), axis=-1))
        mean, log_var = y_pred["mean"], y_pred["log_var"]
        terms = ops.sum(1 + log_var - ops.square(mean) - ops.exp(log_var), axis=-1)
        kl = ops.mean(-0.5 * terms)
        self.kl_metric.update_state(kl, sample_weight=ops.shape(y)[0])
        self.beta_metric.update_state(beta)
        return error + beta * kl
