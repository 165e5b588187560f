"""Live arguments give the numbers of the hand-written `compute_loss`, however the step is run."""

import keras
import numpy as np
import pytest
from keras import ops

import losses
import networks
import vaes
from helpers import BACKEND, KERAS, attached, linear_model, logs_of, step_itself
from lossargs import with_args

pytestmark = pytest.mark.fit

CASES = "trained features", "own layer", "queue"


def weights_of(model):
    """Return the weights by their path, from the layer on."""
    return {"/".join(v.path.split("/")[-2:]): np.array(v) for v in model.trainable_variables}


@pytest.mark.parametrize("how", networks.HOW)
def test_vae(how):
    x, x_test = vaes.data(), vaes.data(16)
    annealed = keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0)
    model, loss = vaes.model_and_loss(annealed)
    by_hand = vaes.ByHand(annealed)
    options = networks.HOW[how]
    model.compile(keras.optimizers.SGD(0.01), loss=loss, **options)
    by_hand.compile(keras.optimizers.SGD(0.01), **options)
    options = {"batch_size": 10, "shuffle": False, "validation_data": (x_test, x_test)}
    for epochs in (2, 1):
        options |= {"epochs": epochs, "verbose": 0}
        logs, expected = (one.fit(x, x, **options).history for one in (model, by_hand))
        for name in ("loss", "kl_term", "val_kl_term", "val_beta"):
            assert logs[name] == pytest.approx(expected[name], abs=1e-5), name
        weights, expected = weights_of(model), weights_of(by_hand)
        assert sorted(weights) == sorted(expected)
        for path, weight in weights.items():
            np.testing.assert_allclose(weight, expected[path], atol=1e-5)


@with_args
def mixed(y_true, y_pred, *, scale, step, x, mask):  # noqa: PLR0913
    return ops.mean(mask * ops.square(y_true - y_pred), axis=-1) * scale + step * x


@pytest.mark.skipif(BACKEND != "torch" or KERAS < (3, 12), reason="torch.compile")
@pytest.mark.filterwarnings("ignore")  # torch's own
def test_torch_compile(data):
    """Live values of each kind, and layers that are trained, shared or updated."""

    def results(**options):
        network = linear_model()
        parts = [networks.part_of(case, network) for case in CASES]
        terms = [networks.CASES[case][1](part) for case, part in zip(CASES, parts, strict=True)]
        scale, x = keras.Variable(2.0, name="scale"), network.inputs[0][:, 0]
        live = mixed(scale=scale, step=step_itself(), x=x)
        loss = losses.both(first=live, second=networks.total(terms=terms), factor=1.0)
        model = attached(loss, network, 0.02, **options)
        batch = {"mask": data.mask.astype("float32")}
        steps = [model.train_on_batch(data.x, data.y, sample_weight=batch) for _ in range(3)]
        logs = logs_of(model, data.x, data.y, sample_weight=batch)
        return [*steps, *logs.values(), *networks.weights_of(model)]

    for one, other in zip(results(jit_compile=True), results(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
