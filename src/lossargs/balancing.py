"""Rules for `balance`: layers that turn the values of several terms into one loss.

A rule is a `keras.Layer`. It is called with a vector that holds the value of each term, and returns
the loss, or the loss and the current weights of the terms for the logs. It may have weights, which
are trained and saved with the model. It changes its state only with `training=True`.
"""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="lossargs")
class Uncertainty(keras.layers.Layer):
    """Weight terms by learned uncertainties.

    `loss = sum(exp(-s) * values + s)`. The log variances `s` are trained with the model and start
    at zero. A term that is hard to reduce gets a small weight.

    Args:
        **kwargs: Arguments of `keras.layers.Layer`.

    Examples:
        >>> import keras, lossargs
        >>> from lossargs.balancing import Uncertainty
        >>> mse = lossargs.with_args(keras.losses.mean_squared_error)
        >>> mae = lossargs.with_args(keras.losses.mean_absolute_error)
        >>> loss = lossargs.balance([mse(), mae()], Uncertainty())

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
        """Return the loss and the weights.

        Args:
            values: The values of the terms, shape `(terms,)`.
        """
        s = ops.convert_to_tensor(self.log_variances)
        weights = ops.exp(-s)
        return ops.sum(weights * values + s), weights


class _Remembering(keras.layers.Layer):
    """A rule whose weights depend on the values in earlier steps."""

    def build(self, input_shape: tuple[int, ...]) -> None:
        """Create the weights for `(terms,)` values."""
        self.steps = self.add_state("steps", (), "int32")
        self.last = self.add_state("last", input_shape)
        super().build(input_shape)

    def add_state(self, name: str, shape: tuple[int, ...], dtype: str | None = None) -> Any:
        """Return a new state variable, zero at the start."""
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            dtype=dtype,
            trainable=False,
            aggregation="only_first_replica",
        )

    def call(self, values: Any, training: bool = False) -> tuple[Any, Any]:
        """Return the loss and the weights, and keep the values if `training`.

        Args:
            values: The values of the terms, shape `(terms,)`.
            training: Whether this is a training step.
        """
        fixed = ops.stop_gradient(values)
        weights = self.weigh(fixed, training)
        if training:
            self.last.assign(fixed)
            self.steps.assign(self.steps + 1)
        return ops.sum(weights * values), weights

    def weigh(self, values: Any, training: bool) -> Any:
        """Return the weights of the terms, shape `(terms,)`."""
        raise NotImplementedError


@keras.saving.register_keras_serializable(package="lossargs")
class SoftAdapt(_Remembering):
    """Weight terms by their recent change.

    `weights = softmax(beta * (values - last_values))`, where `last_values` are those of the step
    before. All weights are equal in the first step. With a positive `beta`, a term that falls more
    slowly than the others gets a larger weight.

    Args:
        beta: The sharpness of the softmax. The paper uses 0.1.
        **kwargs: Arguments of `keras.layers.Layer`.

    Examples:
        >>> import keras, lossargs
        >>> from lossargs.balancing import SoftAdapt
        >>> mse = lossargs.with_args(keras.losses.mean_squared_error)
        >>> mae = lossargs.with_args(keras.losses.mean_absolute_error)
        >>> loss = lossargs.balance([mse(), mae()], SoftAdapt(beta=0.1))

    References:
        Heydari, Thompson and Mehmood, 2019, "SoftAdapt: Techniques for Adaptive Loss Weighting of
        Neural Networks with Multi-Part Loss Functions", https://arxiv.org/abs/1912.12355.
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = beta

    def weigh(self, values: Any, training: bool) -> Any:  # noqa: ARG002
        """Return the weights of the terms, shape `(terms,)`."""
        change = ops.where(self.steps > 0, values - self.last, ops.zeros_like(values))
        return ops.softmax(self.beta * change)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        return {**super().get_config(), "beta": self.beta}


@keras.saving.register_keras_serializable(package="lossargs")
class ReLoBRaLo(_Remembering):
    """Weight terms by their relative progress, with random lookback.

    For `n` terms with the values `v` in this step, `v_last` in the step before and `v_0` in the
    first step:

        balance(reference) = n * softmax(v / (temperature * reference))
        history = rho * last_weights + (1 - rho) * balance(v_0)
        weights = alpha * history + (1 - alpha) * balance(v_last)

    In each step, `rho` is drawn: one with the probability `lookback`, else zero. All weights are
    one in the first step.

    Args:
        alpha: How slowly weights change, between 0 and 1.
        temperature: The temperature of the softmax. A high one makes the weights equal.
        lookback: The probability of looking back to the last step, and not to the first one.
        seed: An integer, or a `keras.random.SeedGenerator`, for the draws.
        **kwargs: Arguments of `keras.layers.Layer`.

    Examples:
        >>> import keras, lossargs
        >>> from lossargs.balancing import ReLoBRaLo
        >>> mse = lossargs.with_args(keras.losses.mean_squared_error)
        >>> mae = lossargs.with_args(keras.losses.mean_absolute_error)
        >>> loss = lossargs.balance([mse(), mae()], ReLoBRaLo(seed=0))

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
        """Create the weights for `(terms,)` values."""
        self.first = self.add_state("first", input_shape)
        self.last_weights = self.add_state("last_weights", input_shape)
        super().build(input_shape)

    def weigh(self, values: Any, training: bool) -> Any:
        """Return the weights of the terms, shape `(terms,)`."""
        is_first = ops.equal(self.steps, 0)
        first, last_weights = map(ops.convert_to_tensor, (self.first, self.last_weights))
        if not training:
            return ops.where(is_first, ops.ones_like(values), last_weights)

        def balance(reference: Any) -> Any:
            scaled = values / (self.temperature * reference + keras.config.epsilon())
            return ops.softmax(scaled) * values.shape[0]

        draw: Any = keras.random.uniform((), seed=self.seed_generator)
        history = ops.where(draw < self.lookback, last_weights, balance(first))
        weights = self.alpha * history + (1 - self.alpha) * balance(self.last)
        weights = ops.where(is_first, ops.ones_like(values), weights)
        self.first.assign(ops.where(is_first, values, first))
        self.last_weights.assign(weights)
        return weights

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        own = {"alpha": self.alpha, "temperature": self.temperature, "lookback": self.lookback}
        seed = keras.saving.serialize_keras_object(self.seed_generator)
        return {**super().get_config(), **own, "seed": seed}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ReLoBRaLo":
        """Return the rule that a config describes."""
        seed = keras.saving.deserialize_keras_object(config["seed"])
        return cls(**{**config, "seed": seed})
