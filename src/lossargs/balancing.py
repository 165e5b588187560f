"""Rules for `balance`: layers that turn the values of several terms into one loss.

A rule is a `keras.Layer`. `rule(values)` receives the values of the terms, a tensor of shape
`(terms,)`. It also receives `training` if `call` has a parameter of this name. It returns the loss,
or a tuple of the loss and the weights of the terms for the logs. Its own weights are trained and
saved with the model. A rule changes its state only with `training=True`.
"""

from typing import Any

import keras
from keras import ops

from lossargs._serialization import load_object, reading


class _Rule(keras.layers.Layer):
    """A rule that computes in the precision of the values."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)


@keras.saving.register_keras_serializable(package="lossargs")
class Uncertainty(_Rule):
    """Weight terms by learned uncertainties.

    `loss = sum(exp(-s) * values + s)`. The log variances `s` are trained with the model and start
    at zero. A term that is hard to reduce gets a small weight.

    Args:
        **kwargs: Arguments of `keras.layers.Layer`, except `autocast`.

    Examples:
        >>> import keras, lossargs
        >>> from lossargs.balancing import Uncertainty
        >>> mse = lossargs.with_args(keras.losses.mean_squared_error)
        >>> mae = lossargs.with_args(keras.losses.mean_absolute_error)
        >>> loss = lossargs.balance([mse(), mae()], Uncertainty())
        >>> loss, weights = Uncertainty()(keras.ops.convert_to_tensor([1.0, 3.0]))
        >>> float(keras.ops.convert_to_numpy(loss))
        4.0

    References:
        Kendall, Gal and Cipolla, 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses for
        Scene Geometry and Semantics", https://arxiv.org/abs/1705.07115, with one log variance per
        term and without the factors of one half.
    """

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create the weights for `(terms,)` values."""
        self.log_variances = self.add_weight(
            name="log_variances", shape=input_shape, initializer="zeros"
        )
        super().build(input_shape)

    def call(self, values: Any) -> tuple[Any, Any]:
        """Return a tuple: the loss, a scalar, and the weights, shape `(terms,)`.

        Args:
            values: The values of the terms, shape `(terms,)`.
        """
        s: Any = ops.convert_to_tensor(self.log_variances)
        weights: Any = ops.exp(-s)
        return ops.sum(weights * values + s), weights


class _Remembering(_Rule):
    """A rule whose weights depend on the values in earlier steps."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create the state for `(terms,)` values."""
        equal = keras.initializers.Constant(self.first_weight(input_shape[0]))
        self.steps = self.add_state("steps", (), dtype="int32", aggregation="only_first_replica")
        self.last = self.add_state("last", input_shape)
        self.last_weights = self.add_state("last_weights", input_shape, initializer=equal)
        super().build(input_shape)

    def add_state(self, name: str, shape: tuple[int, ...], **options: Any) -> Any:
        """Return a new state variable, zero at the start by default."""
        options = {"initializer": "zeros", "aggregation": "mean", **options}
        return self.add_weight(name=name, shape=shape, trainable=False, **options)

    def call(self, values: Any, training: bool = False) -> tuple[Any, Any]:
        """Return a tuple: the loss, a scalar, and the weights, shape `(terms,)`.

        Args:
            values: The values of the terms, shape `(terms,)`.
            training: Whether this is a training step, which changes the weights.
        """
        weights = ops.convert_to_tensor(self.last_weights)
        if training:
            fixed = ops.stop_gradient(values)
            weights = ops.where(self.steps > 0, self.weigh(fixed), weights)
            self.last.assign(fixed)
            self.last_weights.assign(weights)
            self.steps.assign(self.steps + 1)
        return ops.sum(weights * values), weights

    def first_weight(self, terms: int) -> float:  # noqa: ARG002
        """Return the weight of each term in the first step."""
        return 1.0

    def weigh(self, values: Any) -> Any:
        """Return the weights of the terms after the first step, shape `(terms,)`."""
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="lossargs")
class SoftAdapt(_Remembering):
    """Weight terms by their recent change.

    `loss = sum(weights * values)` with `weights = softmax(beta * (values - last_values))`. The
    `last_values` are the values in the previous step. All weights are equal in the first step. With
    a positive `beta`, a term that falls more slowly than the others gets a larger weight. No
    gradient flows through the weights. Evaluation uses the weights of the last training step.

    Args:
        beta: The sharpness of the softmax. The paper uses 0.1.
        **kwargs: Arguments of `keras.layers.Layer`, except `autocast`.

    Examples:
        >>> import keras, lossargs
        >>> from lossargs.balancing import SoftAdapt
        >>> mse = lossargs.with_args(keras.losses.mean_squared_error)
        >>> mae = lossargs.with_args(keras.losses.mean_absolute_error)
        >>> loss = lossargs.balance([mse(), mae()], SoftAdapt(beta=0.1))
        >>> rule = SoftAdapt(beta=0.1)
        >>> for values in ([1.0, 3.0], [1.0, 2.0]):
        ...     loss, weights = rule(keras.ops.convert_to_tensor(values), training=True)
        >>> [round(float(weight), 3) for weight in weights]
        [0.525, 0.475]

    References:
        Heydari, Thompson and Mehmood, 2019, "SoftAdapt: Techniques for Adaptive Loss Weighting of
        Neural Networks with Multi-Part Loss Functions", https://arxiv.org/abs/1912.12355.
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = beta

    def first_weight(self, terms: int) -> float:
        """Return the weight of each term in the first step."""
        return 1 / terms

    def weigh(self, values: Any) -> Any:
        """Return the weights of the terms after the first step, shape `(terms,)`."""
        return ops.softmax(self.beta * (values - self.last))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {**super().get_config(), "beta": self.beta}


@keras.saving.register_keras_serializable(package="lossargs")
class ReLoBRaLo(_Remembering):
    """Weight terms by their relative progress, with random lookback.

    For `n` terms with the values `v` in this step, `v_last` in the previous step and `v_0` in the
    first step:

        relative(reference) = n * softmax(v / (temperature * reference + epsilon))
        history = rho * last_weights + (1 - rho) * relative(v_0)
        weights = alpha * history + (1 - alpha) * relative(v_last)
        loss = sum(weights * v)

    In each step, `rho` is drawn: one with the probability `lookback`, else zero. All weights are
    one in the first step. `epsilon` is `keras.config.epsilon()`. No gradient flows through the
    weights. Evaluation uses the weights of the last training step.

    Args:
        alpha: The decay of the moving average of the weights, between 0 and 1. Larger is slower.
        temperature: The temperature of the softmax. A high one makes the weights equal.
        lookback: The probability of `rho = 1`. Then `history` is the last weights, otherwise it is
            `relative(v_0)`.
        seed: An integer, a `keras.random.SeedGenerator`, or `None` for a random seed.
        **kwargs: Arguments of `keras.layers.Layer`, except `autocast`.

    Examples:
        >>> import keras, lossargs
        >>> from lossargs.balancing import ReLoBRaLo
        >>> mse = lossargs.with_args(keras.losses.mean_squared_error)
        >>> mae = lossargs.with_args(keras.losses.mean_absolute_error)
        >>> loss = lossargs.balance([mse(), mae()], ReLoBRaLo(seed=0))
        >>> values = keras.ops.convert_to_tensor([1.0, 3.0])
        >>> loss, weights = ReLoBRaLo(seed=0)(values, training=True)
        >>> float(loss), [float(weight) for weight in weights]
        (4.0, [1.0, 1.0])

    References:
        Bischof and Kraus, 2021, "Multi-Objective Loss Balancing for Physics-Informed Deep
        Learning", https://arxiv.org/abs/2110.09813.
    """

    def __init__(
        self,
        alpha: float = 0.999,
        temperature: float = 1.0,
        lookback: float = 0.999,
        seed: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.alpha, self.temperature, self.lookback = alpha, temperature, lookback
        is_generator = isinstance(seed, keras.random.SeedGenerator)
        self.seed_generator = seed if is_generator else keras.random.SeedGenerator(seed)

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create the state for `(terms,)` values."""
        self.first = self.add_state("first", input_shape)
        super().build(input_shape)

    def weigh(self, values: Any) -> Any:
        """Return the weights of the terms after the first step, shape `(terms,)`."""
        state = self.first, self.last, self.last_weights
        first, last, last_weights = map(ops.convert_to_tensor, state)
        first = ops.where(self.steps > 1, first, last)
        self.first.assign(first)

        def relative(reference: Any) -> Any:
            scaled = values / (self.temperature * reference + keras.config.epsilon())
            weights: Any = ops.softmax(scaled)
            return weights * values.shape[0]

        draw: Any = keras.random.uniform((), seed=self.seed_generator)
        history: Any = ops.where(draw < self.lookback, last_weights, relative(first))
        return self.alpha * history + (1 - self.alpha) * relative(last)

    # Keras does not save the state of a generator.

    def save_own_variables(self, store: Any) -> None:
        """Save the weights, and the state of the generator."""
        super().save_own_variables(store)
        store["draws"] = ops.convert_to_numpy(self.seed_generator.state.value)

    def load_own_variables(self, store: Any) -> None:
        """Load the weights, and the state of the generator."""
        # Without "draws": Keras compares the number of entries with that of the weights.
        weights = {str(i): store[str(i)] for i in range(len(self.weights))}
        super().load_own_variables(weights)
        self.seed_generator.state.assign(store["draws"])

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        own = {"alpha": self.alpha, "temperature": self.temperature, "lookback": self.lookback}
        seed = keras.saving.serialize_keras_object(self.seed_generator)
        return {**super().get_config(), **own, "seed": seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ReLoBRaLo":
        """Return the rule that a config describes."""
        with reading("A saved rule"):
            seed = load_object(config["seed"], keras.random.SeedGenerator)
            rule: ReLoBRaLo = super().from_config({**config, "seed": seed})
            return rule
