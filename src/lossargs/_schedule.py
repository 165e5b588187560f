"""`schedule`: from a function of the training step to a factory of learning rate schedules."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, Self, overload

import keras

from lossargs._errors import ArgumentError, listed
from lossargs._factory import Factory
from lossargs._function import Function
from lossargs._keras import ReadScope
from lossargs._serialization import load_object, reading
from lossargs._values import cache_key, format_value, live_leaves, to_tensors

P = ParamSpec("P")

_SCHEDULE: Any = keras.optimizers.schedules.LearningRateSchedule


class ScheduleFunction(Function):
    """A function of `(step, **extra)`."""

    kind, keyword, decorator = "schedule", "learning_rate", "schedule"
    tensors = reserved = ("step",)


@keras.saving.register_keras_serializable(package="lossargs")
class BoundSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate schedule that calls its function with the bound arguments.

    Call a schedule factory (see `schedule`) to create it. Schedules of the same function with equal
    arguments are equal.
    """

    def __init__(self, function: ScheduleFunction, args: dict[str, Any]) -> None:
        self.schedule_function = function
        self.bound_args = function.bind_values(args)
        if missing := function.missing(args):
            raise ArgumentError(
                f"{function.name}() needs a value for {listed(missing)}. Write "
                f"{function.name}({missing[0]}=...)."
            )
        for name, value in self.bound_args.items():
            for _, leaf in live_leaves(value):
                if not isinstance(leaf, _SCHEDULE):
                    raise self._outside(f"takes {format_value(leaf)} as {name!r}", name)
        self._key = (function, tuple((n, cache_key(v)) for n, v in self.bound_args.items()))

    def _outside(self, what: str, parameter: str) -> ArgumentError:
        name = self.schedule_function.name
        return ArgumentError(
            f"{name} {what}. A schedule reads only the step, constants and other schedules. Take "
            f"both in the loss: def loss(y_true, y_pred, {name}, {parameter}): ..."
        )

    def __call__(self, step: Any) -> Any:
        """Return the value at a training step.

        Args:
            step: The number of the step, a scalar. It is cast to float32, which is exact up to
                16,777,216.

        Returns:
            A scalar tensor, of the dtype that the function returns.

        Raises:
            ArgumentError: The function reads a variable, or does not return a scalar.
        """
        step = keras.ops.cast(keras.ops.convert_to_tensor(step), "float32")
        args = {name: to_tensors(one, "float32", name) for name, one in self.bound_args.items()}
        with ReadScope() as scope:
            value: Any = keras.ops.convert_to_tensor(self.schedule_function.fn(step, **args))
        if scope.variables:
            variable = next(iter(scope.variables.values()))
            raise self._outside(f"reads the variable {variable.path!r}", "variable")
        if tuple(value.shape) != ():
            raise ArgumentError(
                f"{self!r} returned a tensor of shape {tuple(value.shape)}, and a "
                "schedule has one number for each step. Return a scalar: keras.ops.max(...)."
            )
        return value

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make this schedule again.

        Raises:
            SavingError: The function or a value cannot be saved so that it loads again.
        """
        return self.schedule_function.get_config(self.bound_args, lambda leaf: leaf)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the schedule that `get_config` described.

        Raises:
            SavingError: Its function is not known in this process, has other parameters now, or
                the config is damaged.
        """
        with reading("The saved schedule"):
            return cls(*ScheduleFunction.from_config(config, _decode))

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name}={format_value(value)}" for name, value in self.bound_args.items()
        )
        return f"{self.schedule_function.name}({shown})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundSchedule) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.schedule_function, self.bound_args)


def _decode(config: dict[str, Any]) -> Any:
    return load_object(config, _SCHEDULE)


class ScheduleFactory(Factory[P]):
    """A factory of schedules, made by `schedule`. Calling it binds extra arguments.

    `__wrapped__` is the function. `inspect.signature` returns the extra parameters.
    """

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> BoundSchedule:
        """Return a schedule with these arguments.

        Args:
            *args: Arguments in the order of the function, after `step`.
            **kwargs: Arguments by name: constants or other schedules.

        Returns:
            A `keras.optimizers.schedules.LearningRateSchedule`.

        Raises:
            ArgumentError: An argument is missing, unknown, given twice, or cannot be bound.

        Examples:
            >>> from lossargs import schedule
            >>> linear = schedule(lambda step, slope: slope * step)
            >>> float(linear(slope=0.25)(8))
            2.0
        """
        return BoundSchedule(self.function, self.function.bind(args, kwargs))


class _Decorator(Protocol):
    """The result of `schedule` without a function."""

    def __call__(self, fn: Callable[Concatenate[Any, P], Any], /) -> ScheduleFactory[P]: ...


@overload
def schedule(
    fn: Callable[Concatenate[Any, P], Any], /, *, package: str | None = None
) -> ScheduleFactory[P]: ...
@overload
def schedule(*, package: str | None = None) -> _Decorator: ...
def schedule(fn: Callable[..., Any] | None = None, /, *, package: str | None = None) -> Any:
    """Return a factory of learning rate schedules for a function of the training step.

    Args:
        fn: A function `fn(step, ...)`. It receives the step by position, as a scalar float32
            tensor. All other parameters are passed by name. Defaults and `**extra` are allowed. The
            function returns a scalar.
        package: The prefix of the saved name of the function. The default is the name of its
            module. Set it so that files load after the function moves to another module.

    Returns:
        The factory. Calling it with the further arguments returns a
        `keras.optimizers.schedules.LearningRateSchedule` for losses and optimizers. The arguments
        are constants or other schedules. Without `fn`, `schedule` returns a decorator.

    Raises:
        ArgumentError: The signature is not `fn(step, ...)`, or another function has the same saved
            name.

    Examples:
        >>> import keras
        >>> from lossargs import schedule
        >>> @schedule
        ... def cyclical(step, period, ratio=0.5):
        ...     return keras.ops.minimum((step % period) / (ratio * period), 1.0)
        >>> beta = cyclical(2000)
        >>> beta
        cyclical(period=2000)
        >>> float(beta(500)), float(beta(1500))
        (0.5, 1.0)
    """
    if fn is None:
        return functools.partial(schedule, package=package)
    return ScheduleFactory(ScheduleFunction.of(fn, package))
