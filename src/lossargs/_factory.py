"""`with_args`: from a function of `(y_true, y_pred, **extra)` to a factory of losses."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypedDict, Unpack, overload

import keras

from lossargs._function import LossFunction
from lossargs._loss import BoundLoss

P = ParamSpec("P")


class Options(TypedDict, total=False):
    """Options of the losses that a factory makes."""

    name: str | None
    reduction: str | None
    dtype: Any


class _AllOptions(Options, total=False):
    package: str | None


class Factory(Generic[P]):
    """Base class of factories. Calling a factory binds the extra arguments of its function."""

    def __init__(self, function: Any, **options: Any) -> None:
        wrapper: Any = self
        functools.update_wrapper(wrapper, function.fn)
        self.__signature__ = function.signature
        self.function = function
        self._options = options
        self._key = (type(self), function, *options.values())

    def __repr__(self) -> str:
        return f"<{self.function.kind} factory {self.function.name}{self.__signature__}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factory) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __deepcopy__(self, memo: object = None) -> Self:
        return self

    __copy__ = __deepcopy__

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), self.function, **self._options), ()


class LossFactory(Factory[P]):
    """A factory of losses, made by `with_args`. Calling it binds extra arguments.

    `__wrapped__` is the function. `inspect.signature` returns the extra parameters.
    """

    def __init__(self, function: LossFunction, **options: Unpack[Options]) -> None:
        name = options.get("name") or function.log_name
        reduction, dtype = options.get("reduction"), options.get("dtype")
        # Checks the options as Keras does, once, here.
        keras.losses.Loss(name=name, reduction=reduction)  # pyright: ignore[reportArgumentType]
        if dtype is not None:
            dtype = keras.dtype_policies.get(dtype).compute_dtype
        super().__init__(function, name=name, reduction=reduction, dtype=dtype)

    # Editors show the first form. The second one allows missing arguments, and live values in
    # place of the annotated types.
    @overload
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> BoundLoss: ...
    @overload
    def __call__(self, /, *args: Any, **kwargs: Any) -> BoundLoss: ...
    def __call__(self, /, *args: Any, **kwargs: Any) -> BoundLoss:
        """Return a loss with these extra arguments.

        Args:
            *args: Extra arguments in the order of the function.
            **kwargs: Extra arguments by name: constants, live arguments or other bound losses.

        Returns:
            The bound loss. It reads missing arguments from the batch, or uses their defaults.

        Raises:
            ArgumentError: An argument is unknown, given twice, or cannot be bound.

        Examples:
            >>> import keras
            >>> from lossargs import with_args
            >>> with_args(keras.losses.huber)(delta=2.0)
            huber(delta=2.0)
        """
        return BoundLoss.of(self.function, self.function.bind(args, kwargs), **self._options)

    def options(self, **changes: Unpack[Options]) -> "LossFactory[P]":
        """Return a factory of the same function with other options.

        Args:
            **changes: `name`, `reduction` or `dtype`, as for `with_args`.

        Returns:
            The new factory. This one stays unchanged.

        Raises:
            ValueError: Keras does not know the reduction or the dtype.

        Examples:
            >>> import keras
            >>> from lossargs import with_args
            >>> huber = with_args(keras.losses.huber)
            >>> huber.options(reduction="sum")(delta=2.0)
            huber.options(reduction='sum')(delta=2.0)
        """
        options: Any = {**self._options, **changes}
        return LossFactory(self.function, **options)


class _Decorator(Protocol):
    """The result of `with_args` without a function; the second form is for `**extra`."""

    @overload
    def __call__(self, fn: Callable[Concatenate[Any, Any, P], Any], /) -> LossFactory[P]: ...
    @overload
    def __call__(  # type: ignore[overload-cannot-match]
        self, fn: Callable[..., Any], /
    ) -> LossFactory[...]: ...


@overload
def with_args(
    fn: Callable[Concatenate[Any, Any, P], Any], /, **options: Unpack[_AllOptions]
) -> LossFactory[P]: ...
@overload
def with_args(  # type: ignore[overload-cannot-match]
    fn: Callable[..., Any], /, **options: Unpack[_AllOptions]
) -> LossFactory[...]: ...
@overload
def with_args(**options: Unpack[_AllOptions]) -> _Decorator: ...
def with_args(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
    package: str | None = None,
) -> Any:
    """Return a factory of Keras losses for a function with extra arguments.

    Args:
        fn: A function `fn(y_true, y_pred, ...)`. Keras passes the targets and the predictions by
            position: tensors of shape `(batch_size, d0, .. dN)` and of `dtype`, or nested
            structures of them. All other parameters are passed by name. Defaults and `**extra` are
            allowed. The function returns losses of shape `(batch_size, d0, .. dN-1)`, or a scalar.
        name: The name of the losses in logs. The default is the name of the function.
        reduction: How Keras reduces the losses of the samples: `"sum_over_batch_size"`, `"sum"`,
            `"mean"`, `"mean_with_sample_weight"`, `"none"` or `None`.
        dtype: The name of the dtype of the computation, or a `keras.DTypePolicy`. The default is
            `keras.config.floatx()`.
        package: The prefix of the saved name of the function. The default is the name of its
            module. Set it so that files load after the function moves to another module.

    Returns:
        The factory. Calling it with extra arguments returns a loss. The loss reads missing
        arguments from each batch, from a dict as the third element of the data, or uses their
        defaults. Without `fn`, `with_args` returns a decorator.

    Raises:
        ArgumentError: The signature is not `fn(y_true, y_pred, ...)`. Or another function has the
            same saved name.
        ValueError: Keras does not know the reduction or the dtype.

    Examples:
        >>> import keras
        >>> from lossargs import with_args
        >>> @with_args
        ... def shifted(y_true, y_pred, shift):
        ...     return keras.losses.mean_squared_error(y_true, y_pred) + shift
        >>> shifted(10)
        shifted(shift=10)
        >>> float(shifted(10)([[1.0]], [[3.0]]))
        14.0
    """
    if fn is None:
        return functools.partial(
            with_args, name=name, reduction=reduction, dtype=dtype, package=package
        )
    function = LossFunction.of(fn, package)
    return LossFactory(function, name=name, reduction=reduction, dtype=dtype)
