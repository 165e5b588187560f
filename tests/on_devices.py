"""A model with every kind of argument, trained on several devices; run by `test_distributed.py`.

    python on_devices.py NUMBER_OF_DEVICES

Prints its logs and weights as JSON.
"""

import contextlib
import json
import os
import sys

COUNT = int(sys.argv[1])
BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "jax":
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={COUNT}"

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


def strategy():
    """The scope in which a model for several devices is made."""
    if BACKEND == "jax":
        import jax

        assert len(jax.devices()) == COUNT
        if COUNT > 1:
            keras.distribution.set_distribution(keras.distribution.DataParallel())
        return contextlib.nullcontext()
    import tensorflow as tf

    cpus = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpus[0], [tf.config.LogicalDeviceConfiguration()] * COUNT
    )
    if COUNT == 1:
        return contextlib.nullcontext()
    return tf.distribute.MirroredStrategy([f"/cpu:{number}" for number in range(COUNT)]).scope()


def main():
    with strategy():
        keras.utils.set_random_seed(0)
        x = keras.Input((3,), name="x")
        adv = keras.Input((), name="adv")
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
        model = keras.Model([x, adv], attach(y, loss, track=[code_size(code=code)]))
        model.compile(keras.optimizers.SGD(0.1), loss=loss)

    live = live_args(model)["live"]
    change = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: live.assign(epoch + 1.0)
    )
    rng = np.random.default_rng(0)
    data = [rng.normal(size=shape).astype("float32") for shape in ((32, 3), (32,), (32, 2))]
    history = model.fit(
        data[:2], data[2], batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[change],
        validation_data=(data[:2], data[2]), validation_batch_size=16,
    ).history  # fmt: skip
    variables = {v.path: np.array(v).tolist() for v in model.variables}
    print(json.dumps([history, variables]))  # noqa: T201


main()
