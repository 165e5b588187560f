"""A loss function with its extra arguments bound: an ordinary, immutable Keras loss."""

import itertools
import math
import threading
import uuid
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, Self

import keras
import numpy as np

from lossargs._carried import carried, carry
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
    flat_layers,
    get_keras_mask,
    give_variables_back,
    in_metrics,
    in_symbolic_scope,
    model_in_use,
    reduce_weighted_values,
    torch_processes,
    weighted_metrics_in_use,
)
from lossargs._values import (
    Saved,
    checked,
    decode,
    encode,
    exhibit,
    hand_on,
    identity,
    live_leaves,
    reading,
    rebuilt,
    show,
    take,
)

SAMPLE_WEIGHT = "sample_weight"  # the batch entry that is the ordinary sample weight

_interned: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
_interned_lock = threading.Lock()
_by_token: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_tokens = itertools.count()
_served: weakref.WeakSet[Any] = weakref.WeakSet()  # losses whose layer is called with arguments


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
        leaves = {identity(leaf): leaf for _, _, leaf in self.live_leaves()}
        prefix = uuid.uuid4().hex if leaves else ""
        # Two live values of one type look alike in a file: what tells them apart is made up.
        self._saved = {
            live: leaf if isinstance(leaf, Saved) else Saved(f"{prefix}-{number}", show(leaf))
            for number, (live, leaf) in enumerate(leaves.items())
        }
        self.token = next(_tokens)  # stands for this loss where it must not be held
        _by_token[self.token] = self
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
            SignatureError: The function captures a variable or a symbolic tensor.
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

    def saved_leaf(self, leaf: Any) -> Any:
        """What stands for a live value in the config; other values as they are."""
        return self._saved.get(identity(leaf), leaf) if self._saved else leaf

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
        """The loss of a batch.

        Args:
            y_true: The targets, shape `(batch_size, d0, .. dN)`, or nested ones.
            y_pred: The predictions, of the same structure.
            sample_weight: Weights that broadcast to the loss of each sample; or what came as the
                third element of the data, a dict of extra arguments by name, where the key
                `"sample_weight"` holds the weights.
            **extra: Extra arguments for this call only. They override live ones, which override
                those of the batch, and these the bound ones.

        Returns:
            The loss, reduced by `self.reduction`: a scalar, or one number for each sample.

        Raises:
            ArgumentError: An argument is missing or unknown.
            AttachError: The predictions do not come from a model that a loss with live arguments is
                attached to.
            BatchError: What came with the batch would be used wrongly, or not at all.
        """
        try:
            step = carried(y_pred).get(self.token)
            loss = self.evaluated(y_true, y_pred, sample_weight, extra)
            layer = step.layer() if step is not None and step.layer is not None else None
            if layer is not None and step is not None:
                layer.report(step.logged, y_true, y_pred, sample_weight)
        except Exception:
            give_variables_back()
            raise
        return loss

    def evaluated(
        self, y_true: Any, y_pred: Any, sample_weight: Any, extra: Mapping[str, Any]
    ) -> Any:
        """As `__call__`, without a word to the layer that logs it."""
        if in_symbolic_scope():
            _refuse_fit_in_processes()
        batch: Mapping[str, Any] = {}
        if isinstance(sample_weight, Mapping):
            batch, sample_weight = self._split(sample_weight)
        self._function.check_names(extra, f"{self._function.name} was called with")
        args = self._in_force(y_pred, batch, extra)
        if args is None:
            return keras.ops.zeros((), dtype=self.dtype)
        evaluation = self._evaluation(args, y_pred, sample_weight)
        try:
            if keras.backend.backend() == "torch" and sample_weight is None:
                return self._evaluated_eagerly(evaluation, y_true, y_pred)
            return evaluation(y_true, y_pred, sample_weight)
        except Exception as error:
            if not isinstance(error, LossArgsError):  # these name the argument themselves
                error.add_note(_called(self._function.name, y_true, y_pred, args, batch))
            raise

    def _evaluated_eagerly(self, evaluation: FunctionLoss, y_true: Any, y_pred: Any) -> Any:
        """What `evaluation(y_true, y_pred)` gives, in fewer steps where there are no masks.

        What Keras does around a loss for the other cases, compilers take out again. PyTorch does it
        in each step, where it takes longer than a small loss computes.
        """
        are_tensors = keras.ops.is_tensor(y_true) and keras.ops.is_tensor(y_pred)
        if not are_tensors or get_keras_mask(y_pred) is not None:
            return evaluation(y_true, y_pred)
        convert: Callable[..., Any] = keras.ops.convert_to_tensor
        true, pred = convert(y_true, dtype=self.dtype), convert(y_pred, dtype=self.dtype)
        same_rank = len(true.shape) == len(pred.shape)
        values = (evaluation.fn if same_rank else evaluation.call)(true, pred)
        mask = get_keras_mask(values)
        values = convert(values, dtype=self.dtype)
        size = math.prod(values.shape)
        if self.reduction == "sum_over_batch_size" and mask is None and size:
            total: Any = keras.ops.sum(values)
            return total / size
        return reduce_weighted_values(values, mask=mask, reduction=self.reduction, dtype=self.dtype)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """The loss of each sample, before weights and reduction."""
        args = self._in_force(y_pred, {}, {}) or {}
        return self._evaluation(args, y_pred, None).call(y_true, y_pred)

    def _in_force(
        self, y_pred: Any, batch: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> Mapping[str, Any] | None:
        """The arguments of one call, or `None` if there is nothing yet to take them from."""
        steps = carried(y_pred)
        step = steps.get(self.token)
        args = {**self._args, **batch}
        if step is not None:
            args |= step.values
        if extra:
            args |= extra
        # Metrics are computed of stand-ins first; on TensorFlow, this runs only to be traced.
        looked_at = keras.backend.backend() == "tensorflow" or in_symbolic_scope()
        if self._live and looked_at and in_metrics():
            raise AttachError(
                f"{self!r} has live arguments ({listed(self._live)}), and was given to compile as "
                "a metric. Metrics are computed outside the step of the model, where these have no "
                "value. Let the model track it: attach(..., loss, track=[this one])."
            )
        missing = self._function.missing(args)
        unresolved = [
            n for n in self._live if n not in extra and (not step or n not in step.values)
        ]
        dropped = step is None and self in _served and not in_symbolic_scope()
        if not missing and not unresolved and not dropped:
            return args
        model = model_in_use()
        attached = _attached_losses(model)
        if in_symbolic_scope() and self in attached:
            # Keras computes the loss once before the first step, of stand-ins that did not come
            # from the model and carry nothing.
            return None
        if unresolved or (step is None and self in attached):
            carrying = [_by_token[token] for token in steps if token in _by_token]
            raise self._not_attached(unresolved or missing or self.parameters, carrying or attached)
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

    def _not_attached(self, names: Collection[str], others: Collection[Any]) -> AttachError:
        """What is wrong if live arguments have no value."""
        what = f"{self!r} has live arguments ({listed(names)}), which have a value only in a step "
        others = [loss for loss in others if loss is not self]
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

    def _evaluation(self, args: Mapping[str, Any], source: Any, sample_weight: Any) -> FunctionLoss:
        """A Keras function loss with these arguments filled in, for one call.

        The arguments are kept in this closure only, so that threads never see each other's.

        Args:
            args: All arguments by name.
            source: `y_pred` as it came, before Keras converted it.
            sample_weight: The weights of the samples, if any.
        """
        function = self._function

        def fn(y_true: Any, y_pred: Any) -> Any:
            if self._inner and y_pred is not source:  # these look at what their `y_pred` carries
                y_pred = carry(y_pred, carried(source))
            given = {name: hand_on(v, self.dtype, name) for name, v in args.items()}
            values = function.fn(y_true, y_pred, **given)
            if sample_weight is not None and _is_one_number(values, sample_weight):
                raise BatchError(
                    f"{function.name} returned one number for the whole batch, and was given "
                    "weights for its samples (sample_weight or class_weight): Keras would scale "
                    "that number by their mean, and which samples they belong to would not matter."
                    " Return one number for each sample, e.g. keras.ops.mean(..., axis=-1)."
                )
            return values

        return FunctionLoss(fn, reduction=self.reduction, name=self.name, dtype=self._policy)

    def _split(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """The extra arguments and the sample weight in the third element of the data."""
        self._function.check_names(
            [name for name in batch if name != SAMPLE_WEIGHT],
            "The batch (third element of the data) has an entry",
            error=BatchError,
            instead=(
                " Leave it out; or, where several losses read one batch, let the function take and"
                " ignore it: add **extra to its parameters."
            ),
        )
        args = {name: value for name, value in batch.items() if name != SAMPLE_WEIGHT}
        for name, value in args.items():
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
        if args and min(batch) != SAMPLE_WEIGHT and (metrics := weighted_metrics_in_use()):
            raise BatchError(
                f"weighted_metrics={metrics} would be weighted by the batch entry "
                f"{min(batch)!r}, since Keras takes the first entry of a dict for the sample "
                "weights. Give these metrics as metrics=[...], without weights."
            )
        return args, batch.get(SAMPLE_WEIGHT)

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
                name: encode(rebuilt(value, self.saved_leaf), f"{name!r} of {function.name}()")
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
            decoded = {name: decode(value) for name, value in args.items()}
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
        args = {name: rebuilt(value, self.saved_leaf) for name, value in self._args.items()}
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


def _unpickled(function: LossFunction, args: dict[str, Any], options: dict[str, Any]) -> BoundLoss:
    return BoundLoss.of(function, args, **options)


def serve(losses: Iterable[BoundLoss]) -> None:
    """Remember that a layer gives arguments to these losses: without them they would be wrong."""
    _served.update(losses)


def _refuse_fit_in_processes() -> None:
    """Raise if Keras is about to train one model in several processes of PyTorch, each apart."""
    if torch_processes() > 1 and model_in_use() is not None:
        raise EngineError(
            f"torch.distributed runs {torch_processes()} processes, and on PyTorch Keras's fit() "
            "trains in one: each would train a model of its own, on all the data it is given. "
            "Write the loop yourself: parallel = DistributedDataParallel(model), "
            "loss(y_true, parallel(x, training=True), ...).backward(), and a torch.optim "
            "optimizer; examples/distributed.py has it."
        )


def _attached_losses(model: Any) -> list[Any]:
    """The losses that layers of a model hand values to."""
    layers = [] if model is None else flat_layers(model)
    return [loss for layer in layers for loss in getattr(layer, "bound_losses", ())]


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
    return f"It was raised in the loss {name}, called with {'; '.join(parts)}."


def _shape(values: Any) -> tuple[int | None, ...]:
    shape = values.shape if hasattr(values, "shape") else np.shape(values)
    return () if getattr(shape, "rank", 0) is None else tuple(shape)  # unknown on TensorFlow
