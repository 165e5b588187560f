"""`with_args`: from a function of `(y_true, y_pred, **extra)` to a factory of losses."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, overload

import keras

from lossargs._errors import SignatureError
from lossargs._function import LossFunction, inspected
from lossargs._loss import BoundLoss

P = ParamSpec("P")

_KEEP: Any = object()  # `None` is a reduction and a dtype


class LossFactory(Generic[P]):
    """Binds the extra arguments of a loss function; made by `with_args`.

    Attributes:
        function: The function as lossargs knows it.
        __wrapped__: The function itself.
        __signature__: Its signature without the first two parameters.
    """

    function: LossFunction
    __wrapped__: Callable[..., Any]

    def __init__(
        self, function: LossFunction, *, name: str | None, reduction: str | None, dtype: Any
    ) -> None:
        functools.update_wrapper(self, function.fn)
        self.__signature__ = function.signature
        self.function = function
        name = name or function.log_name
        # Checks the options as Keras does, once, here.
        keras.losses.Loss(name=name, reduction=reduction)  # pyright: ignore[reportArgumentType]
        if dtype is not None:
            dtype = keras.dtype_policies.get(dtype).compute_dtype
        self._options = {"name": name, "reduction": reduction, "dtype": dtype}

    # The first form is what editors show. The second lets any argument be left to the batch, and
    # be a value that stands for the annotated one.
    @overload
    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> BoundLoss: ...
    @overload
    def __call__(self, /, *args: Any, **kwargs: Any) -> BoundLoss: ...
    def __call__(self, /, *args: Any, **kwargs: Any) -> BoundLoss:
        """Bind extra arguments, by position or name; those left out come with the batch.

        Returns:
            The loss, a `keras.losses.Loss`.

        Raises:
            ArgumentError: An argument is unknown, given twice, or no constant.
        """
        return BoundLoss.of(self.function, self.function.bind(args, kwargs), **self._options)

    def options(
        self, *, name: str | None = _KEEP, reduction: str | None = _KEEP, dtype: Any = _KEEP
    ) -> "LossFactory[P]":
        """The same factory with other options for the losses it makes.

        Args:
            name: Their name in logs and messages of Keras; `None` is the function's own.
            reduction: How Keras reduces the losses of the samples: `"sum_over_batch_size"`,
                `"sum"`, `"mean"`, `"mean_with_sample_weight"`, `"none"` or `None`.
            dtype: What they compute in, e.g. `"float32"`; `None` is `keras.config.floatx()`.

        Returns:
            The other factory; options not given are kept.

        Examples:
            >>> import keras
            >>> from lossargs import with_args
            >>> huber = with_args(keras.losses.huber)
            >>> huber.options(reduction="sum")(delta=2.0)
            huber.options(reduction='sum')(delta=2.0)
        """
        given = {"name": name, "reduction": reduction, "dtype": dtype}
        changes = {option: value for option, value in given.items() if value is not _KEEP}
        return LossFactory(self.function, **{**self._options, **changes})

    def __repr__(self) -> str:
        return f"<loss factory {self.function.name}{inspect.signature(self)}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LossFactory) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> Any:
        return self.function, tuple(self._options.items())

    def __copy__(self) -> "LossFactory[P]":
        return self

    def __deepcopy__(self, memo: object) -> "LossFactory[P]":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.function, self._options)


def _unpickled(function: LossFunction, options: dict[str, Any]) -> LossFactory[Any]:
    return LossFactory(function, **options)


class _Decorator(Protocol):
    """What `with_args` is without a function. The second form is for `**extra` functions."""

    @overload
    def __call__(self, fn: Callable[Concatenate[Any, Any, P], Any], /) -> LossFactory[P]: ...
    @overload
    def __call__(  # type: ignore[overload-cannot-match]
        self, fn: Callable[..., Any], /
    ) -> LossFactory[...]: ...


@overload
def with_args(
    fn: Callable[Concatenate[Any, Any, P], Any],
    /,
    *,
    name: str | None = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
    package: str | None = None,
) -> LossFactory[P]: ...
@overload
def with_args(  # type: ignore[overload-cannot-match]
    fn: Callable[..., Any],
    /,
    *,
    name: str | None = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
    package: str | None = None,
) -> LossFactory[...]: ...
@overload
def with_args(
    *,
    name: str | None = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
    package: str | None = None,
) -> _Decorator: ...
def with_args(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
    package: str | None = None,
) -> Any:
    """Make a factory of Keras losses from a function with extra arguments.

    Args:
        fn: A function `fn(y_true, y_pred, ...)` of two tensors, which Keras gives it by position,
            and of further parameters: by position or name, with or without defaults, `**extra`. It
            returns a tensor with one number for each sample, shape `(batch_size, ...)`, or a
            scalar.
        name: The name of the losses in logs, and of the function in saved models; the function's
            own by default.
        reduction: How Keras reduces the losses of the samples: `"sum_over_batch_size"`, `"sum"`,
            `"mean"`, `"mean_with_sample_weight"`, `"none"` or `None`.
        dtype: What the losses compute in, e.g. `"float32"`; `keras.config.floatx()` by default.
        package: With the function's name, what a saved loss is found by; the module of the
            function by default.

    Returns:
        The factory. Calling it with extra arguments gives a loss; an argument left out comes, by
        its name, with each batch, from a dict in the third element of the data, or is the default.
        Without `fn`, a decorator.

    Raises:
        SignatureError: The function cannot be called with two tensors and named extra arguments, it
            captures a variable, or another function goes by its name.

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
    if isinstance(fn, LossFactory):
        raise SignatureError(
            f"{fn.function.name} is a loss factory already. For other options write "
            f"{fn.function.name}.options(...)."
        )
    function = inspected(fn, name=name, package=package)
    return LossFactory(function, name=name, reduction=reduction, dtype=dtype)
