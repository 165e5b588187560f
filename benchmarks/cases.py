"""Three models, each trained in all the ways in which one can write its loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers, losses, ops

from lossargs import attach, balance, with_args


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to train.

    Attributes:
        network: Makes its input, its output, and the hidden tensors that the loss reads.
        error: The loss of each sample, of `y_true` and `y_pred`.
        penalty: What the loss adds for the hidden tensors, one number for each sample.
        data: Makes inputs and targets for a number of samples.
        batch: Samples of a step.
        steps: Steps of a turn.
    """

    network: Callable[[], tuple[Any, Any, list[Any]]]
    error: Callable[[Any, Any], Any]
    penalty: Callable[..., Any]
    data: Callable[[int], tuple[Any, Any]]
    batch: int
    steps: int


def squared(hidden: Any) -> Any:
    return ops.mean(ops.square(hidden), axis=-1)


def perceptron(inputs: int, hidden: int, outputs: int, activation: str | None = None) -> Any:
    x = keras.Input((inputs,))
    code = layers.Dense(hidden, "relu")(x)
    return x, layers.Dense(outputs, activation)(code), [code]


def random_data(inputs: int, outputs: int) -> Callable[[int], tuple[Any, Any]]:
    def data(samples: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(0)
        shapes = (samples, inputs), (samples, outputs)
        x, y = (rng.normal(size=shape).astype("float32") for shape in shapes)
        return x, y

    return data


def digits(samples: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, samples)
    return rng.random((samples, 784), "float32"), np.eye(10, dtype="float32")[labels]


def images(samples: int) -> tuple[Any, Any]:
    x = np.random.default_rng(0).random((samples, 28, 28, 1), "float32")
    return x, x


class Sampling(layers.Layer):
    """The reparametrization trick (Kingma and Welling, 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = keras.random.SeedGenerator(0)

    def call(self, inputs):
        mean, log_var = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seed)
        return mean + ops.exp(0.5 * log_var) * noise


def autoencoder() -> Any:
    x = keras.Input((28, 28, 1))
    y = layers.Conv2D(16, 3, 2, "same", activation="relu")(x)
    y = layers.Flatten()(layers.Conv2D(32, 3, 2, "same", activation="relu")(y))
    mean, log_var = layers.Dense(8)(y), layers.Dense(8)(y)
    y = layers.Reshape((7, 7, 16))(layers.Dense(784, "relu")(Sampling()([mean, log_var])))
    y = layers.Conv2DTranspose(16, 3, 2, "same", activation="relu")(y)
    return x, layers.Conv2DTranspose(1, 3, 2, "same", activation="sigmoid")(y), [mean, log_var]


def divergence(mean: Any, log_var: Any) -> Any:
    return -0.5 * ops.sum(1 + log_var - ops.square(mean) - ops.exp(log_var), axis=-1)


def squared_error(y_true: Any, y_pred: Any) -> Any:
    return ops.sum(ops.square(y_true - y_pred), axis=(1, 2, 3))


CASES = {
    # So small that only overhead is left.
    "tiny": Case(
        lambda: perceptron(4, 4, 1), losses.mean_squared_error, squared, random_data(4, 1), 8, 50
    ),
    "MLP": Case(
        lambda: perceptron(784, 64, 10, "softmax"),
        losses.categorical_crossentropy, squared, digits, 128, 25,
    ),
    "convolutional VAE": Case(autoencoder, squared_error, divergence, images, 64, 4),
}  # fmt: skip


# A constant added to the loss.


def closure(case: Case, shift: float = 10.0) -> keras.Model:
    def loss(y_true, y_pred):
        return case.error(y_true, y_pred) + shift

    x, y, _ = case.network()
    return compiled(keras.Model(x, y), loss)


def loss_class(case: Case) -> keras.Model:
    class Shifted(losses.Loss):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def call(self, y_true, y_pred):
            return case.error(y_true, y_pred) + self.shift

    x, y, _ = case.network()
    return compiled(keras.Model(x, y), Shifted(10.0))


def constant(case: Case) -> keras.Model:
    @with_args
    def shifted(y_true, y_pred, shift):
        return case.error(y_true, y_pred) + shift

    x, y, _ = case.network()
    return compiled(keras.Model(x, y), shifted(10.0))


# A penalty on hidden tensors, with a weight that changes and is logged.


def new_weight() -> keras.Variable:
    return keras.Variable(0.1, trainable=False, name="weight", dtype="float32")


class WithPenalty(keras.Model):
    """A model of outputs and hidden tensors, with its loss written by hand."""

    def hold(self, case: Case, weights: list[keras.Variable]) -> None:
        self.case = case
        self.loss_weights = weights
        self.logged = [keras.metrics.Mean(name=f"weight_{i}") for i in range(len(weights))]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        y_pred, *hidden = y_pred
        values = self.case.error(y, y_pred)
        for weight, metric in zip(self.loss_weights, self.logged, strict=True):
            metric.update_state(weight.value)
            values += weight.value * self.case.penalty(*hidden)
        if sample_weight is not None:
            values *= sample_weight
        return sum(self.losses, ops.mean(values))


class WithKerasLoss(WithPenalty):
    """The same, with masks, sample weights and reduction by a loss class of Keras."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        y_pred, *hidden = y_pred

        def error(y_true, y_pred):
            values = self.case.error(y_true, y_pred)
            for weight, metric in zip(self.loss_weights, self.logged, strict=True):
                metric.update_state(weight.value)
                values += weight.value * self.case.penalty(*hidden)
            return values

        return sum(self.losses, Reduced(error)(y, y_pred, sample_weight))


def compute_loss(case: Case, count: int = 1, cls: Any = WithPenalty) -> keras.Model:
    x, y, hidden = case.network()
    model = cls(x, [y, *hidden])
    model.hold(case, [new_weight() for _ in range(count)])
    return compiled(model, None)


class Penalty(layers.Layer):
    """Adds the penalty to the losses of the model; on JAX it cannot log the weight."""

    def __init__(self, case: Case, weight: keras.Variable) -> None:
        super().__init__()
        self.case, self.weight = case, weight

    def call(self, tensors):
        y_pred, *hidden = tensors
        self.add_loss(self.weight * ops.mean(self.case.penalty(*hidden)))
        return y_pred


def add_loss(case: Case) -> keras.Model:
    x, y, hidden = case.network()
    return compiled(keras.Model(x, Penalty(case, new_weight())([y, *hidden])), case.error)


def live(case: Case, count: int = 1) -> keras.Model:
    @with_args
    def penalized(y_true, y_pred, *, hidden, weights):
        values = case.error(y_true, y_pred)
        for weight in weights:
            values += weight * case.penalty(*hidden)
        return values

    x, y, hidden = case.network()
    loss = penalized(hidden=hidden, weights=[new_weight() for _ in range(count)])
    return compiled(keras.Model(x, attach(y, loss)), loss)


# A sum of terms, each of them logged.


def terms(count: int) -> list[Callable[[Any, Any], Any]]:
    """Functions of one number for each sample, no two of them equal."""

    def term(power: float) -> Callable[[Any, Any], Any]:
        def difference(y_true, y_pred):
            return ops.mean(ops.abs(y_true - y_pred) ** power, axis=-1)

        return difference

    return [term(1 + place / 4) for place in range(count)]


class Reduced(losses.Loss):
    """A term as a plain Keras loss, which applies masks and sample weights."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, y_true, y_pred):
        return self.function(y_true, y_pred)


class WithTerms(keras.Model):
    """A model whose loss is one function, with a metric for each of its parts."""

    def hold(self, parts: list[Callable[[Any, Any], Any]]) -> None:
        self.parts = parts
        self.logged = [keras.metrics.Mean(name=f"term_{place}") for place in range(len(parts))]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        values = [ops.mean(part(y, y_pred)) for part in self.parts]
        for value, metric in zip(values, self.logged, strict=True):
            metric.update_state(value, sample_weight=ops.shape(y)[0])
        weighted = [value / (place + 1) for place, value in enumerate(values)]
        return sum(weighted[1:], weighted[0])


def one_function(case: Case, count: int) -> keras.Model:
    x, y, _ = case.network()
    model = WithTerms(x, y)
    model.hold(terms(count))
    return compiled(model, None)


def keras_losses(case: Case, count: int) -> keras.Model:
    x, y, _ = case.network()
    model = WithTerms(x, y)
    model.hold([Reduced(part) for part in terms(count)])
    return compiled(model, None)


def bound_terms(count: int) -> list[Any]:
    named = [(f"term_{place}", part) for place, part in enumerate(terms(count))]
    return [with_args(part, name=name)() for name, part in named]


def sum_of_terms(case: Case, count: int) -> keras.Model:
    loss = sum(term / (place + 1) for place, term in enumerate(bound_terms(count)))
    x, y, _ = case.network()
    return compiled(keras.Model(x, attach(y, loss)), loss)


def balanced_terms(case: Case, rule: Callable[[], keras.Layer], count: int) -> keras.Model:
    loss = balance(bound_terms(count), rule())
    x, y, _ = case.network()
    return compiled(keras.Model(x, attach(y, loss)), loss)


CONSTANT = {"closure": closure, "Loss subclass": loss_class, "lossargs": constant}
LIVE = {"compute_loss": compute_loss, "add_loss": add_loss, "lossargs": live}


def compiled(model: keras.Model, loss: Any, **options: Any) -> keras.Model:
    model.compile(keras.optimizers.SGD(1e-3), loss=loss, **options)
    return model
