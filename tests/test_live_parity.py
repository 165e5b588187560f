"""Live arguments give the numbers of the hand-written `compute_loss`, however the step is run."""

import keras
import numpy as np
import pytest

import vaes
from helpers import BACKEND, KERAS

pytestmark = pytest.mark.fit

HOW = {
    "eager": {"run_eagerly": True, "jit_compile": False},
    "graph": {"jit_compile": False},
    "compiled": {"jit_compile": True},  # XLA, or torch.compile
    "several steps": {"steps_per_execution": 2},
}
if BACKEND == "torch":
    del HOW["several steps"]  # which Keras does not have there


def annealed():
    return keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0)


def weights_of(model):
    """The weights of the network by their path, from the layer on."""
    return {"/".join(v.path.split("/")[-2:]): np.array(v) for v in model.trainable_variables}


@pytest.mark.filterwarnings("ignore")  # torch's own, of torch.compile
@pytest.mark.parametrize("how", HOW)
def test_vae(how):
    if how == "compiled" and BACKEND == "torch" and KERAS < (3, 12):
        pytest.skip("torch.compile fails on any loss of this Keras")
    x, x_test = vaes.data(), vaes.data(16)
    model, loss = vaes.model_and_loss(annealed())
    by_hand = vaes.ByHand(annealed())
    model.compile(keras.optimizers.SGD(0.01), loss=loss, **HOW[how])
    # By hand, torch.compile computes the gradient with the beta of the next step: anew, for the
    # backward pass, when the step has moved on already.
    how_by_hand = "graph" if BACKEND == "torch" else how
    by_hand.compile(keras.optimizers.SGD(0.01), **HOW[how_by_hand])

    for epoch in range(3):
        logs, expected = (
            m.fit(
                x, x, batch_size=10, shuffle=False, validation_data=(x_test, x_test), verbose=0
            ).history
            for m in (model, by_hand)
        )
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
    logs = model.evaluate(x, x, batch_size=len(x), verbose=0, return_dict=True)

    get = {layer.name: layer.get_weights() for layer in model.layers}
    hidden = np.tanh(x @ get["hidden"][0] + get["hidden"][1])
    mean = hidden @ get["z_mean"][0] + get["z_mean"][1]
    log_var = hidden @ get["z_log_var"][0] + get["z_log_var"][1]
    kl = -0.5 * (1 + log_var - mean**2 - np.exp(log_var)).sum(axis=1)
    assert logs["kl_term"] == pytest.approx(kl.mean(), abs=1e-5)

    model.get_layer("z").generator.state.assign([0, 7])
    x_hat = model.predict(x, batch_size=len(x), verbose=0)
    model.get_layer("z").generator.state.assign([0, 7])
    value = model.evaluate(x, x, batch_size=len(x), verbose=0, return_dict=True)["loss"]
    assert value == pytest.approx((((x - x_hat) ** 2).sum(axis=1) + 0.25 * kl).mean(), rel=1e-5)
