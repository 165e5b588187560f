"""Sums of losses: `mse() + 0.5 * kl(z_mean, z_log_var)`."""

import dataclasses
import inspect
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, Self

import keras
import numpy as np

from lossargs._errors import ArgumentError, taken
from lossargs._function import LossFunction
from lossargs._live import Adapter
from lossargs._serialization import decode, encode, load_object
from lossargs._values import bind_value, cache_key, format_value, is_live

# Factors of a term: a number, then live values. A tuple `("1/", value)` divides.
Factors = tuple[Any, ...]


# Internal functions receive `(values, training, **args)`. `terms` is a parameter only to be bound.
def weighted_sum(values: Any, _: Any, *, terms: Any = (), weights: Any, constants: Any) -> Any:  # noqa: ARG001
    """Return the weighted sum of the values of the terms, and of the constants."""
    shapes = [tuple(value.shape) for value in values if len(value.shape)]
    sizes = [set(sizes) - {None} for sizes in itertools.zip_longest(*shapes, fillvalue=-1)]
    if any(len(different) > 1 for different in sizes):
        raise ArgumentError(
            f"The terms of a sum have values of the shapes {', '.join(map(str, shapes))}, which "
            "would broadcast. Reduce all terms: factory.options(reduction='sum')(...)."
        )
    parts = [scaled(value, factors) for value, factors in zip(values, weights, strict=True)]
    one = keras.ops.ones((), dtype=values[0].dtype)
    parts += [scaled(one, factors) for factors in constants]
    return sum(parts[1:], parts[0])


def scaled(value: Any, factors: Factors) -> Any:
    """Return a value times the factors of its term, in the dtype of the value."""
    number, *live = factors
    value = value if number == 1 else value * float(number)
    for factor in live:
        is_divisor = _is_divisor(factor)
        tensor = keras.ops.cast(factor[1] if is_divisor else factor, value.dtype)
        value = value / tensor if is_divisor else value * tensor
    return value


def keras_loss(y_true: Any, y_pred: Any, *, loss: "KerasLoss") -> Any:
    """Return the losses of the samples by a plain Keras loss."""
    return loss.wrapped.call(y_true, y_pred)


@keras.saving.register_keras_serializable(package="lossargs")
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class KerasLoss:
    """A plain Keras loss, equal to another one if their attributes are."""

    wrapped: keras.losses.Loss

    def cache_key(self) -> Any:
        """Return a key that is equal for losses that compute the same."""
        base = vars(keras.losses.Loss())  # name, reduction and dtype are options of the term
        own = {name: value for name, value in vars(self.wrapped).items() if name not in base}
        return type(self.wrapped), cache_key(own)

    def _given(self) -> dict[str, Any]:
        """Return the constructor arguments, also those that `get_config` leaves out."""
        # Attributes, and dicts among them, e.g. the arguments of the function in `_fn_kwargs`.
        found = dict(vars(self.wrapped))
        for value in vars(self.wrapped).values():
            found |= value if isinstance(value, dict) else {}
        found |= self.wrapped.get_config()
        parameters = inspect.signature(type(self.wrapped)).parameters
        return {name: found[name] for name in parameters if name in found}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KerasLoss) and self.cache_key() == other.cache_key()

    def __hash__(self) -> int:
        return hash(self.cache_key())

    def __repr__(self) -> str:
        cls = type(self.wrapped)
        defaults = {n: p.default for n, p in inspect.signature(cls).parameters.items()}
        given = [
            f"{name}={format_value(value)}"
            for name, value in self._given().items()
            if cache_key(value) != cache_key(defaults[name])
        ]
        return f"{cls.__name__}({', '.join(given)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _keras_loss_from, (json.dumps(encode(self, "A term of a sum")),)

    def get_config(self) -> dict[str, Any]:
        config: Any = keras.saving.serialize_keras_object(self.wrapped)
        # Keras leaves out some, e.g. `delta` of Huber.
        return {"loss": {**config, "config": {**self._given(), **config["config"]}}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(load_object(config["loss"], keras.losses.Loss))


def _keras_loss_from(text: str) -> KerasLoss:
    loss: KerasLoss = decode(json.loads(text))
    return loss


def format_sum(args: Mapping[str, Any]) -> str:
    """Return a sum as the code that makes it."""
    parts = [
        _format_term(factors, repr(loss))
        for factors, loss in zip(args["weights"], args["terms"], strict=True)
    ]
    parts += [_format_term(factors, None) for factors in args["constants"]]
    first, *others = [f"- {part[1:]}" if part[0] == "-" else f"+ {part}" for part in parts]
    first = first.replace("- ", "-", 1) if first[0] == "-" else first[2:]
    return " ".join([first, *others])


def _format_term(factors: Factors, loss: str | None) -> str:
    number, *live = factors
    shown = [] if loss is None else [loss]
    if number not in (1, -1) or loss is None:
        shown.insert(0, repr(abs(number)))
    text = " * ".join([*shown, *(format_value(one) for one in live if not _is_divisor(one))])
    text += "".join(f" / {format_value(one[1])}" for one in live if _is_divisor(one))
    return f"-{text}" if number < 0 else text


def _is_divisor(factor: Any) -> bool:
    return isinstance(factor, tuple)


SUM = LossFunction.of(weighted_sum, package="lossargs")
SUM.name, SUM.is_internal = "sum", True
SUM.format = format_sum
KERAS_LOSS = LossFunction.of(keras_loss, package="lossargs")
KERAS_LOSS.is_internal = True
KERAS_LOSS.format = lambda args: repr(args["loss"])


def label_of(loss: Any, name: str, place: str) -> str:
    """Return the name in the logs of a live value among the arguments of a loss."""
    if loss.loss_function is not SUM:
        return f"{name}{place}"
    # In `weights`, the place `_1_2` is the factor 2 of the term 1.
    term, factor, *_ = (int(index) for index in place.split("_")[1:])
    of = loss.terms[term].name if name == "weights" else "constant"
    return f"{of}_weight" if factor == 1 else f"{of}_weight_{factor}"


class Arithmetic:
    """The operators of bound losses."""

    # NumPy scalars on the left leave the operation to the loss.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> Any:
        return _of([*_parts(self), *_parts(other)], type(self))

    def __radd__(self, other: Any) -> Any:
        return _of([*_parts(other), *_parts(self)], type(self))

    def __sub__(self, other: Any) -> Any:
        return _of([*_parts(self), *_scaled(other, -1)], type(self))

    def __rsub__(self, other: Any) -> Any:
        return _of([*_parts(other), *_scaled(self, -1)], type(self))

    def __neg__(self) -> Any:
        return _of(_scaled(self, -1), type(self))

    def __mul__(self, other: Any) -> Any:
        return _of(_scaled(self, _weight(other, "*")), type(self))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        weight = _weight(other, "/")
        divisor = ("1/", weight) if is_live(weight) else 1 / weight
        return _of(_scaled(self, divisor), type(self))

    def replace_in_terms(self: Any, changes: Mapping[str, Any]) -> Any:
        """Return the loss with some arguments changed, in each term that takes them."""

        def takers(name: str, terms: Any) -> list[Any]:
            return [term for term in terms if term.takes(name) or takers(name, term.terms)]

        for name in changes:
            if not takers(name, self.terms):
                known = {known for term in self.all_terms() for known in term.parameters}
                raise ArgumentError(
                    f"No term of {self!r} takes {name!r}. {taken(name, sorted(known))} For other "
                    "terms or weights, write the loss again: f(a=1) + 2 * g()."
                )
        terms = tuple(
            term.replace(**{name: one for name, one in changes.items() if takers(name, [term])})
            for term in self.terms
        )
        return self.of(
            self.loss_function, {**self.bound_args, "terms": terms}, **self.get_options()
        )


# A sum in parts: pairs of factors and a loss, or `None` for a constant.
Parts = list[tuple[Factors, Any]]


def _parts(value: Any) -> Parts:
    """Return the parts of a summand: a loss, a sum, a Keras loss or a number."""
    if isinstance(value, Arithmetic):
        loss: Any = value
        if loss.loss_function is not SUM:
            return [((1,), loss)]
        args = loss.bound_args
        constants = [(factors, None) for factors in args["constants"]]
        return [*zip(args["weights"], args["terms"], strict=True), *constants]
    if isinstance(value, keras.losses.Loss):
        return [((1,), value)]
    number = _number(value)
    if number is None:
        fix = "Call a factory: factory(...); wrap a function: with_args(function)()."
        if is_live(value):
            fix = "Add it in a function: def f(y_true, y_pred, value): ..."
        raise ArgumentError(
            f"Cannot add {format_value(value)} to a loss. Terms are losses and numbers. {fix}"
        )
    return [((number,), None)] if number else []


def _number(value: Any) -> Any:
    """Return a scalar as a Python number, or `None`."""
    is_array = isinstance(value, (np.generic, np.ndarray)) or keras.ops.is_tensor(value)
    if is_array and not is_live(value) and tuple(value.shape) == ():
        value = bind_value(value, "A weight or term of a sum")
        value = value.item() if isinstance(value, np.ndarray) else value
    return value if type(value) is not bool and isinstance(value, (int, float)) else None


def _weight(value: Any, operator: str) -> Any:
    """Return a number or a live scalar that a loss can be weighted by, or raise."""
    number = _number(value)
    if number is not None:
        return number
    objects = (keras.Layer, keras.random.SeedGenerator, keras.KerasTensor)
    is_weight = is_live(value) and (not isinstance(value, objects) or isinstance(value, Adapter))
    shape = getattr(value, "shape", ())
    if not is_weight or (shape is not None and tuple(shape) != ()):
        raise ArgumentError(
            f"Cannot compute loss {operator} {format_value(value)}. A weight is a number, a scalar "
            "keras.Variable, a schedule or an Adapter. For a weight per sample, write a function: "
            "def f(y_true, y_pred, weight): ..."
        )
    return value


def _scaled(value: Any, factor: Any) -> Parts:
    """Return the parts of a summand, each with a further factor."""
    if is_live(factor) or _is_divisor(factor):
        return [((*factors, factor), loss) for factors, loss in _parts(value)]
    return [((factors[0] * factor, *factors[1:]), loss) for factors, loss in _parts(value)]


def _of(parts: Parts, cls: Any) -> Any:
    """Return the sum of parts as a bound loss."""
    terms = [(factors, loss) for factors, loss in parts if loss is not None]
    if len(parts) == len(terms) == 1 and parts[0][0] == (1,):  # e.g. of `loss + 0`
        return parts[0][1]
    args = {
        "terms": tuple(bound_term(loss, cls) for _, loss in terms),
        "weights": tuple(factors for factors, _ in terms),
        "constants": tuple(factors for factors, loss in parts if loss is None),
    }
    dtype = widest_dtype(args["terms"])
    return cls.of(SUM, args, name="sum", reduction="sum_over_batch_size", dtype=dtype)


def widest_dtype(terms: Any) -> Any:
    """Return the dtype with the most bits of the terms, at least that of Keras."""
    dtypes = [keras.config.floatx(), *(term.dtype for term in terms)]
    return max(dtypes, key=lambda name: int((re.findall(r"\d+", name) or ["1"])[0]))


def bound_term(loss: Any, cls: Any) -> Any:
    """Return a bound loss as it is, and a plain Keras loss as a bound loss."""
    if isinstance(loss, Arithmetic):
        return loss
    if not isinstance(loss, keras.losses.Loss):
        raise ArgumentError(
            f"{format_value(loss)} is not a loss. Call a factory: factory(...); wrap a function: "
            "with_args(function)()."
        )
    if type(loss).__call__ is not keras.losses.Loss.__call__:
        raise ArgumentError(
            f"Cannot use a {type(loss).__name__} as a term, because it defines `__call__`. Write "
            "its formula as a function: with_args(function)()."
        )
    options = {"name": loss.name, "reduction": loss.reduction, "dtype": loss.dtype}
    return cls.of(KERAS_LOSS, {"loss": KerasLoss(loss)}, **options)
