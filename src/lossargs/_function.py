"""A user's loss function: its extra parameters, and the name that saved losses hold."""

import contextlib
import functools
import inspect
import pkgutil
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras

from lossargs._errors import (
    ArgumentError,
    LossArgsError,
    SavingError,
    SignatureError,
    listed,
    nearest,
)
from lossargs._keras import get_object_name
from lossargs._serialization import NOT_LOSSES

# Parameters of `loss(y_true, y_pred, sample_weight=None, **extra)`.
RESERVED = ("y_true", "y_pred", "sample_weight")

_registry: "dict[str, LossFunction]" = {}


class LossFunction:
    """A function `fn(y_true, y_pred, **extra)`, inspected once; `key` is its name when saved."""

    is_internal = False  # whether its arguments are given only when it is bound
    format: Callable[[Mapping[str, Any]], str] | None = None  # bound arguments for `repr`

    def __init__(self, fn: Callable[..., Any], *, name: str | None, package: str | None) -> None:
        self.fn = fn
        self.name = str(name or getattr(fn, "__name__", type(fn).__name__))
        self.log_name = name or get_object_name(fn)
        signature = _checked_signature(fn, self.name)
        parameters = list(signature.parameters.values())
        self.signature = signature.replace(
            parameters=parameters[2:], return_annotation=signature.empty
        )
        # Names of the first two parameters, unless a `/` follows them.
        two = [p.name for p in parameters[:2] if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._not_extra = (*RESERVED, *two)
        self._named = {p.name: p for p in parameters[2:] if p.kind is not p.VAR_KEYWORD}
        self.takes_any_name = len(self._named) < len(parameters) - 2

        self._layers = _layers(fn)
        self._given = {"name": name, "package": package}
        # Where another process imports it from.
        self.module, self.qualname, file = _home(fn, self._layers[-1])
        self.key = f"{package or self.module}>{name or self.qualname}"
        self._place = f"{fn.__module__}:{getattr(fn, '__qualname__', '')}"
        # A reloaded module, or a notebook cell that is run again, defines the same function again.
        self.defined_at = (file or self.module, self.qualname)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `factory(*args, **kwargs)` by name; none is required."""
        self.check_names(kwargs, f"{self.name}() was given")
        try:
            bound = self.signature.bind_partial(*args, **kwargs).arguments
        except TypeError as error:
            raise ArgumentError(
                f"{self.name}() was given {len(args)} arguments by position and {listed(kwargs)} "
                f"by name: {error}. It takes {self.signature}. If you compiled with {self.name} "
                f"itself, call it: loss={self.name}(...)."
            ) from None
        for extra in bound.keys() - self._named.keys():  # the dict of `**extra`
            bound |= bound.pop(extra)
        for name, value in bound.items():
            if function := function_of(value):
                raise ArgumentError(
                    f"{name!r} of {self.name}() is the factory {function.name}, not a loss. Call "
                    f"it: {name}={function.name}(...)."
                )
        return bound

    @property
    def parameters(self) -> list[str]:
        """The names of the extra parameters, without `**extra`."""
        return list(self._named)

    def in_order(self, given: Collection[str]) -> list[str]:
        """Return the names in the order of the function: its parameters, then `**extra`."""
        return [name for name in dict.fromkeys((*self._named, *given)) if name in given]

    def takes(self, name: object) -> bool:
        """Return whether the function accepts an extra argument of that name."""
        is_free = isinstance(name, str) and name not in self._not_extra
        return name in self._named or (self.takes_any_name and is_free)

    def check_names(
        self,
        names: Iterable[str],
        given: str,
        *,
        error: type[LossArgsError] = ArgumentError,
        instead: str = "",
    ) -> None:
        """Raise `error` for the first name that the function does not take."""
        for name in names:
            if not self.takes(name):
                known = list(self._named)
                raise error(
                    f"{given} {name!r}, which {self.name} does not take. It takes {listed(known)} "
                    f"besides the first two.{nearest(name, known)}{instead}"
                )

    def missing(self, given: Collection[str]) -> list[str]:
        """Return the extra parameters that have no default and are not given."""
        return [n for n, p in self._named.items() if p.default is p.empty and n not in given]

    def _captured(self) -> Iterator[str]:
        """Yield the names of captured variables, attributes and arguments of partials."""
        for layer in self._layers:
            if isinstance(layer, types.FunctionType):
                cells = zip(layer.__code__.co_freevars, layer.__closure__ or (), strict=True)
                held = {name: _content(cell) for name, cell in cells}
            elif isinstance(layer, functools.partial):
                held = {"args": layer.args, **layer.keywords}
            else:
                held = getattr(getattr(layer, "__self__", layer), "__dict__", {})
            # A decorator holds the function below it, which is a layer of its own.
            yield from (n for n, value in held.items() if all(value is not f for f in self._layers))

    def refuse_saving(self) -> None:
        """Raise if a saved loss could not find this function when it is loaded."""
        is_function = isinstance(self._layers[-1], types.FunctionType)
        captured = [] if self._is_at_its_place() else list(self._captured())
        problem = None
        if self.qualname.endswith("<lambda>"):
            problem = "is a lambda"
        elif not is_function or isinstance(self.fn, functools.partial):
            problem = f"is a {type(self.fn).__name__}, not a function"
        elif captured:
            problem = f"captures {listed(captured)} from the function around it"
        if problem:
            example = _definition(self.name, ", ".join(("y_true", "y_pred", *captured)))
            raise SavingError(
                f"{self.name} {problem}. Saved losses hold the name of a function, and "
                f"nothing that it holds. Write it at the top of a module: {example}."
            )
        if [*map(_source, self._layers)] != [*map(_source, _registry[self.key]._layers)]:
            raise SavingError(
                f"{self.name} was defined again, with other code, after this loss was bound. Both "
                f"have the name {self.key!r}. Bind and compile with the new function, or give one "
                "another name: @with_args(name=...)."
            )

    def _is_at_its_place(self) -> bool:
        """Return whether the module has this function under its name."""
        try:
            return _function_at(self._place) is self.fn
        except (ImportError, AttributeError, ValueError):
            return False

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._is_at_its_place():
            raise SavingError(
                f"{self.name} is not found at {self._place!r}, and functions are pickled by their "
                "place. Define and decorate it at the top of a module."
            )
        return _unpickled, (self._place, self._given)


def inspected(
    fn: Callable[..., Any], *, name: str | None = None, package: str | None = None
) -> LossFunction:
    """Return the `LossFunction` of a function, and register it for loading."""
    new = LossFunction(fn, name=name, package=package)
    old = _registry.setdefault(new.key, new)
    if old.fn is fn:
        return old
    if old.defined_at != new.defined_at:
        raise SignatureError(
            f"Two different functions are called {new.key!r}: {old.qualname} of "
            f"{old.defined_at[0]} and {new.qualname} of {new.defined_at[0]}. Give one another "
            "name or package: @with_args(name=...) or @with_args(package=...)."
        )
    _registry[new.key] = new
    return new


def registered(key: str, module: str) -> LossFunction:
    """Return the function that a saved loss names; `module` defined it when it was saved."""
    package, _, name = key.partition(">")
    # From custom_objects={...} of `load_model`.
    fn = next(filter(None, map(keras.saving.get_registered_object, (key, name))), None)
    if fn is None and key in _registry:
        return _registry[key]
    if fn is None and package == "keras.losses" and name not in NOT_LOSSES:
        fn = getattr(keras.losses, name, None)
    if function := function_of(fn):
        return function
    if isinstance(fn, types.FunctionType):
        return inspected(fn)
    raise SavingError(
        f"The saved loss uses the function {key!r}, which this process does not know. Before "
        f"loading, import the module that gives it to with_args ({module!r} defined it). If it "
        f"moved, give it its old name, @with_args(package={package!r}, name={name!r}), or load "
        f"with custom_objects={{{key!r}: ...}}.{nearest(key, _registry)}"
    )


def function_of(factory: Any) -> LossFunction | None:
    """Return the function of a loss factory, or `None`."""
    function = getattr(factory, "function", None)
    return function if isinstance(function, LossFunction) else None


def _function_at(place: str) -> Any:
    found = pkgutil.resolve_name(place)
    function = function_of(found)  # a decorated function is a factory
    return found if function is None else function.fn


def _unpickled(place: str, given: dict[str, str | None]) -> LossFunction:
    return inspected(_function_at(place), **given)


def _definition(name: str, parameters: str) -> str:
    return f"`def {name if name.isidentifier() else 'my_loss'}({parameters}): ...`"


def _checked_signature(fn: Any, name: str) -> inspect.Signature:
    """Return the signature of a function that can be a loss with extra arguments, or raise."""
    example = _definition(name, "y_true, y_pred, shift")
    try:
        if isinstance(fn, (type, keras.losses.Loss)) or function_of(fn):
            raise TypeError("it is not a function")
        signature = inspect.signature(fn)
    except (ValueError, TypeError) as error:
        raise SignatureError(
            f"with_args() needs a function of (y_true, y_pred, ...) and was given {fn!r}: {error}. "
            f"Write {example}. For a Keras loss pass its function, e.g. keras.losses.huber."
        ) from error
    parameters = list(signature.parameters.values())
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    are_two = [p.kind in by_position and p.name != "self" for p in parameters[:2]] == [True, True]
    if not are_two:
        raise SignatureError(
            f"{name}{signature} cannot be called as {name}(y_true, y_pred), as Keras does. Write "
            f"{example}. A decorator on it should use functools.wraps."
        )
    for extra in parameters[2:]:
        is_named = extra.kind not in (extra.POSITIONAL_ONLY, extra.VAR_POSITIONAL)
        if not is_named or extra.name in RESERVED:
            raise SignatureError(
                f"{name}{signature} cannot have the extra parameter {extra.name!r}. Extra "
                f"arguments have names, and {listed(RESERVED)} are those of Keras. Write {example}."
            )
    return signature


def _layers(fn: Any) -> tuple[Any, ...]:
    """Return the function, and the ones that its decorators and partials hold."""
    layers = [fn]
    while below := getattr(layers[-1], "__wrapped__", None) or getattr(layers[-1], "func", None):
        layers.append(below)
    return tuple(layers)


def _home(fn: Any, inner: Any) -> tuple[str, str, str | None]:
    """Return the module and qualified name for another process, and the file."""
    qualname = getattr(fn, "__qualname__", type(fn).__qualname__)
    names = getattr(inner, "__globals__", {})
    module, file = fn.__module__, names.get("__file__")
    if isinstance(fn, functools.partial):  # its own module is `functools`
        module, qualname = getattr(inner, "__module__", module), "partial"
    if getattr(keras.losses, qualname, None) is fn:
        module = "keras.losses"  # its public module
    elif module in ("__main__", "__mp_main__"):
        # Another process imports the script under this name.
        spec = names.get("__spec__")
        if spec is not None and spec.name != "__main__":
            module = spec.name
        elif file:
            module = Path(file).stem
    return module, qualname, file


def _source(fn: Any) -> Any:
    """Return the code of a function without line numbers, and its defaults."""
    if not isinstance(fn, types.FunctionType):
        return type(fn)
    return _without_lines(fn.__code__), repr((fn.__defaults__, fn.__kwdefaults__))


def _content(cell: types.CellType) -> Any:
    with contextlib.suppress(ValueError):  # the variable is not assigned yet
        return cell.cell_contents
    return None


def _without_lines(code: types.CodeType) -> types.CodeType:
    constants = tuple(
        _without_lines(constant) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_consts=constants, co_firstlineno=0, co_linetable=b"", co_filename="")
