"""`balance`: several losses that a rule turns into one."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from lossargs._errors import ArgumentError
from lossargs._function import LossFunction
from lossargs._loss import BoundLoss
from lossargs._sums import bound_term, widest_dtype
from lossargs._values import format_value


def balanced(values: Any, training: bool, *, terms: Any = (), rule: Any) -> Any:  # noqa: ARG001
    """Return the result of the rule for the values of the terms."""
    takes_training = "training" in inspect.signature(rule.call).parameters
    options = {"training": training} if takes_training else {}
    return rule(keras.ops.stack(values), **options)


BALANCE = LossFunction.of(balanced, package="lossargs")
BALANCE.is_internal = True


def _format(args: Mapping[str, Any]) -> str:
    return f"balance([{', '.join(map(repr, args['terms']))}], {format_value(args['rule'])})"


BALANCE.format = _format


def computed_weights(loss: BoundLoss) -> list[str]:
    """Return the names in the logs of the weights that the rule of a loss returns."""
    if loss.loss_function is not BALANCE:
        return []
    result = loss.bound_args["rule"].compute_output_spec(keras.KerasTensor((len(loss.terms),)))
    is_pair = isinstance(result, (tuple, list))
    return [f"{term.name}_weight" for term in loss.terms] if is_pair else []


def balance(terms: Iterable[Any], rule: keras.Layer, *, name: str = "balance") -> BoundLoss:
    """Return a loss of several terms whose weights a rule adapts in each step.

    The logs show each term under its name, and its weight as `<term>_weight` if the rule returns
    the weights. Attach the loss to a model: `attach(model, loss)`.

    Args:
        terms: One or several bound losses, sums or plain Keras losses, each reduced to one number.
            `attach` needs different names.
        rule: A `keras.Layer`, e.g. one of `lossargs.balancing`. It receives the values of the
            terms, a tensor of shape `(terms,)` in the widest dtype of the terms. It returns the
            loss, a scalar, or a tuple of the loss and the weights, shape `(terms,)`.
        name: The name in the logs if this loss is a term of a sum, or tracked.

    Returns:
        The bound loss.

    Raises:
        ArgumentError: `terms` is empty, or one of them is not a loss that is reduced to one number.
            Or `rule` is not a layer.

    Examples:
        >>> import keras
        >>> from lossargs import attach, balance, with_args
        >>> from lossargs.balancing import SoftAdapt
        >>> mse = with_args(keras.losses.mean_squared_error)
        >>> mae = with_args(keras.losses.mean_absolute_error)
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> loss = balance([mse(), mae()], SoftAdapt())
        >>> model = attach(model, loss)
        >>> model.compile("adam", loss=loss)
    """
    bound = tuple(bound_term(term, BoundLoss) for term in terms)
    if not bound:
        raise ArgumentError(
            "balance() was given no terms. Give a list of losses: balance([mse(), kl()], rule)."
        )
    if not isinstance(rule, keras.Layer):
        raise ArgumentError(
            f"The rule of balance() is {format_value(rule)}, not a layer. Write "
            "balance(terms, lossargs.balancing.SoftAdapt())."
        )
    for term in bound:
        if term.reduction in (None, "none"):
            raise ArgumentError(
                f"The term {term.name!r} of balance() has one number per sample, and a rule needs "
                "one per term. Reduce it: factory.options(reduction='sum_over_batch_size')(...)."
            )
    rule(keras.KerasTensor((len(bound),)))  # builds it
    args, dtype = {"terms": bound, "rule": rule}, widest_dtype(bound)
    return BoundLoss.of(BALANCE, args, name=name, reduction="sum_over_batch_size", dtype=dtype)
