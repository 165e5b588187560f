"""Live arguments give the numbers of the hand-written `compute_loss`, however the step is run."""

import functools
import sys

import keras
import numpy as np
import pytest
from keras import ops

import vaes
from helpers import BACKEND, KERAS, attached, linear_model, logs_of, step_itself
from lossargs import with_args

pytestmark = pytest.mark.fit

HOW = {"eager": {"run_eagerly": True, "jit_compile": False}, "graph": {"jit_compile": False}}
if BACKEND != "torch":
    HOW |= {"XLA": {"jit_compile": True}, "several steps": {"steps_per_execution": 2}}


def annealed():
    return keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0)


def weights_of(model):
    """The weights of the network by their path, from the layer on."""
    return {"/".join(v.path.split("/")[-2:]): np.array(v) for v in model.trainable_variables}


@pytest.mark.parametrize("how", HOW)
def test_vae(how):
    x, x_test = vaes.data(), vaes.data(16)
    model, loss = vaes.model_and_loss(annealed())
    by_hand = vaes.ByHand(annealed())
    model.compile(keras.optimizers.SGD(0.01), loss=loss, **HOW[how])
    by_hand.compile(keras.optimizers.SGD(0.01), **HOW[how])
    options = {"batch_size": 10, "shuffle": False, "validation_data": (x_test, x_test)}
    for epoch in range(3):
        logs, expected = (m.fit(x, x, verbose=0, **options).history for m in (model, by_hand))
        for name in ("loss", "kl_term", "val_kl_term", "val_beta"):
            assert logs[name] == pytest.approx(expected[name], abs=1e-5), (name, epoch)
        weights, expected = weights_of(model), weights_of(by_hand)
        assert sorted(weights) == sorted(expected)
        for path, weight in weights.items():
            np.testing.assert_allclose(weight, expected[path], atol=1e-5)


def test_vae_loss_is_that_of_numpy():
    x = vaes.data()
    model, loss = vaes.model_and_loss(0.25)
    model.compile("sgd", loss=loss)
    seed = model.get_layer("z").generator.state
    seed.assign([0, 7])
    x_hat = model.predict(x, batch_size=len(x), verbose=0)
    seed.assign([0, 7])
    logs = logs_of(model, x, x, batch_size=len(x))

    get = {layer.name: layer.get_weights() for layer in model.layers}
    hidden = np.tanh(x @ get["hidden"][0] + get["hidden"][1])
    mean = hidden @ get["z_mean"][0] + get["z_mean"][1]
    log_var = hidden @ get["z_log_var"][0] + get["z_log_var"][1]
    kl = -0.5 * (1 + log_var - mean**2 - np.exp(log_var)).sum(axis=1)
    loss = (((x - x_hat) ** 2).sum(axis=1) + 0.25 * kl).mean()
    assert logs == pytest.approx({"loss": loss, "kl_term": kl.mean()}, abs=1e-4, rel=1e-5)


@with_args
def mixed(y_true, y_pred, *, scale, step, x, mask):  # noqa: PLR0913
    return ops.mean(mask * ops.square(y_true - y_pred), axis=-1) * scale + step * x


@pytest.mark.skipif(BACKEND != "torch" or KERAS < (3, 12), reason="torch.compile")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_torch_compile(data, monkeypatch):
    # Traced and differentiated as by Inductor, without writing C++.
    torch = sys.modules["torch"]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))

    def results(**options):
        network = linear_model()
        x = network.inputs[0][:, 0]
        loss = mixed(scale=keras.Variable(2.0, name="scale"), step=step_itself(), x=x)
        model = attached(loss, network, 0.1, **options)
        batch = {"mask": data.mask.astype("float32")}
        steps = [model.train_on_batch(data.x, data.y, sample_weight=batch) for _ in range(3)]
        return [*steps, *model.get_weights()]

    for one, other in zip(results(jit_compile=True), results(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
