"""A user's loss function: its extra parameters, and the name that saved losses hold."""

import contextlib
import functools
import inspect
import pkgutil
import threading
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
from lossargs._values import show

# Parameters of `loss(y_true, y_pred, sample_weight=None, **extra)`.
RESERVED = ("y_true", "y_pred", "sample_weight")

_registry: "dict[str, LossFunction]" = {}
_registry_lock = threading.Lock()


class LossFunction:
    """A function `fn(y_true, y_pred, **extra)`, inspected once.

    Attributes:
        key: `package>name`, the name that a saved loss holds.
        signature: Its signature without the first two parameters.
        module, qualname: Where another process imports it from.
        origin: The file and the qualified name; equal if one place is read twice.
    """

    def __init__(self, fn: Callable[..., Any], *, name: str | None, package: str | None) -> None:
        self.fn = fn
        self.name = str(name or getattr(fn, "__name__", type(fn).__name__))
        self.log_name = name or get_object_name(fn)
        self.signature = _extra_signature(fn, self.name)
        parameters = self.signature.parameters.values()
        self._named = {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}
        self.takes_any_name = len(self._named) < len(self.signature.parameters)
        # The first two parameters also have names, unless a `/` follows them.
        two = list(inspect.signature(fn).parameters.values())[:2]
        self._first_two = tuple(p.name for p in two if p.kind is p.POSITIONAL_OR_KEYWORD)
        self._required = tuple(n for n, p in self._named.items() if p.default is p.empty)

        self._layers = _layers(fn)
        self._given = {"name": name, "package": package}
        self.module, self.qualname, file = _home(fn, self._layers[-1])
        self.key = f"{package or self.module}>{name or self.qualname}"
        self._place = f"{fn.__module__}:{getattr(fn, '__qualname__', '')}"
        # A reloaded module, or a notebook cell that is run again, defines the same function again.
        self.origin = (file or self.module, self.qualname)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `factory(*args, **kwargs)` by name; none is required.

        Raises:
            ArgumentError: Too many, unknown, or given twice.
        """
        positional = [n for n, p in self._named.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(args) > len(positional):
            raise ArgumentError(
                f"{self.name}() was given {len(args)} positional arguments and takes "
                f"{listed(positional)} by position. If you compiled with {self.name} itself, call "
                f"it: loss={self.name}(...)."
            )
        bound = dict(zip(positional, args, strict=False))
        for name in kwargs:
            if name in bound:
                raise ArgumentError(
                    f"{self.name}() was given {name!r} twice: by position "
                    f"({show(bound[name])}) and by name ({show(kwargs[name])}). Give it once, "
                    f"{self.name}({name}=...)."
                )
        self.check_names(kwargs, f"{self.name}() was given")
        bound |= kwargs
        for name, value in bound.items():
            factory = function_of(value)
            if factory is not None:
                raise ArgumentError(
                    f"{name!r} of {self.name}() is the factory {factory.name}, not a loss. Call "
                    f"it: {name}={factory.name}(...)."
                )
        return bound

    @property
    def parameters(self) -> list[str]:
        """The names of the extra parameters, without `**extra`."""
        return list(self._named)

    def in_order(self, given: Collection[str]) -> list[str]:
        """Return the names in the order of the function: its parameters, then `**extra`."""
        named = [name for name in self._named if name in given]
        return [*named, *(name for name in given if name not in self._named)]

    def takes(self, name: str) -> bool:
        """Return whether the function accepts an extra argument of that name."""
        if name in self._named:
            return True
        free = name not in RESERVED and name not in self._first_two
        return self.takes_any_name and free and isinstance(name, str)

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
        return [name for name in self._required if name not in given]

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
        """Raise if a saved loss could not find this function when it is loaded.

        Raises:
            SavingError: The function is a lambda, captures variables, or was defined again.
        """
        remedy = "Write it with `def` at the top of a module"
        if self.qualname.endswith("<lambda>"):
            raise SavingError(
                f"{self.name} is a lambda, and a loss is saved by the name of its function. "
                f"{remedy}, under @with_args."
            )
        inner = self._layers[-1]
        if isinstance(self.fn, functools.partial) or not isinstance(inner, types.FunctionType):
            raise SavingError(
                f"{self.name} is a {type(self.fn).__name__}, not a function: what it holds "
                f"would not be saved with the loss. {remedy}, and make what it holds an argument."
            )
        captured = list(self._captured())
        if captured and not self._is_at_its_place():
            raise SavingError(
                f"{self.name} captures {listed(captured)} from the function around it, which would "
                f"not be saved with the loss. {remedy}, and make each an argument: "
                f"def {self.name}(y_true, y_pred, {', '.join(captured)})."
            )
        if [*map(_source, self._layers)] != [*map(_source, _registry[self.key]._layers)]:
            raise SavingError(
                f"{self.name} was defined anew, with other code, after this loss was bound. Both "
                f"have the name {self.key!r}. Bind and compile again with the new one, or give one "
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
                "place. Write it with `def` at the top of a module, and decorate it there."
            )
        return _unpickled, (self._place, self._given)


def inspected(
    fn: Callable[..., Any], *, name: str | None = None, package: str | None = None
) -> LossFunction:
    """Return the `LossFunction` of a function, and register it for loading.

    Raises:
        SignatureError: The function has no valid signature, or another one has its name.
    """
    new = LossFunction(fn, name=name, package=package)
    with _registry_lock:
        old = _registry.get(new.key)
        if old is not None and old.fn is fn:
            return old
        if old is not None and old.origin != new.origin:
            raise SignatureError(
                f"Two different functions are called {new.key!r}: {old.qualname} of "
                f"{old.origin[0]} and {new.qualname} of {new.origin[0]}. Give one of them another "
                "name or package: @with_args(name=...) or @with_args(package=...)."
            )
        _registry[new.key] = new
    return new


def registered(key: str, module: str) -> LossFunction:
    """Return the function that a saved loss names; `module` defined it when it was saved.

    Raises:
        SavingError: This process has no function of that name.
    """
    package, _, name = key.partition(">")
    for custom_name in (key, name):  # from custom_objects={...} of `load_model`
        custom = keras.saving.get_registered_object(custom_name)
        if isinstance(custom, types.FunctionType):
            return inspected(custom)
        function = function_of(custom)
        if function is not None:
            return function
    if key in _registry:
        return _registry[key]
    if package == "keras.losses":
        fn: Any = getattr(keras.losses, name, None)
        is_function = isinstance(fn, types.FunctionType)
        if is_function and list(inspect.signature(fn).parameters)[:2] == ["y_true", "y_pred"]:
            return inspected(fn)
    raise SavingError(
        f"The saved loss uses the function {key!r}, which this process does not know. Import the "
        f"module that gives it to with_args before loading ({module!r} defined it). If it moved, "
        f"give it its old name, @with_args(package={package!r}, name={name!r}), or load with "
        f"custom_objects={{{key!r}: ...}}.{nearest(key, _registry)}"
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


def _extra_signature(fn: Any, name: str) -> inspect.Signature:
    """Return the signature without its first two parameters, or raise."""
    written = name if name.isidentifier() else "my_loss"
    example = f"Write `def {written}(y_true, y_pred, shift): ...`"
    if not callable(fn) or isinstance(fn, (type, keras.losses.Loss)):
        raise SignatureError(
            f"with_args() needs a function of (y_true, y_pred, ...) and was given {fn!r}. "
            f"{example}; of a Keras loss take the function, e.g. keras.losses.huber for Huber."
        )
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError) as error:
        raise SignatureError(f"{name} does not tell its signature: {error}. {example}.") from error
    parameters = list(signature.parameters.values())
    extra = parameters[2:]
    if parameters and parameters[0].name == "self":
        raise SignatureError(
            f"{name}{signature} is a method, and Keras calls a loss without an object. {example}."
        )
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(parameters) < 2 or any(p.kind not in by_position for p in parameters[:2]):
        raise SignatureError(
            f"{name}{signature} cannot be called as {name}(y_true, y_pred), as Keras does. "
            f"{example}; a decorator on it should use functools.wraps."
        )
    for parameter in extra:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise SignatureError(
                f"{name}{signature}: {parameter.name!r} has no name to be given by. {example}."
            )
        if parameter.name in RESERVED:
            raise SignatureError(
                f"{name}{signature}: {parameter.name!r} is what Keras itself passes to a loss. "
                f"Rename it, e.g. {parameter.name}_2."
            )
    return signature.replace(parameters=extra, return_annotation=inspect.Signature.empty)


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
