"""A model with every kind of argument, trained on two devices; imported, it trains on one.

Prints its logs and weights as JSON. Run by `test_distributed.py`.
"""

import contextlib
import json
import os

DEVICES = 2
if __name__ == "__main__" and os.environ["KERAS_BACKEND"] == "jax":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import keras  # noqa: E402 - only now is the number of devices set
import numpy as np  # noqa: E402
from keras import ops  # noqa: E402

from lossargs import attach, grad, live_args, with_args  # noqa: E402


@with_args
def everything(y_true, y_pred, constant, *, live, schedule, trained, code, adv, slope):  # noqa: PLR0913
    error = ops.mean(ops.square(y_true - y_pred), axis=-1)
    likelihood = 0.5 * (ops.exp(-trained) * error + trained)
    penalty = schedule * ops.mean(ops.square(code), axis=-1) + ops.mean(ops.square(slope), axis=-1)
    return likelihood + constant + live * adv + penalty


@with_args
def code_size(y_true, y_pred, *, code):
    return ops.mean(ops.square(code), axis=-1)


def make_model():
    x, adv = keras.Input((3,), name="x"), keras.Input((), name="adv")
    code = keras.layers.Dense(2, name="code", kernel_initializer="ones")(x)
    y = keras.layers.Dense(2, name="y", kernel_initializer="ones")(code)
    loss = everything(
        10.0,
        live=keras.Variable(0.0, trainable=False, name="live"),
        schedule=keras.optimizers.schedules.PolynomialDecay(0.0, 8, 1.0),
        trained=keras.Variable(0.5, name="trained"),
        code=code,
        adv=adv,
        slope=grad(ops.tanh(y), x),
    )
    codes = code_size.options(name="codes", reduction="sum")(code=code)
    loss += codes * keras.Variable(0.01, trainable=False) + keras.losses.Huber(name="huber") + 1
    model = keras.Model([x, adv], attach(y, loss, track=[code_size(code=code)]))
    model.compile(keras.optimizers.SGD(0.1), loss=loss)
    return model


def train(scope=contextlib.nullcontext):
    """The history and the variables of a model that is made in this scope."""
    keras.backend.clear_session()  # the names of layers begin again
    with scope():
        model = make_model()
    live = live_args(model)["live"]
    change = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: live.assign(e + 1.0))
    rng = np.random.default_rng(0)
    x, adv, y = (rng.normal(size=size).astype("float32") for size in ((32, 3), (32,), (32, 2)))
    history = model.fit(
        [x, adv], y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[change],
        validation_data=([x, adv], y), validation_batch_size=16,
    ).history  # fmt: skip
    return history, {v.path: np.array(v).tolist() for v in model.variables}


def main():
    if keras.backend.backend() == "jax":
        import jax

        assert len(jax.devices()) == DEVICES
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        return train()
    import tensorflow as tf

    logical = [tf.config.LogicalDeviceConfiguration()] * DEVICES
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
    return train(tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"]).scope)


if __name__ == "__main__":
    print(json.dumps(main()))  # noqa: T201
