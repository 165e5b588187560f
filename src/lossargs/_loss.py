"""A loss function with its extra arguments bound: an ordinary, immutable Keras loss."""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, Self

import keras

from lossargs._call import Call, build
from lossargs._errors import ArgumentError, AttachError, listed
from lossargs._function import LossFunction
from lossargs._inputs import Inputs
from lossargs._keras import Sandbox, give_variables_back, in_symbolic_scope
from lossargs._live import decode_live, encode_live
from lossargs._serialization import checked, encode, reading
from lossargs._sums import Arithmetic, label_of
from lossargs._values import (
    cache_key,
    format_value,
    leaves,
    live_leaves,
    map_leaves,
    readonly_copy,
)

_interned: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
_interned_lock = threading.Lock()


@keras.saving.register_keras_serializable(package="lossargs")
class BoundLoss(Arithmetic, keras.losses.Loss):
    """A Keras loss with bound extra arguments, made by a factory, by arithmetic or by `balance`.

    A bound loss is immutable. Equal arguments and options of the same function return the same
    object. Sums of losses are bound losses too: `mse() + 0.5 * kl(z)`.
    """

    def __init__(
        self, function: LossFunction, args: dict[str, Any], options: dict[str, Any], key: Hashable
    ) -> None:
        super().__init__(**options)
        self.loss_function = function
        self.bound_args = args
        self._key = key  # equal for equal losses
        self._hash = hash(key)
        self.live_names = tuple(dict.fromkeys(name for name, _, _ in self.live_leaves()))
        self.inner_losses = inner_losses_of(args)
        # Whether this loss, or one among its arguments, has live arguments.
        self.holds_live = any(loss.live_names for loss in (self, *self.inner_losses))
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()  # `LossArgs` layers that hold it
        self.checked_models: weakref.WeakSet[Any] = weakref.WeakSet()  # for what it reads
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
        """Return the loss with these arguments: an existing equal one, or a new one.

        Raises:
            ArgumentError: A value is neither live nor a valid constant.
        """
        bound = function.bind_values(args)
        options = {"name": name, "reduction": reduction, "dtype": dtype or keras.config.floatx()}
        values = tuple((name, cache_key(value)) for name, value in bound.items())
        key = (function, values, *options.values())
        with _interned_lock:
            loss: Self | None = _interned.get(key)
            if loss is None:
                loss = _interned[key] = cls(function, bound, options, key)
        return loss

    @property
    def args(self) -> Mapping[str, Any]:
        """The bound arguments by name, read-only."""
        return MappingProxyType(
            {name: readonly_copy(value) for name, value in self.bound_args.items()}
        )

    def replace(self, /, **changes: Any) -> Self:
        """Return this loss with some arguments changed.

        Args:
            **changes: Extra arguments of the function, by name. In a sum, each changes all terms
                that take it.

        Returns:
            The new loss. This one stays unchanged.

        Raises:
            ArgumentError: The function, or each term of a sum, does not take a name. Or a value
                cannot be bound.

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
        """Return the live values, each with its argument and its name in the logs."""
        for name, value in self.bound_args.items():
            for place, leaf in live_leaves(value):
                yield name, label_of(self, name, place), leaf

    def map_live_args(self, convert: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the arguments that hold live values, with each leaf converted."""
        return {name: map_leaves(self.bound_args[name], convert) for name in self.live_names}

    @property
    def terms(self) -> "tuple[BoundLoss, ...]":
        """The losses that this sum or balanced loss combines; otherwise empty."""
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
            y_true: The targets, shape `(batch_size, d0, .. dN)`, or a nested structure of tensors.
                `None` if there are no targets. Keras converts them to `self.dtype`.
            y_pred: The predictions, of the same structure. Keras converts them to `self.dtype`.
            sample_weight: Weights that broadcast to the loss of each sample. Or a dict of batch
                entries by name, in which the key `"sample_weight"` holds the weights.
            **extra: Extra arguments for this call only. They take precedence over all others.

        Returns:
            The loss, a tensor of `self.dtype`, reduced by `self.reduction`: a scalar, or losses of
            shape `(batch_size, d0, .. dN-1)`.

        Raises:
            ArgumentError: An argument is missing or unknown, or the function reads a variable that
                it was not given.
            AttachError: A live argument has no value: the model is not attached, or is attached to
                another loss. Or a metric of `compile` has live arguments.
            BatchError: A batch entry is unknown, has a wrong shape, or would weight a metric.
            LossArgsError: `fit` runs in several processes of `torch.distributed`.

        Examples:
            >>> import keras
            >>> from lossargs import with_args
            >>> loss = with_args(keras.losses.huber)(delta=2.0)
            >>> float(loss([[1.0]], [[4.0]]))
            4.0
        """
        try:
            inputs = Inputs.of(self, y_pred, sample_weight, inner_losses_of(extra))
            if in_symbolic_scope():
                return build(Call.reduced(self, inputs, extra), y_true, y_pred)
            layers = [(one, one.layer()) for one in inputs.values]
            layers = [(one, layer) for one, layer in layers if layer and layer.loss is self]
            # In the same order in every process, whose collective operations must match.
            logged = [loss for one, layer in layers for loss in layer.losses_to_log(one)]
            losses = dict.fromkeys([*logged, self])
            if len(losses) > 1 or self.inner_losses:
                inputs = inputs.sharing()
            own, values = {self, *self.inner_losses}, {}

            def order(loss: BoundLoss) -> tuple[bool, int]:
                # A loss follows its inner losses, to reuse their results. Tracked losses without
                # these come first, to read the state before this loss updates it.
                return not own.isdisjoint((loss, *loss.inner_losses)), len(loss.inner_losses)

            for loss in sorted(losses, key=order):
                if loss in own:
                    call = Call.reduced(loss, inputs, extra if loss is self else None)
                    values[loss] = call.evaluate(y_true, y_pred)
                    continue
                for one, _ in layers:
                    one.compute_once()
                with Sandbox():  # only the main loss updates state
                    values[loss] = Call.reduced(loss, inputs).evaluate(y_true, y_pred)
            for one, layer in layers:
                layer.finish_step(one, values, inputs.term_weights, y_pred)
        except Exception:
            give_variables_back()
            raise
        return values[self]

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the losses before weights and reduction; a scalar of a balanced loss."""
        return Call(self, Inputs.of(self, y_pred, None)).evaluate(y_true, y_pred)

    def get_config(self) -> dict[str, Any]:
        """Return the config from which `from_config` makes this loss again.

        Raises:
            SavingError: The function or a value cannot be saved so that it loads again.
        """
        saved = self.loss_function.get_config(self.bound_args, encode_live)
        return {**self.get_options(), **saved}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the loss that a config describes.

        Raises:
            SavingError: The function is not known in this process, or has other parameters now.
                Or the config is damaged.
        """
        with reading("The saved loss"):
            options = {
                "name": checked(config, "name", str),
                "reduction": checked(config, "reduction", str, type(None)),
                "dtype": checked(config, "dtype", str, type(None)),
            }
            unknown = set(config) - {"function", "module", "args", *options}
            if unknown:  # to ignore them could change the loss
                raise ValueError(f"it has entries that are unknown here, {listed(sorted(unknown))}")
            return cls.of(*LossFunction.from_config(config, decode_live), **options)

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
        return self._hash

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.holds_live:
            for one in (self, *self.inner_losses):
                for name, _, leaf in one.live_leaves():
                    if isinstance(leaf, (keras.Layer, keras.random.SeedGenerator)):
                        # Raises: a pickle would copy the object.
                        encode(leaf, f"{name!r} of {one.loss_function.name}()")
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
        if self.loss_function.is_internal:
            instead = " Write the loss again."
        elif name in self.get_options():
            instead = f" Make another one, {self.loss_function.name}.options({name}=...)."
        elif self.loss_function.takes(name):
            instead = f" Make another one, loss.replace({name}=...)."
        raise AttributeError(
            f"Cannot change {name!r} of {self!r}: bound losses are immutable.{instead}"
        )

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        """Raise: backends call this to use a loss as a tensor, e.g. in `variable * loss`."""
        function = self.loss_function
        is_made = not function.is_internal
        call = f" For compile, call the factory: loss={function.name}(...)." if is_made else ""
        raise ArgumentError(
            f"{self!r} is a loss, not a number. To weight a loss by a variable, write "
            f"loss * variable.{call}"
        )

    __jax_array__ = __array__


def _unpickled(function: LossFunction, args: dict[str, Any], options: dict[str, Any]) -> BoundLoss:
    return BoundLoss.of(function, args, **options)


def inner_losses_of(args: Mapping[str, Any]) -> tuple[BoundLoss, ...]:
    """Return the bound losses among arguments, at any depth."""
    found = [leaf for name, value in args.items() for leaf in leaves(value, repr(name))]
    losses = [leaf for leaf in found if isinstance(leaf, BoundLoss)]
    return tuple(one for loss in losses for one in (loss, *loss.inner_losses))


def check_is_bound(loss: Any) -> None:
    """Raise unless the loss is a bound loss."""
    if not isinstance(loss, BoundLoss):
        raise AttachError(
            f"{loss!r} is not a loss with arguments. Make one: with_args(function)(...), for "
            "example with_args(keras.losses.mean_squared_error)()."
        )
