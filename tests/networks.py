"""Losses that are given a layer or a model, and the same written by hand."""

import keras
import numpy as np
from keras import ops

from helpers import BACKEND, linear_model
from lossargs import attach, with_args

package = keras.saving.register_keras_serializable("networks")
RNG = np.random.default_rng(7)
X = RNG.normal(size=(32, 3)).astype("float32")
Y = RNG.normal(size=(32, 2)).astype("float32")
ANCHOR, IMPORTANCE = RNG.random(size=(2, 3, 2)).astype("float32")
HOW = {"as usual": {}, "eager": {"run_eagerly": True, "jit_compile": False}}  # to run a step
if BACKEND == "tensorflow":
    HOW["graph"] = {"jit_compile": False}
if BACKEND != "torch":
    HOW["several steps"] = {"steps_per_execution": 2}
squared_error = keras.losses.mean_squared_error


def filled(layer):
    """Return the layer with weights that are the same on every backend."""
    for place, variable in enumerate(layer.weights):
        values = 0.5 + 0.4 * np.sin(np.arange(np.prod(variable.shape)) + place)
        variable.assign(np.reshape(values, variable.shape))
    return layer


def built(layer, input_shape=None):
    layer.build(input_shape)
    return filled(layer)


@with_args
def perceptual(y_true, y_pred, features):
    """Compare also what a network makes of targets and predictions."""
    one, two = features(y_true, training=False), features(y_pred, training=False)
    return squared_error(y_true, y_pred) + squared_error(one, two)


def features(trainable=True):
    layers = keras.layers
    inside = [layers.Dense(4, "tanh"), layers.BatchNormalization(), layers.Dropout(0.5)]
    network = filled(keras.Sequential([keras.Input((2,)), *inside, layers.Dense(3)]))
    network.trainable = trainable
    return network


def perceptual_by_hand(part, y, y_pred, training):
    seen = [part(values, training=False) for values in (y, y_pred)]
    return ops.mean((y - y_pred) ** 2) + ops.mean((seen[0] - seen[1]) ** 2)


@with_args
def projected(y_true, y_pred, head):
    return squared_error(y_true, head(y_pred)) + 0.01 * ops.sum(ops.abs(head.kernel))


def head():
    return built(keras.layers.Dense(2, name="head"), (None, 2))


def projected_by_hand(part, y, y_pred, training):
    error = y - (y_pred @ part.kernel + part.bias)
    return ops.mean(error**2) + 0.01 * ops.sum(ops.abs(part.kernel))


@with_args
def elastic(y_true, y_pred, layer, anchor, importance):
    """Consolidate elastically the weights of a layer of the model itself."""
    penalty = ops.sum(importance * ops.square(layer.kernel - anchor))
    return squared_error(y_true, y_pred) + penalty


def elastic_by_hand(part, y, y_pred, training):
    importance, anchor = map(ops.convert_to_tensor, (IMPORTANCE, ANCHOR))
    return ops.mean((y - y_pred) ** 2) + ops.sum(importance * (part.kernel - anchor) ** 2)


@package
class Centres(keras.layers.Layer):
    """Moves its centres in each step."""

    def build(self, input_shape=None):
        zeros = {"initializer": "zeros", "trainable": False, "aggregation": "mean"}
        self.centres = self.add_weight(name="centres", shape=(2, 2), **zeros)

    def call(self, embedding, one_hot):
        nearest = one_hot @ self.centres
        total = ops.transpose(one_hot) @ ops.stop_gradient(embedding - nearest)
        count = 1 + ops.sum(one_hot, axis=0)
        self.centres.assign(self.centres + 0.5 * total / count[:, None])
        return ops.sum(ops.square(embedding - nearest), axis=-1)


@with_args
def centred(y_true, y_pred, centres):
    one_hot = ops.one_hot(ops.cast(y_true[:, 0] > 0, "int32"), 2)
    return squared_error(y_true, y_pred) + 0.5 * centres(y_pred, one_hot)


def centred_by_hand(part, y, y_pred, training):
    before, value, moved = part.centres + 0, ops.mean((y - y_pred) ** 2), []
    for label in range(2):
        here = ops.cast((y[:, :1] > 0) == (label == 1), "float32")
        shift = here * (y_pred - before[label])
        value = value + 0.5 * ops.mean(ops.sum(shift**2, axis=-1))
        step = 0.5 * ops.sum(shift, axis=0) / (1 + ops.sum(here))
        moved.append(ops.stop_gradient(before[label] + step))
    if training:
        part.centres.assign(ops.stack(moved))
    return value


@package
class Queue(keras.layers.Layer):
    """Predictions of the batches before, as negatives."""

    def build(self, input_shape=None):
        zeros = {"initializer": "zeros", "trainable": False, "aggregation": "mean"}
        self.rows = self.add_weight(name="rows", shape=(20, 2), **zeros)


@with_args
def contrasted(y_true, y_pred, queue):
    positive = ops.sum(y_true * y_pred, axis=-1, keepdims=True)
    logits = ops.concatenate([positive, y_pred @ ops.transpose(queue.rows)], axis=-1)
    queue.rows.assign(ops.concatenate([ops.stop_gradient(y_pred), queue.rows])[:20])
    return ops.logsumexp(logits, axis=-1) - logits[:, 0]


def contrasted_by_hand(part, y, y_pred, training):
    before, positive = part.rows + 0, ops.sum(y * y_pred, axis=-1)
    if training:
        part.rows.assign(ops.stop_gradient(ops.concatenate([y_pred, before[:12]])))
    sums = ops.exp(positive) + ops.sum(ops.exp(y_pred @ ops.transpose(before)), axis=-1)
    return ops.mean(ops.log(sums) - positive)


@with_args
def whitened(y_true, y_pred, norm):
    """Update the statistics of batches."""
    return squared_error(norm(y_true, training=True), norm(y_pred, training=True))


def norm():
    layer = keras.layers.BatchNormalization(name="norm")
    layer.build((None, 2))
    return layer


def whitened_by_hand(part, y, y_pred, training):
    scaled = []
    for values in (y, y_pred):
        mean, variance = ops.moments(values, axes=[0])
        white = (values - mean) / ops.sqrt(variance + part.epsilon)
        scaled.append(white * part.gamma + part.beta)
        if training:
            for old, new in ((part.moving_mean, mean), (part.moving_variance, variance)):
                old.assign(ops.stop_gradient(0.99 * old + 0.01 * new))
    return ops.mean((scaled[0] - scaled[1]) ** 2)


CASES = {  # what makes the part, the loss of the part, and that by hand
    "frozen features": (lambda: features(trainable=False), perceptual, perceptual_by_hand),
    "trained features": (features, perceptual, perceptual_by_hand),
    "head": (head, projected, projected_by_hand),
    "own layer": (None, lambda layer: elastic(layer, ANCHOR, IMPORTANCE), elastic_by_hand),
    "centre loss": (Centres, centred, centred_by_hand),
    "queue": (Queue, contrasted, contrasted_by_hand),
    "batch statistics": (norm, whitened, whitened_by_hand),
}


def part_of(case, network):
    make = CASES[case][0]
    if make is None:
        return network.layers[0]
    part = make()
    return part if part.built else built(part)


@with_args
def total(y_true, y_pred, *, terms):
    return sum(term(y_true, y_pred) for term in terms)


def attached(*cases):
    """The linear model with the loss of a case or of several, that loss, and the parts."""
    network = linear_model()
    parts = [part_of(case, network) for case in cases]
    terms = [CASES[case][1](part) for case, part in zip(cases, parts, strict=True)]
    loss = total(terms=terms) if len(terms) > 1 else terms[0]
    return attach(network, loss), loss, *parts


class ByHand(keras.Model):
    """The linear model with parts, and a `compute_loss` that uses them."""

    def __init__(self, network, parts, objectives):
        super().__init__()
        self.network, self.parts, self.objectives = network, parts, objectives

    def call(self, x, training=None):
        return self.network(x, training=training)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        pairs = zip(self.objectives, self.parts, strict=True)
        return sum(objective(part, y, y_pred, training) for objective, part in pairs)


def by_hand(*cases):
    network = linear_model()
    parts = [part_of(case, network) for case in cases]
    model = ByHand(network, parts, [CASES[case][2] for case in cases])
    model(X)
    return model


def fitted(model, epochs=1, **options):
    given = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": epochs, **options}
    return model.fit(X, Y, **given).history


def weights_of(model):
    return [np.array(variable) for variable in model.weights]


def assert_same(weights, expected, atol=1e-5):
    for one, two in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


def assert_trained_alike(model, other, epochs=1, **options):
    """Train both, compare their losses and weights, and return the logs of the first."""
    logs, expected = (fitted(one, epochs, **options) for one in (model, other))
    for name, values in expected.items():
        np.testing.assert_allclose(logs[name], values, atol=1e-5)
    assert_same(weights_of(model), weights_of(other))
    return logs


def saved(model, tmp_path):
    """Return the model as it loads from a file."""
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")
