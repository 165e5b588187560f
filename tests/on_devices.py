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

import networks  # noqa: E402
from lossargs import attach, balance, grad, live_args, with_args  # noqa: E402
from lossargs.balancing import SoftAdapt, Uncertainty  # noqa: E402


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


@with_args
def noisy(y_true, y_pred, *, seed):
    noise = keras.random.normal(ops.shape(y_true), seed=seed)
    return ops.mean(ops.square(y_true + noise - y_pred), axis=-1)


def make_models_with_layers():
    """Two models: in the loss of the second one, samples see what others left in the layers."""
    x = keras.Input((3,))
    apart = [networks.perceptual(features=networks.features())]
    apart.append(networks.projected(head=networks.head()))
    shared = [networks.centred(centres=networks.part_of("centre loss", None))]
    shared.append(noisy(seed=keras.random.SeedGenerator(1)))
    losses = {"apart": balance(apart, Uncertainty()), "shared": balance(shared, SoftAdapt())}
    for name, loss in losses.items():
        y = keras.layers.Dense(2, kernel_initializer="ones")(x)
        model = keras.Model(x, attach(y, loss), name=name)
        model.compile(keras.optimizers.SGD(0.02), loss=loss)
        yield model


def train(scope=contextlib.nullcontext):
    """The history and the variables of a model that is made in this scope."""
    keras.utils.set_random_seed(0)  # and the names of layers begin again
    keras.backend.clear_session()
    with scope():
        model = make_model()
        others = list(make_models_with_layers())
    live = live_args(model)["live"]
    change = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: live.assign(e + 1.0))
    rng = np.random.default_rng(0)
    x, adv, y = (rng.normal(size=size).astype("float32") for size in ((32, 3), (32,), (32, 2)))
    history = model.fit(
        [x, adv], y, batch_size=8, epochs=3, shuffle=False, verbose=0, callbacks=[change],
        validation_data=([x, adv], y), validation_batch_size=16,
    ).history  # fmt: skip
    for other in others:
        logs = other.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0).history
        history |= {f"{other.name}_{name}": values for name, values in logs.items()}
    models = (model, *others)
    variables = ((f"{one.name} {v.path}", v) for one in models for v in one.variables)
    return history, {name: np.array(variable).tolist() for name, variable in variables}


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
