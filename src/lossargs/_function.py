"""A user's function: its extra parameters, and the name by which saved models find it."""

import contextlib
import functools
import inspect
import pkgutil
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import keras

from lossargs._errors import ArgumentError, SavingError, listed, nearest, taken
from lossargs._keras import get_object_name
from lossargs._serialization import NOT_LOSSES, checked, decode, encode
from lossargs._values import bind_value, format_value, leaves

_registry: "dict[tuple[type, str], Function]" = {}


class Function:
    """A function of tensors and extra arguments, inspected once; `key` is its name when saved."""

    kind: ClassVar[str]  # of the objects that the decorator makes
    keyword: ClassVar[str]  # the argument of Keras that takes such an object
    decorator: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]  # its first parameters
    reserved: ClassVar[tuple[str, ...]]  # names that no extra parameter can have
    library: ClassVar[Any] = None  # a module of Keras whose functions are found in any process

    is_internal = False  # True for sums and the like: no arguments from calls and batches
    format: Callable[[Mapping[str, Any]], str] | None = None  # bound arguments for `repr`

    def __init__(self, fn: Callable[..., Any], package: str | None = None) -> None:
        self.fn = fn
        self.name = str(getattr(fn, "__name__", type(fn).__name__))
        self.log_name: str = get_object_name(fn)
        count = len(self.tensors)
        signature = self._checked_signature()
        parameters = list(signature.parameters.values())
        self.signature = signature.replace(
            parameters=parameters[count:], return_annotation=signature.empty
        )
        # Names of the first parameters, unless a `/` follows them.
        first = [p.name for p in parameters[:count] if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._not_extra = (*self.reserved, *first)
        self._named = {p.name: p for p in parameters[count:] if p.kind is not p.VAR_KEYWORD}
        self.takes_any_name = len(self._named) < len(parameters) - count

        self._unwrapped = _unwrapped(fn)
        self.package = package
        # Where another process imports it from.
        self.module, qualname, file = self._home()
        self.key = f"{package or self.module}>{qualname}"
        self._place = f"{fn.__module__}:{getattr(fn, '__qualname__', '')}"
        # A reloaded module, or a notebook cell that is run again, defines the same function again.
        self._defined_at = (file or self.module, qualname)

    @classmethod
    def of(cls, fn: Callable[..., Any], package: str | None = None) -> Self:
        """Return the inspected function, and register it for loading."""
        new = cls(fn, package)
        if not isinstance(new._unwrapped[-1], types.FunctionType):
            return new  # cannot be saved
        old: Any = _registry.setdefault((cls, new.key), new)
        if old.fn is fn:
            return old  # type: ignore[no-any-return]
        if old._defined_at != new._defined_at:
            raise ArgumentError(
                f"Two functions have the saved name {new.key!r}: one of {old._defined_at[0]}, one "
                f"of {new._defined_at[0]}. Give one a package: @{cls.decorator}(package=...)."
            )
        _registry[cls, new.key] = new
        return new

    @classmethod
    def find(cls, key: str, module: str) -> Self:
        """Return the function of a saved name; `module` defined it when the file was saved."""
        package, _, name = key.partition(">")
        # From custom_objects={...} of `load_model`.
        fn = next(filter(None, map(keras.saving.get_registered_object, (key, name))), None)
        found: Any = _registry.get((cls, key)) if fn is None else function_of(fn)
        if isinstance(found, cls):
            return found
        if cls.library and package == cls.library.__name__ and name not in NOT_LOSSES:
            fn = fn or getattr(cls.library, name, None)
        if isinstance(fn, types.FunctionType):
            return cls.of(fn)
        raise SavingError(
            f"The saved {cls.kind} uses the function {key!r}, which this process does not know. "
            f"Before loading, import the module that gives it to {cls.decorator}: import {module}. "
            f"If it moved: load_model(path, custom_objects={{{key!r}: ...}})."
            f"{nearest(key, [known for kind, known in _registry if kind is cls])}"
        )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `factory(*args, **kwargs)` by name; all may be missing."""
        for name in kwargs:
            if not self.takes(name):
                raise ArgumentError(
                    f"{self.name} has no argument {name!r}. {taken(name, self._named)}"
                )
        try:
            bound = self.signature.bind_partial(*args, **kwargs).arguments
        except TypeError as error:
            raise ArgumentError(
                f"{self.name}() was given {len(args)} arguments by position and {listed(kwargs)} "
                f"by name: {error}. It takes {self.signature}. If Keras was given {self.name} "
                f"itself, call it: {self.keyword}={self.name}(...)."
            ) from None
        for extra in bound.keys() - self._named.keys():  # the dict of `**extra`
            bound |= bound.pop(extra)
        for name, value in bound.items():
            for leaf in leaves(value, f"{name!r} of {self.name}()"):
                self._refuse_factory(name, leaf)
        return bound

    def _refuse_factory(self, name: str, value: Any) -> None:
        if function := function_of(value):
            raise ArgumentError(
                f"{name!r} of {self.name}() holds the factory {function.name}, not a "
                f"{function.kind}. Call it: {function.name}(...)."
            )

    def bind_values(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of arguments for an object to hold, in the order of the function.

        Raises:
            ArgumentError: A value is neither live nor a valid constant.
        """
        names = [name for name in dict.fromkeys((*self._named, *args)) if name in args]
        return {name: bind_value(args[name], f"{name!r} of {self.name}()") for name in names}

    @property
    def code_name(self) -> str:
        """The name for code in messages; the names of internal functions are no code."""
        return "f" if self.is_internal else self.name

    @property
    def parameters(self) -> list[str]:
        """The names of the extra parameters, without `**extra`."""
        return list(self._named)

    def takes(self, name: object) -> bool:
        """Return whether the function accepts an extra argument of that name."""
        is_free = isinstance(name, str) and name not in self._not_extra
        return name in self._named or (self.takes_any_name and is_free)

    def missing(self, given: Collection[str]) -> list[str]:
        """Return the extra parameters that have no default and are not given."""
        return [n for n, p in self._named.items() if p.default is p.empty and n not in given]

    def get_config(
        self, args: Mapping[str, Any], encode_live: Callable[[Any], Any]
    ) -> dict[str, Any]:
        """Return the function and these arguments as JSON."""
        self.refuse_saving()
        encoded = {
            name: encode(value, f"{name!r} of {self.name}()", encode_live)
            for name, value in args.items()
        }
        return {"function": self.key, "module": self.module, "args": encoded}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], decode_live: Callable[[dict[str, Any]], Any]
    ) -> tuple[Self, dict[str, Any]]:
        """Return the function and the arguments that `get_config` described."""
        args = checked(config, "args", dict).items()
        function = cls.find(checked(config, "function", str), checked(config, "module", str))
        return function, function.bind((), {name: decode(v, decode_live) for name, v in args})

    def refuse_saving(self) -> None:
        """Raise if a saved loss could not find this function when it is loaded."""
        captured = [] if self._is_at_its_place() else _captured(self._unwrapped)
        problem = None
        if not isinstance(self._unwrapped[-1], types.FunctionType):
            problem = f"is a {type(self._unwrapped[-1]).__name__}, not a function"
        elif self.key.endswith("<lambda>"):
            problem = "is a lambda"
        elif captured:
            problem = f"captures {listed(captured)} from the function around it"
        if problem:
            raise SavingError(
                f"{self.name} {problem}. Saved files contain only the name of a function. Write it "
                f"at the top level of a module: {self._definition(*captured)}."
            )
        registered = _registry[type(self), self.key]
        if [*map(_source, self._unwrapped)] != [*map(_source, registered._unwrapped)]:
            raise SavingError(
                f"{self.name} was defined again, with other code, after this {self.kind} was "
                f"bound: {self.key!r} is the new function. Bind and compile with that one, "
                f"{self.keyword}={self.name}(...), or rename one of them."
            )

    def _is_at_its_place(self) -> bool:
        """Return whether the module has this function under its name."""
        try:
            return _function_at(self._place) is self.fn
        except (ImportError, AttributeError, ValueError):
            return False

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._is_at_its_place():
            raise SavingError(
                f"{self.name} is not found at {self._place!r}, and functions are pickled by their "
                f"place. Write it at the top level of a module: {self._definition()}."
            )
        return _unpickled, (type(self), self._place, self.package)

    def _definition(self, *extra: str) -> str:
        name = self.name if self.name.isidentifier() else f"my_{self.kind}"
        return f"`def {name}({', '.join((*self.tensors, *extra))}): ...`"

    def _checked_signature(self) -> inspect.Signature:
        """Return the signature of a function of tensors and named extra arguments, or raise."""
        made = (type, keras.losses.Loss, keras.optimizers.schedules.LearningRateSchedule)
        count, call = len(self.tensors), f"{self.name}({', '.join(self.tensors)})"
        try:
            if isinstance(self.fn, made) or function_of(self.fn):
                raise TypeError("it is not a function")
            signature = inspect.signature(self.fn)
            parameters = list(signature.parameters.values())
            # A first parameter `self` means a method that was taken from its class.
            first = [p.kind <= p.POSITIONAL_OR_KEYWORD and p.name != "self" for p in parameters]
            if first[:count] != [True] * count:
                raise TypeError(f"{self.name}{signature} cannot be called as {call}")
            for extra in parameters[count:]:
                if extra.kind in (extra.POSITIONAL_ONLY, extra.VAR_POSITIONAL):
                    raise TypeError(f"its parameter {extra.name!r} cannot be passed by name")
                if extra.name in self.reserved:
                    raise TypeError(f"{extra.name!r} is reserved for an argument of Keras")
        except (TypeError, ValueError) as error:
            of_keras = ", or take a function of Keras: keras.losses.huber" if self.library else ""
            raise ArgumentError(
                f"{self.decorator}() cannot use {self.fn!r}: {error}. Write "
                f"{self._definition('extra')}{of_keras}. A decorator needs functools.wraps."
            ) from error
        return signature

    def _home(self) -> tuple[str, str, str | None]:
        """Return the module and name for an import in another process, and the file."""
        qualname = getattr(self.fn, "__qualname__", type(self.fn).__qualname__)
        names = getattr(self._unwrapped[-1], "__globals__", {})
        module, file, spec = self.fn.__module__, names.get("__file__"), names.get("__spec__")
        if getattr(self.library, qualname, None) is self.fn:
            module = self.library.__name__  # its public module
        elif module in ("__main__", "__mp_main__"):
            # Another process imports the script under this name.
            script = Path(file).stem if file else module
            module = script if spec is None or spec.name == "__main__" else spec.name
        return module, qualname, file


class LossFunction(Function):
    """A function of `(y_true, y_pred, **extra)`."""

    kind, keyword, decorator = "loss", "loss", "with_args"
    tensors = ("y_true", "y_pred")
    reserved = (*tensors, "sample_weight")  # arguments of Keras
    library = keras.losses


def function_of(factory: Any) -> Function | None:
    """Return the function of a factory, or `None`."""
    function = getattr(factory, "function", None)
    return function if isinstance(function, Function) else None


def _function_at(place: str) -> Any:
    found = pkgutil.resolve_name(place)
    function = function_of(found)  # a decorated function is a factory
    return found if function is None else function.fn


def _unpickled(cls: type[Function], place: str, package: str | None) -> Function:
    return cls.of(_function_at(place), package)


def _unwrapped(fn: Any) -> list[Any]:
    """Return the function, and the functions that it wraps (`__wrapped__`)."""
    found = [fn]
    while hasattr(found[-1], "__wrapped__") and not isinstance(found[-1], functools.partial):
        found.append(found[-1].__wrapped__)
    return found


def _captured(functions: list[Any]) -> list[str]:
    """Return the names of the variables that functions take from the functions around them."""
    # A decorator holds the function below it, which is in the list itself.
    return [
        name
        for fn in functions
        if isinstance(fn, types.FunctionType)
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        if all(_content(cell) is not function for function in functions)
    ]


def _content(cell: types.CellType) -> Any:
    with contextlib.suppress(ValueError):  # the variable is not assigned yet
        return cell.cell_contents
    return None


def _source(fn: Any) -> Any:
    """Return the code of a function without line numbers, and its defaults."""
    if not isinstance(fn, types.FunctionType):
        return type(fn)
    defaults = fn.__defaults__, fn.__kwdefaults__
    return _without_lines(fn.__code__), format_value(defaults)  # without addresses of objects


def _without_lines(code: types.CodeType) -> types.CodeType:
    constants = tuple(
        _without_lines(constant) if isinstance(constant, types.CodeType) else constant
        for constant in code.co_consts
    )
    return code.replace(co_consts=constants, co_firstlineno=0, co_linetable=b"", co_filename="")
