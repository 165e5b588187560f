"""A loss function with its extra arguments bound: an ordinary, immutable Keras loss."""

import dataclasses
import math
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, Self

import keras
import numpy as np

from lossargs._errors import (
    ArgumentError,
    AttachError,
    BatchError,
    EngineError,
    ImmutableError,
    LossArgsError,
    SavingError,
    listed,
)
from lossargs._function import LossFunction, registered
from lossargs._keras import (
    FunctionLoss,
    ReadScope,
    Sandbox,
    Step,
    flat_layers,
    get_keras_mask,
    give_variables_back,
    in_metrics,
    in_symbolic_scope,
    model_being_built,
    reduce_weighted_values,
    running_step,
    torch_processes,
    weighted_metrics_in_use,
)
from lossargs._live import StepValues, decode_live, encode_live, get_step_values
from lossargs._serialization import checked, decode, encode, reading
from lossargs._values import (
    describe_lists,
    exhibit,
    hand_on,
    identity,
    is_live,
    live_leaves,
    rebuilt,
    show,
    take,
)

SAMPLE_WEIGHT = "sample_weight"  # the batch entry that is the ordinary sample weight

_OWN: Any = object()  # `None` is a reduction

_interned: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
_interned_lock = threading.Lock()


@keras.saving.register_keras_serializable(package="lossargs")
class BoundLoss(keras.losses.Loss):
    """A Keras loss that calls its function with the bound extra arguments.

    Made by calling a loss factory (see `with_args`), never directly. Losses of the same function,
    with equal arguments and options, are equal, and are one object.
    """

    def __init__(
        self, function: LossFunction, args: dict[str, Any], options: dict[str, Any], key: Hashable
    ) -> None:
        # One policy for all calls: Keras would make a new one from a string each time.
        self._policy = keras.dtype_policies.get(options["dtype"])
        super().__init__(**{**options, "dtype": self._policy})
        self._function = function
        self._args = args
        self._key = key  # equal for equal losses
        self._live = tuple(dict.fromkeys(name for name, _, _ in self.live_leaves()))
        self._inner = tuple(self._inner_losses())
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()  # those that give it values
        self._read_by: weakref.WeakSet[Any] = weakref.WeakSet()  # models that were looked at
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
        taken = {n: take(args[n], f"{n!r} of {function.name}()") for n in function.in_order(args)}
        options = {"name": name, "reduction": reduction, "dtype": dtype or keras.config.floatx()}
        values = tuple((name, identity(value)) for name, value in taken.items())
        key = (function, values, *options.values())
        with _interned_lock:
            loss: Self | None = _interned.get(key)
            if loss is None:
                loss = _interned[key] = cls(function, taken, options, key)
        return loss

    @property
    def args(self) -> Mapping[str, Any]:
        """The bound arguments by name, read-only."""
        return MappingProxyType({name: exhibit(value) for name, value in self._args.items()})

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
        changes = self._function.bind((), changes)
        return self.of(self._function, {**self._args, **changes}, **self._options())

    def live_leaves(self) -> Iterator[tuple[str, str, Any]]:
        """The live values bound: the argument of each, its name in the logs, the value itself."""
        for name, value in self._args.items():
            yield from ((name, f"{name}{place}", leaf) for place, leaf in live_leaves(value))

    def live_args(self, convert: Callable[[Any], Any]) -> dict[str, Any]:
        """The arguments that hold live values, with each leaf converted."""
        return {name: rebuilt(self._args[name], convert) for name in self._live}

    @property
    def inner_losses(self) -> tuple["BoundLoss", ...]:
        """The bound losses among the arguments, at any depth."""
        return self._inner

    def _inner_losses(self) -> list["BoundLoss"]:
        found: list[BoundLoss] = []

        def look(leaf: Any) -> None:
            if isinstance(leaf, BoundLoss):
                found.extend((leaf, *leaf.inner_losses))

        for value in self._args.values():
            rebuilt(value, look)
        return found

    @property
    def holds_live(self) -> bool:
        """Whether this loss, or one among its arguments, has live arguments."""
        return bool(self._live) or any(loss.holds_live for loss in self._inner)

    @property
    def parameters(self) -> list[str]:
        """The extra parameters of the function, but for those of `**extra`."""
        return self._function.parameters

    def takes(self, name: str) -> bool:
        """Whether the function has an extra parameter of that name."""
        return self._function.takes(name)

    def _options(self) -> dict[str, Any]:
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
        batch, weight = self._split(sample_weight)
        if in_symbolic_scope():
            return self._build(y_true, y_pred, weight, extra, batch)
        context = _Context(running_step(), get_step_values(y_pred), batch)
        try:
            loss = self.evaluate(y_true, y_pred, weight, extra, context)
            for values in context.values:
                if values.layer.loss is self:
                    values.layer.log(values, context, y_true, y_pred, weight)
        except Exception:
            give_variables_back()
            raise
        return loss

    def _build(
        self,
        y_true: Any,
        y_pred: Any,
        weight: Any,
        extra: Mapping[str, Any],
        batch: Mapping[str, Any],
    ) -> Any:
        """Check a model before its first step, in which Keras computes the loss of stand-ins."""
        model = model_being_built()
        if model is not None and torch_processes() > 1:
            raise EngineError(
                f"torch.distributed runs {torch_processes()} processes, and on PyTorch Keras's "
                "fit() trains in one: each would train a model of its own, on all the data it is "
                "given. Write the loop yourself: parallel = DistributedDataParallel(model), "
                "loss(y_true, parallel(x, training=True), ...).backward(), and a torch.optim "
                "optimizer; examples/distributed.py has it."
            )
        if self._live and in_metrics():
            raise AttachError(
                f"{self!r} has live arguments ({listed(self._live)}), and was given to compile as "
                "a metric. Metrics are computed outside the step of the model, where these have no "
                "value. Let the model track it: attach(..., loss, track=[this one])."
            )
        layers = _attached_layers(model)
        for layer in layers:
            layer.prepare(model)
        if any(self in layer.bound_losses for layer in layers):
            return keras.ops.zeros((), dtype=self.dtype)  # stand-ins carry no values
        step = model and Step(model, training=False, has_loss=True, keeps_state=False)
        return self.evaluate(y_true, y_pred, weight, extra, _Context(step, (), batch))

    def evaluate(
        self,
        y_true: Any,
        y_pred: Any,
        weight: Any,
        extra: Mapping[str, Any],
        context: "_Context",
        *,
        reduction: Any = _OWN,
    ) -> Any:
        """Return the loss of a batch, without logging it.

        Args:
            y_true: The targets.
            y_pred: The predictions.
            weight: The weights of the samples, if any.
            extra: Arguments for this call, by name.
            context: Where the other arguments come from.
            reduction: How the losses of the samples are reduced; by default as the loss says.
        """
        self._function.check_names(extra, f"{self._function.name} was called with")
        args = self._resolve_args(context, extra)
        model = context.step and context.step.model
        is_checked = model is None or model in self._read_by
        reduction = self.reduction if reduction is _OWN else reduction

        def fn(y_true: Any, y_pred: Any) -> Any:
            values = self._call_function(y_true, y_pred, args, context)
            if weight is not None and _is_one_number(values, weight):
                raise BatchError(
                    f"{self._function.name} returned one number for the whole batch, and was given "
                    "weights for its samples (sample_weight or class_weight): Keras would scale "
                    "that number by their mean, and which samples they belong to would not matter."
                    " Return one number for each sample, e.g. keras.ops.mean(..., axis=-1)."
                )
            return values

        try:
            # On TensorFlow the scope also keeps the order of reads and updates.
            if is_checked and keras.backend.backend() != "tensorflow":
                return self._reduce(fn, y_true, y_pred, weight, reduction)
            with ReadScope() as scope:
                loss = self._reduce(fn, y_true, y_pred, weight, reduction)
        except Exception as error:
            self._explain(error, y_true, y_pred, args, context)
            raise
        if not is_checked:
            self._check_reads(scope, model)
        return loss

    def _call_function(
        self, y_true: Any, y_pred: Any, args: Mapping[str, Any], context: "_Context"
    ) -> Any:
        """Call the user's function with all arguments, and check what it returns."""

        def inner(leaf: Any) -> Any:
            return _InnerLoss(leaf, context) if isinstance(leaf, BoundLoss) else leaf

        def call(changed: Mapping[str, Any]) -> Any:
            given = {**args, **changed}
            given = {name: hand_on(value, self.dtype, name) for name, value in given.items()}
            if self._inner:
                given = {name: rebuilt(value, inner) for name, value in given.items()}
            return self._function.fn(y_true, y_pred, **given)

        values = call({})
        if callable(values) and not keras.ops.is_tensor(values):
            raise ArgumentError(
                f"{self._function.name}(y_true, y_pred) returns a function, {values!r}, and not "
                "a tensor. Move the extra arguments into one function: "
                "def f(y_true, y_pred, delta=0.5): ..."
            )
        self._check_broadcast(values, y_pred, context, call)
        return values

    def _check_broadcast(
        self, values: Any, y_pred: Any, context: "_Context", call: Callable[..., Any]
    ) -> None:
        """Raise if an entry of shape `(N,)` makes a square of the losses of `N` samples."""
        shape = _shape(values)
        if not context.batch or len(shape) != 2 or shape[0] != shape[1]:
            return
        flat = [n for n, v in context.batch.items() if self.takes(n) and len(_shape(v)) == 1]
        for name in flat:
            column = keras.ops.expand_dims(context.batch[name], -1)
            try:
                with Sandbox(collect_losses=True):
                    other = _shape(call({name: column}))
            except Exception:  # noqa: BLE001, S112 - then the function wants this shape
                continue
            if other != shape:
                raise BatchError(
                    f"The batch entry {name!r} of shape {_shape(context.batch[name])} gives "
                    f"{self._function.name} losses of shape {shape}, where y_pred has "
                    f"{_shape(y_pred)}: each sample would be combined with the values of all "
                    f"others. Give it the shape {other}, e.g. {name}[:, None]."
                )

    def _reduce(
        self, fn: Callable[..., Any], y_true: Any, y_pred: Any, weight: Any, reduction: Any
    ) -> Any:
        """Return what Keras makes of a plain function given to `compile`.

        On PyTorch, without masks and weights, in fewer steps than Keras takes: compilers take out
        what Keras does for other cases, PyTorch does it in each step.
        """
        convert: Callable[..., Any] = keras.ops.convert_to_tensor
        if y_true is None:  # `fit(x)` without targets
            without = keras.tree.map_structure(lambda y: keras.ops.cast(y, self.dtype), y_pred)
            mask = get_keras_mask(y_pred)
            return self._reduce_values(fn(None, without), mask, weight, reduction)
        are_tensors = keras.ops.is_tensor(y_true) and keras.ops.is_tensor(y_pred)
        is_plain = weight is None and are_tensors and get_keras_mask(y_pred) is None
        loss = FunctionLoss(fn, reduction=reduction, name=self.name, dtype=self._policy)
        if keras.backend.backend() != "torch" or not is_plain:
            return loss(y_true, y_pred, weight)
        true, pred = convert(y_true, dtype=self.dtype), convert(y_pred, dtype=self.dtype)
        same_rank = len(true.shape) == len(pred.shape)
        return self._reduce_values((fn if same_rank else loss.call)(true, pred), None, None, reduction)

    def _reduce_values(self, values: Any, mask: Any, weight: Any, reduction: Any) -> Any:
        convert: Callable[..., Any] = keras.ops.convert_to_tensor
        own_mask = get_keras_mask(values)
        mask = own_mask if mask is None else mask if own_mask is None else mask & own_mask
        values = convert(values, dtype=self.dtype)
        if mask is None and weight is None and reduction == "sum_over_batch_size":
            size = math.prod(values.shape) if None not in values.shape else 0
            if size:
                total: Any = keras.ops.sum(values)
                return total / size
        return reduce_weighted_values(
            values, sample_weight=weight, mask=mask, reduction=reduction, dtype=self.dtype
        )

    def _check_reads(self, scope: ReadScope, model: Any) -> None:
        """Raise if the function read a variable that the model does not hold."""
        held = {id(variable) for variable in (*model.variables, *model.metrics_variables)}
        for key, variable in scope.variables.items():
            if key not in held:
                raise ArgumentError(
                    f"{self._function.name} reads the variable {variable.path!r} of shape "
                    f"{tuple(variable.shape)}, which is neither an argument nor a part of the "
                    "model: JAX would freeze its value, and no backend would train or save it. "
                    "Pass the variable, or the object that holds it, as an argument: "
                    f"def {self._function.name}(y_true, y_pred, variable): ..."
                )
        if not in_symbolic_scope():  # stand-ins of PyTorch draw no random numbers
            self._read_by.add(model)

    def _explain(
        self, error: Exception, y_true: Any, y_pred: Any, args: Mapping[str, Any], context: "_Context"
    ) -> None:
        """Add to an exception of the user's function what the function was called with."""
        if isinstance(error, LossArgsError):  # these name the argument themselves
            return
        name = self._function.name
        if "KerasTensor" in str(error) and not in_symbolic_scope():
            raise ArgumentError(
                f"{name} uses a symbolic tensor (KerasTensor) that it was not given as an argument "
                f"of the loss. Pass it: def {name}(y_true, y_pred, tensor): ..., and "
                f"attach(model, {name}(tensor))."
            ) from error
        error.add_note(_called(name, y_true, y_pred, args, context.batch))

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample, before weights and reduction."""
        context = _Context(running_step(), get_step_values(y_pred), {})
        return self.evaluate(y_true, y_pred, None, {}, context, reduction=None)

    def _resolve_args(self, context: "_Context", extra: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the arguments of one call by name, those of the call first."""
        args = {**self._args, **{n: v for n, v in context.batch.items() if self.takes(n)}}
        carried = [one for one in context.values if self in one.layer.bound_losses]
        training = context.step is not None and context.step.training
        for one in carried:
            args |= one.args_of(self, training=training)
        args |= extra
        missing = self._function.missing(args)
        unresolved = [name for name in self._live if not carried and name not in extra]
        if unresolved or (not carried and self._is_attached(context)):
            raise self._not_attached(unresolved or missing or self.parameters, context)
        if not missing:
            return args
        raise ArgumentError(
            f"{self._function.name} needs a value for {listed(missing)}. Bind it, "
            f"{self._function.name}({missing[0]}=...); or give it with the batch, as an entry "
            "of a dict in the third element of the data: "
            f"fit(x, y, sample_weight={{{missing[0]!r}: ...}}), and the same for validation "
            "and evaluate; or at the call. A loss in metrics=[...] gets nothing from the "
            "batch."
        )

    def _is_attached(self, context: "_Context") -> bool:
        """Return whether a layer should have given arguments to this loss."""
        if not self.layers:
            return False
        model = context.step and context.step.model
        if model is not None:
            return any(self in layer.bound_losses for layer in _attached_layers(model))
        return any(layer.gives(self) for layer in self.layers)

    def _not_attached(self, names: Collection[str], context: "_Context") -> AttachError:
        """Return the error for live arguments without a value."""
        what = f"{self!r} has live arguments ({listed(names)}), which have a value only in a step "
        model = context.step and context.step.model
        layers = [values.layer for values in context.values] or _attached_layers(model)
        others = [layer.loss for layer in layers if layer.loss is not self]
        if others:
            return AttachError(
                f"{what}of a model they are attached to, and this model was attached to another "
                f"loss, {others[0]!r}. Bind once, and give that one loss to attach and to compile; "
                "of a model that was loaded or cloned, it is the `loss` of its LossArgs layer."
            )
        return AttachError(
            f"{what}of a model they are attached to, and these predictions come from none, or not "
            "directly. Write model = attach(model, loss), or attach the tensor that is the output, "
            "keras.Model(x, attach(y_pred, loss)), before compile; in a subclassed model, return "
            "what the layer LossArgs(loss) gives. In a call by hand give the values: "
            f"loss(y_true, y_pred, {next(iter(names))}=...)."
        )

    def _split(self, sample_weight: Any) -> tuple[Mapping[str, Any], Any]:
        """Return the extra arguments and the sample weight in the third element of the data."""
        if not isinstance(sample_weight, Mapping):
            return {}, sample_weight
        batch = {name: value for name, value in sample_weight.items() if name != SAMPLE_WEIGHT}
        taken_inside = [n for n in batch if any(loss.takes(n) for loss in self._inner)]
        self._function.check_names(
            [name for name in batch if name not in taken_inside],
            "The batch (third element of the data) has an entry",
            error=BatchError,
            instead=(
                " Leave it out; or, where several losses read one batch, let the function take and"
                " ignore it: add **extra to its parameters."
            ),
        )
        for name, value in batch.items():
            if value is None:
                raise BatchError(
                    f"The batch entry {name!r} for {self._function.name} is None. Leave it out to "
                    "use the bound or default value, or give an array."
                )
            if getattr(getattr(value, "dtype", None), "kind", "") in ("O", "S", "U"):
                raise BatchError(
                    f"The batch entry {name!r} for {self._function.name} is an array of "
                    f"{value.dtype}, which no backend can compute with. Give numbers, e.g. "
                    "array.astype('float32')."
                )
        # Keras weights such a metric by the first entry of the dict, in the order of its keys.
        first = min(sample_weight) if batch else SAMPLE_WEIGHT
        if first != SAMPLE_WEIGHT and (metrics := weighted_metrics_in_use()):
            raise BatchError(
                f"weighted_metrics={metrics} would be weighted by the batch entry "
                f"{first!r}, since Keras takes the first entry of a dict for the sample "
                "weights. Give these metrics as metrics=[...], without weights."
            )
        return batch, sample_weight.get(SAMPLE_WEIGHT)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs to make this loss again.

        Raises:
            SavingError: The function or a value could not be found or read again.
        """
        function = self._function
        function.refuse_saving()
        return {
            **self._options(),
            "function": function.key,
            "module": function.module,
            "args": {
                name: encode(value, f"{name!r} of {function.name}()", encode_live)
                for name, value in self._args.items()
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
        function = self._function
        given = {name: show(value) for name, value in self._args.items()}
        given |= dict.fromkeys(function.missing(self._args), "<from the batch>")
        shown = f"({', '.join(f'{name}={value}' for name, value in given.items())})"
        usual = {"name": function.log_name, "reduction": "sum_over_batch_size"}
        usual["dtype"] = keras.config.floatx()
        options = {k: repr(v) for k, v in self._options().items() if v != usual[k]}
        if not options:
            return f"{function.name}{shown}"
        return (
            f"{function.name}.options({', '.join(f'{k}={v}' for k, v in options.items())}){shown}"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundLoss) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        args = {name: rebuilt(value, _pack) for name, value in self._args.items()}
        return _unpickled, (self._function, args, self._options())

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False):
            self._refuse_change(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._refuse_change(name)

    def _refuse_change(self, name: str) -> NoReturn:
        instead = ""
        if name in self._options():
            instead = f" Make another one, {self._function.name}.options({name}=...)."
        elif self._function.takes(name):
            instead = f" Make another one, loss.replace({name}=...)."
        raise ImmutableError(
            f"{self!r} cannot be changed ({name!r}): it may be in use elsewhere, as one object."
            f"{instead}"
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        """Refused: what Keras tries with what a factory returns that was itself given as a loss."""
        raise ArgumentError(
            f"{self!r} is a loss and no number. If {self._function.name} itself is what "
            f"compile(loss=...) was given, call it: loss={self._function.name}(...)."
        )


@dataclasses.dataclass(frozen=True)
class _Packed:
    """A live value as it is pickled."""

    config: dict[str, Any]


def _pack(leaf: Any) -> Any:
    if not is_live(leaf):
        return leaf
    return _Packed(keras.saving.serialize_keras_object(encode_live(leaf)))


def _unpack(leaf: Any) -> Any:
    return decode_live(leaf.config) if isinstance(leaf, _Packed) else leaf


def _unpickled(function: LossFunction, args: dict[str, Any], options: dict[str, Any]) -> BoundLoss:
    args = {name: rebuilt(value, _unpack) for name, value in args.items()}
    return BoundLoss.of(function, args, **options)


@dataclasses.dataclass(frozen=True)
class _Context:
    """Where the arguments of a loss come from that were not bound.

    Attributes:
        step: The step that is running, or `None` in a user's own loop.
        values: What came with the predictions.
        batch: The entries of the batch.
    """

    step: Step | None
    values: Sequence[StepValues]
    batch: Mapping[str, Any]


class _InnerLoss:
    """A bound loss as the function of another one calls it: one number for each sample."""

    def __init__(self, loss: BoundLoss, context: _Context) -> None:
        self._loss = loss
        self._context = context

    def __call__(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None, **extra: Any
    ) -> Any:
        return self._loss.evaluate(
            y_true, y_pred, sample_weight, extra, self._context, reduction=None
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)


def _attached_layers(model: Any) -> list[Any]:
    """Return the `LossArgs` layers of a model."""
    layers = [] if model is None else flat_layers(model)
    return [layer for layer in layers if hasattr(layer, "bound_losses")]


def _is_one_number(values: Any, sample_weight: Any) -> bool:
    """Whether the values are one number for all samples, and the weights one for each."""
    weights = _shape(sample_weight)
    shape = _shape(values)
    if not shape:
        return bool(weights)
    return all(size == 1 for size in shape) and any(size not in (1, None) for size in weights)


def _called(
    name: str, y_true: Any, y_pred: Any, given: Mapping[str, Any], batch: Collection[str]
) -> str:
    """What a function was called with, for whoever reads its exception."""
    samples = _shape(y_pred)[:1]
    parts = []
    for argument, value in {"y_true": y_true, "y_pred": y_pred, **given}.items():
        if keras.ops.is_tensor(value) or isinstance(value, np.ndarray):
            dtype = getattr(value.dtype, "name", str(value.dtype).removeprefix("torch."))
            part = f"{argument}: {dtype} {_shape(value)}"
            size = _shape(value)[:1]
            is_known = None not in (*size, *samples)
            if argument in batch and size and samples and is_known and size != samples:
                part += f", which are {size[0]} for the {samples[0]} of y_pred"
        else:
            part = f"{argument}: {type(value).__name__}"
        parts.append(part)
    lists = describe_lists(given)
    return f"It was raised in the loss {name}, called with {'; '.join(parts)}. {lists}".rstrip()


def _shape(values: Any) -> tuple[int | None, ...]:
    shape = values.shape if hasattr(values, "shape") else np.shape(values)
    return () if getattr(shape, "rank", 0) is None else tuple(shape)  # unknown on TensorFlow
