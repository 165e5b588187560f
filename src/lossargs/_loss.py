"""A loss function with its extra arguments bound: an ordinary, immutable Keras loss."""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, Self

import keras

from lossargs._call import Call, build
from lossargs._errors import ArgumentError, AttachError, SavingError, listed
from lossargs._function import LossFunction, registered
from lossargs._inputs import Inputs
from lossargs._keras import give_variables_back, in_symbolic_scope
from lossargs._live import decode_live, encode_live
from lossargs._serialization import checked, decode, encode, reading
from lossargs._sums import Arithmetic, label_of
from lossargs._values import (
    bind_value,
    cache_key,
    format_value,
    live_leaves,
    map_leaves,
    readonly_copy,
)

_interned: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
_interned_lock = threading.Lock()


@keras.saving.register_keras_serializable(package="lossargs")
class BoundLoss(Arithmetic, keras.losses.Loss):
    """A Keras loss that calls its function with the bound extra arguments.

    Made by calling a loss factory (see `with_args`), never directly. Losses of the same function,
    with equal arguments and options, are equal, and are one object.
    """

    def __init__(
        self, function: LossFunction, args: dict[str, Any], options: dict[str, Any], key: Hashable
    ) -> None:
        super().__init__(**options)
        self.loss_function = function
        self.bound_args = args
        self._key = key  # equal for equal losses
        self.live_names = tuple(dict.fromkeys(name for name, _, _ in self.live_leaves()))
        self.inner_losses = tuple(self._find_inner_losses())  # at any depth
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()  # those that give it values
        self.checked_models: weakref.WeakSet[Any] = weakref.WeakSet()  # by what it reads
        self._frozen = True

    @classmethod
    def of(
        cls,
        function: LossFunction,
        args: Mapping[str, Any],
        *,
        name: str,
        reduction: str | None,
        dtype: str | None,
    ) -> Self:
        """The loss with these arguments: an equal one that is alive, or else a new one.

        Raises:
            ArgumentError: A value can be neither followed nor bound as a constant.
        """
        taken = {
            n: bind_value(args[n], f"{n!r} of {function.name}()") for n in function.in_order(args)
        }
        options = {"name": name, "reduction": reduction, "dtype": dtype or keras.config.floatx()}
        values = tuple((name, cache_key(value)) for name, value in taken.items())
        key = (function, values, *options.values())
        with _interned_lock:
            loss: Self | None = _interned.get(key)
            if loss is None:
                loss = _interned[key] = cls(function, taken, options, key)
        return loss

    @property
    def args(self) -> Mapping[str, Any]:
        """The bound arguments by name, read-only."""
        return MappingProxyType(
            {name: readonly_copy(value) for name, value in self.bound_args.items()}
        )

    def replace(self, /, **changes: Any) -> Self:
        """A loss like this one, with some arguments bound anew.

        Args:
            **changes: Extra arguments of the function, by name.

        Returns:
            The other loss; this one stays as it is.

        Raises:
            ArgumentError: A name that the function does not take, or a value it cannot bind.

        Examples:
            >>> import keras
            >>> from lossargs import with_args
            >>> huber = with_args(keras.losses.huber)
            >>> huber(delta=1.0).replace(delta=2.0)
            huber(delta=2.0)
        """
        if self.terms:
            other: Self = self.replace_in_terms(changes)
            return other
        changes = self.loss_function.bind((), changes)
        return self.of(self.loss_function, {**self.bound_args, **changes}, **self.get_options())

    def live_leaves(self) -> Iterator[tuple[str, str, Any]]:
        """The live values bound: the argument of each, its name in the logs, the value itself."""
        for name, value in self.bound_args.items():
            for place, leaf in live_leaves(value):
                yield name, label_of(self, name, place), leaf

    def live_args(self, convert: Callable[[Any], Any]) -> dict[str, Any]:
        """The arguments that hold live values, with each leaf converted."""
        return {name: map_leaves(self.bound_args[name], convert) for name in self.live_names}

    def _find_inner_losses(self) -> list["BoundLoss"]:
        found: list[BoundLoss] = []

        def look(leaf: Any) -> None:
            if isinstance(leaf, BoundLoss):
                found.extend((leaf, *leaf.inner_losses))

        for value in self.bound_args.values():
            map_leaves(value, look)
        return found

    @property
    def holds_live(self) -> bool:
        """Whether this loss, or one among its arguments, has live arguments."""
        return bool(self.live_names) or any(loss.live_names for loss in self.inner_losses)

    @property
    def terms(self) -> "tuple[BoundLoss, ...]":
        """The losses whose values this loss combines; empty if it is no sum."""
        return self.bound_args.get("terms", ()) if self.loss_function.is_internal else ()

    def all_terms(self) -> "list[BoundLoss]":
        """Return the terms, and their terms."""
        return [one for term in self.terms for one in (term, *term.all_terms())]

    @property
    def title(self) -> str:
        """The name in messages."""
        function = self.loss_function
        return repr(self) if function.is_internal else function.name

    @property
    def parameters(self) -> list[str]:
        """The extra parameters of the function, without those of `**extra`."""
        return [] if self.loss_function.is_internal else self.loss_function.parameters

    def takes(self, name: str) -> bool:
        """Return whether the function has an extra parameter of that name."""
        return not self.loss_function.is_internal and self.loss_function.takes(name)

    def get_options(self) -> dict[str, Any]:
        """Return name, reduction and dtype."""
        return {"name": self.name, "reduction": self.reduction, "dtype": self.dtype}

    def __call__(self, /, y_true: Any, y_pred: Any, sample_weight: Any = None, **extra: Any) -> Any:
        """Return the loss of a batch.

        Args:
            y_true: The targets, shape `(batch_size, d0, .. dN)`, or nested ones; `None` if there
                are none.
            y_pred: The predictions, of the same structure.
            sample_weight: Weights that broadcast to the loss of each sample; or what came as the
                third element of the data, a dict of extra arguments by name, where the key
                `"sample_weight"` holds the weights.
            **extra: Extra arguments for this call only. They override live ones, which override
                those of the batch, and these the bound ones.

        Returns:
            The loss, reduced by `self.reduction`: a scalar, or one number for each sample.

        Raises:
            ArgumentError: An argument is missing or unknown, or the function reads a variable that
                it was not given.
            AttachError: The predictions do not come from a model that a loss with live arguments is
                attached to.
            BatchError: What came with the batch would be used wrongly, or not at all.
        """
        try:
            inputs = Inputs.of(self, y_pred, sample_weight)
            call = Call.reduced(self, inputs, extra)
            if in_symbolic_scope():
                return build(call, y_true, y_pred)
            layers = [(one, one.layer()) for one in inputs.values]
            layers = [(one, layer) for one, layer in layers if layer and layer.loss is self]
            losses = dict.fromkeys(
                loss for one, layer in layers for loss in layer.losses_to_log(one)
            )
            # A loss may be an inner loss of another one, which then finds it computed. The order is
            # that of all processes.
            values = {
                loss: (call if loss is self else Call.reduced(loss, inputs)).evaluate(
                    y_true, y_pred
                )
                for loss in sorted({**losses, self: None}, key=lambda one: len(one.inner_losses))
            }
            for one, layer in layers:
                layer.finish_step(one, values, y_pred)
        except Exception:
            give_variables_back()
            raise
        return values[self]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample, before weights and reduction."""
        return Call(self, Inputs.of(self, y_pred, None)).evaluate(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs to make this loss again.

        Raises:
            SavingError: The function or a value could not be found or read again.
        """
        function = self.loss_function
        function.refuse_saving()
        return {
            **self.get_options(),
            "function": function.key,
            "module": function.module,
            "args": {
                name: encode(value, f"{name!r} of {function.name}()", encode_live)
                for name, value in self.bound_args.items()
            },
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The loss that `get_config` described.

        Raises:
            SavingError: Its function is not known in this process, takes other arguments by now, or
                the config is damaged.
        """
        with reading("The config of a lossargs loss"):
            key, module = checked(config, "function", str), checked(config, "module", str)
            args = checked(config, "args", dict)
            options = {
                "name": checked(config, "name", str),
                "reduction": checked(config, "reduction", str, type(None)),
                "dtype": checked(config, "dtype", str, type(None)),
            }
            unknown = set(config) - {"function", "module", "args", *options}
            if unknown:  # what it asks for would not be done
                raise ValueError(f"it has entries that are unknown here, {listed(sorted(unknown))}")
            function = registered(key, module)
            decoded = {name: decode(value, decode_live) for name, value in args.items()}
            try:
                return cls.of(function, function.bind((), decoded), **options)
            except ArgumentError as error:
                raise SavingError(f"The saved loss does not fit its function: {error}") from error

    def __repr__(self) -> str:
        function = self.loss_function
        if function.format is not None:
            return function.format(self.bound_args)
        given = {name: format_value(value) for name, value in self.bound_args.items()}
        given |= dict.fromkeys(function.missing(self.bound_args), "<from the batch>")
        shown = f"({', '.join(f'{name}={value}' for name, value in given.items())})"
        usual = {"name": function.log_name, "reduction": "sum_over_batch_size"}
        usual["dtype"] = keras.config.floatx()
        options = {k: repr(v) for k, v in self.get_options().items() if v != usual[k]}
        if not options:
            return f"{function.name}{shown}"
        return (
            f"{function.name}.options({', '.join(f'{k}={v}' for k, v in options.items())}){shown}"
        )

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, BoundLoss) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.holds_live:
            return type(self).from_config, (self.get_config(),)
        return _unpickled, (self.loss_function, self.bound_args, self.get_options())

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False):
            self._refuse_change(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_change(name)

    def _refuse_change(self, name: str) -> NoReturn:
        instead = ""
        if name in self.get_options():
            instead = f" Make another one, {self.loss_function.name}.options({name}=...)."
        elif self.loss_function.takes(name):
            instead = f" Make another one, loss.replace({name}=...)."
        raise AttributeError(
            f"{self!r} cannot be changed ({name!r}): it may be in use elsewhere, as one object."
            f"{instead}"
        )

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to be a number: Keras and backends try this with what they cannot compute."""
        raise ArgumentError(
            f"{self!r} is a loss and no number. To weight a loss by a variable, write "
            f"loss * variable. If {self.loss_function.name} itself is what compile(loss=...) was "
            f"given, call it: loss={self.loss_function.name}(...)."
        )

    __jax_array__ = __array__


def _unpickled(function: LossFunction, args: dict[str, Any], options: dict[str, Any]) -> BoundLoss:
    return BoundLoss.of(function, args, **options)


def check_is_bound(loss: Any) -> None:
    """Raise unless a factory made the loss."""
    if not isinstance(loss, BoundLoss):
        raise AttachError(
            f"{loss!r} is not a loss with arguments. Make one: with_args(function)(...), for "
            "example with_args(keras.losses.mean_squared_error)()."
        )
