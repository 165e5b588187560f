"""One call of a bound loss: where its arguments come from, and what the function may do."""

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from lossargs._errors import (
    ArgumentError,
    AttachError,
    BatchError,
    EngineError,
    LossArgsError,
    listed,
)
from lossargs._keras import (
    ReadScope,
    Sandbox,
    Step,
    flat_layers,
    get_keras_mask,
    in_metrics,
    in_stateless_scope,
    in_symbolic_scope,
    is_compiled_by_torch,
    model_being_built,
    reduce_weighted_values,
    running_step,
    squeeze_or_expand_to_same_rank,
    torch_processes,
    uncompiled,
    variables_can_be_assigned,
    weighted_metrics_in_use,
)
from lossargs._live import StepValues, get_step_values
from lossargs._values import describe_lists, map_leaves, to_tensors

SAMPLE_WEIGHT = "sample_weight"  # the batch entry that is the ordinary sample weight


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a bound loss."""

    loss: Any
    weight: Any  # of the samples, or `None`
    extra: Mapping[str, Any]  # arguments of the call, by name
    batch: Mapping[str, Any]  # arguments in the batch, by name
    values: Sequence[StepValues]  # came with the predictions
    step: Step | None  # that is running; `None` in a user's own loop
    reduction: Any  # of the losses of the samples

    @classmethod
    def of(cls, loss: Any, y_pred: Any, sample_weight: Any, extra: Mapping[str, Any]) -> "Call":
        """Return the call of a loss with what a user or Keras gives it."""
        batch, weight = _split(loss, sample_weight)
        is_symbolic = in_symbolic_scope()
        # TensorFlow runs this code only in a trace, the others build the model first.
        if loss.holds_live and (is_symbolic or keras.backend.backend() == "tensorflow"):
            _refuse_metrics(loss)
        values = [] if is_symbolic else get_step_values(y_pred)
        step = values[0].step if values else _step_being_built() if is_symbolic else running_step()
        return cls(loss, weight, extra, batch, values, step, loss.reduction)

    @property
    def model(self) -> Any:
        """The model that runs the step, or is built; `None` in a user's own loop."""
        return self.step and self.step.model

    def for_loss(self, loss: Any, **changes: Any) -> "Call":
        """Return the call of another loss with the same batch and predictions."""
        return dataclasses.replace(self, loss=loss, **changes)

    def evaluate(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of a batch, and check what the function reads."""
        state = [v for one in self.values if self.loss in one.losses() for v in one.state()]
        if is_compiled_by_torch() and not all(variable.trainable for variable in state):
            # The backward pass would read what the loss assigns.
            return uncompiled(self._evaluate)(y_true, y_pred, state)
        return self._evaluate(y_true, y_pred, state)

    def _evaluate(self, y_true: Any, y_pred: Any, state: Sequence[keras.Variable]) -> Any:
        # TensorFlow and JAX run this code only in traces.
        is_torch = keras.backend.backend() == "torch"
        is_checked = self.model is None or (is_torch and self.model in self.loss.checked_models)
        if is_checked and not state:
            return self._reduce(y_true, y_pred)
        is_frozen = not variables_can_be_assigned()  # in a step of a user's own on JAX
        elsewhere = [] if in_stateless_scope() else [p for v in self.values for p in v.elsewhere]
        dropped = [variable for variable, _ in elsewhere]
        if self.step is not None and not self.step.training:
            dropped += state
        with ReadScope(elsewhere, dropped=set(map(id, dropped))) as scope:
            try:
                value = self._reduce(y_true, y_pred)
            except LossArgsError:
                raise
            except Exception as error:
                if not is_checked:
                    self._check_reads(scope, is_frozen, error)
                raise
        self._check_updates(scope, elsewhere)
        if not is_checked:
            self._check_reads(scope, is_frozen)
            if not in_symbolic_scope():  # stand-ins of PyTorch draw no random numbers
                self.loss.checked_models.add(self.model)
        return value

    # Arguments.

    def _resolve_args(self) -> dict[str, Any]:
        """Return all arguments by name: of the call, live, of the batch, bound, in this order."""
        loss, function = self.loss, self.loss.loss_function
        function.check_names(self.extra, f"{function.name} was called with")
        args = dict(loss.bound_args)
        args |= {name: value for name, value in self.batch.items() if loss.takes(name)}
        values = [one for one in self.values if loss in one.losses()]
        for one in values:
            args |= one.args_of(loss)
        args |= self.extra
        missing = function.missing(args)
        lost = [] if values else [n for n in self._names_from_layers() if n not in self.extra]
        if lost and not (missing and self.model is None and not loss.live_names):
            raise self._not_attached(lost)
        if missing:
            raise ArgumentError(
                f"{function.name} needs a value for {listed(missing)}. Bind it, "
                f"{function.name}({missing[0]}=...). Or give it with the batch, "
                f"fit(x, y, sample_weight={{{missing[0]!r}: ...}}), also for validation and "
                "evaluate; a loss in metrics=[...] gets nothing from the batch."
            )
        return args

    def _names_from_layers(self) -> list[str]:
        """Return the arguments that a layer should have given with the predictions."""
        names = dict.fromkeys(self.loss.live_names)
        if self.loss.layers:
            layers = self.loss.layers if self.model is None else attached_layers(self.model)
            for layer in layers:
                names |= dict.fromkeys(layer.names_given_to(self.loss))
        return list(names)

    def _not_attached(self, names: Sequence[str]) -> AttachError:
        what = f"{self.loss!r} has live arguments ({listed(names)}), and "
        attached = [loss for values in self.values for loss in values.losses()]
        attached = attached or [layer.loss for layer in attached_layers(self.model)]
        others = [loss for loss in attached if loss is not self.loss]
        if others:
            return AttachError(
                f"{what}this model was attached to another loss, {others[0]!r}. Bind once, and "
                "give that one loss to attach and to compile. For a model that was loaded or "
                "cloned, take the `loss` of its LossArgs layer."
            )
        return AttachError(
            f"{what}`y_pred` does not come directly from a model that is attached to it. Write "
            "model = attach(model, loss) or keras.Model(x, attach(y_pred, loss)) before compile; "
            "in a subclassed model, return self.loss_args(y_pred). In a call by hand give the "
            f"values: loss(y_true, y_pred, {names[0]}=...)."
        )

    # Evaluation.

    def _reduce(self, y_true: Any, y_pred: Any) -> Any:
        """Return what Keras makes of a plain function given to `compile`."""
        args = self._resolve_args()
        try:
            return self._reduce_as_keras(y_true, y_pred, args)
        except Exception as error:
            self._explain(error, y_true, y_pred, args)
            raise

    def _reduce_as_keras(self, y_true: Any, y_pred: Any, args: Mapping[str, Any]) -> Any:
        mask, dtype = get_keras_mask(y_pred), self.loss.dtype
        are_tensors = keras.ops.is_tensor(y_true) and keras.ops.is_tensor(y_pred)

        def convert(tensor: Any) -> Any:
            return keras.ops.convert_to_tensor(tensor, dtype=dtype)

        with keras.name_scope(self.loss.name):
            y_pred = _map(convert, y_pred)
            if y_true is not None:  # as in `fit(x)`
                y_true, y_pred = _of_same_rank(_map(convert, y_true), y_pred)
            values = self._call_function(y_true, y_pred, args)
            own_mask = get_keras_mask(values)
            if own_mask is not None:
                mask = own_mask if mask is None else mask & own_mask
            values = convert(values)
            size = math.prod(values.shape) if keras.backend.backend() == "torch" else 0
            is_plain = are_tensors and mask is None and self.weight is None
            if size and is_plain and self.reduction == "sum_over_batch_size":
                # In fewer steps than Keras takes. Compilers take out the others, PyTorch does not.
                total: Any = keras.ops.sum(values)
                return total / size
            return reduce_weighted_values(
                values, self.weight, mask=mask, reduction=self.reduction, dtype=dtype
            )

    def _call_function(self, y_true: Any, y_pred: Any, args: Mapping[str, Any]) -> Any:
        """Call the user's function with all arguments, and check what it returns."""
        loss, name = self.loss, self.loss.loss_function.name

        def inner(leaf: Any) -> Any:
            is_inner = isinstance(leaf, keras.losses.Loss) and leaf in loss.inner_losses
            return _InnerLoss(leaf, self) if is_inner else leaf

        def call(changed: Mapping[str, Any]) -> Any:
            given = {n: to_tensors(v, loss.dtype, n) for n, v in {**args, **changed}.items()}
            if loss.inner_losses:
                given = {n: map_leaves(v, inner) for n, v in given.items()}
            return loss.loss_function.fn(y_true, y_pred, **given)

        values = call({})
        if isinstance(values, keras.KerasTensor):
            raise self._symbolic_tensor_outside()
        if callable(values) and not keras.ops.is_tensor(values):
            raise ArgumentError(
                f"{name}(y_true, y_pred) returns a function, {values!r}, and not a tensor. Move "
                "the extra arguments into one function: def f(y_true, y_pred, delta=0.5): ..."
            )
        if self.weight is not None and _is_one_number(values, self.weight):
            raise BatchError(
                f"{name} returned one number for the whole batch, and was given weights for its "
                "samples (sample_weight or class_weight). Return one number for each sample, e.g. "
                "keras.ops.mean(..., axis=-1)."
            )
        self._check_broadcast(values, y_pred, call)
        return values

    def _check_broadcast(self, values: Any, y_pred: Any, call: Callable[..., Any]) -> None:
        """Raise if an entry of shape `(N,)` makes a square of the losses of `N` samples."""
        shape = _shape(values)
        if not self.batch or len(shape) != 2 or shape[0] != shape[1]:
            return
        for name, entry in self.batch.items():
            if len(_shape(entry)) != 1 or not self.loss.takes(name):
                continue
            try:
                with Sandbox():
                    other = _shape(call({name: keras.ops.expand_dims(entry, -1)}))
            except Exception:  # noqa: BLE001, S112 - then the function wants this shape
                continue
            if len(other) == 2 and other[1] == 1 != shape[1]:
                raise BatchError(
                    f"The batch entry {name!r} of shape {_shape(entry)} gives "
                    f"{self.loss.loss_function.name} losses of shape {shape}, where y_pred has "
                    f"{_shape(y_pred)}: each sample would be combined with the values of all "
                    f"others. Give it the shape {other}, e.g. {name}[:, None]."
                )

    # What went wrong.

    def _check_reads(
        self, scope: ReadScope, is_frozen: bool, cause: Exception | None = None
    ) -> None:
        """Raise if the function read a variable that the model does not hold."""
        model, name = self.model, self.loss.loss_function.name
        held = {id(variable) for variable in (*model.variables, *model.metrics_variables)}
        if is_frozen and held & scope.variables.keys():
            raise ArgumentError(
                f"{name} reads a weight of the model, and this train_step evaluates it outside of "
                "the model's state: JAX would freeze the value. Evaluate it by "
                "self.stateless_compute_loss(...)."
            ) from cause
        for key, variable in scope.variables.items():
            if key not in held:
                raise ArgumentError(
                    f"{name} reads the variable {variable.path!r} of shape "
                    f"{tuple(variable.shape)}, which is neither an argument nor a part of the "
                    "model: JAX would freeze its value, and no backend would train or save it. "
                    "Pass the layer, generator or variable as an argument: "
                    f"def {name}(y_true, y_pred, *, layer): ..."
                ) from cause

    def _check_updates(
        self, scope: ReadScope, elsewhere: Sequence[tuple[keras.Variable, Any]]
    ) -> None:
        """Raise if the function assigned a variable whose new value would be lost."""
        name, lost = self.loss.loss_function.name, {id(variable) for variable, _ in elsewhere}
        for key, variable in scope.assigned.items():
            if key in lost:
                raise ArgumentError(
                    f"{name} assigns the variable {variable.path!r}, and the model was called by "
                    "stateless_call, which gave back its state before. Evaluate the loss by "
                    "model.stateless_compute_loss(...), which returns the new state."
                )
            if variable.trainable and self.step is not None:
                raise ArgumentError(
                    f"{name} assigns the trainable weight {variable.path!r}, which the optimizer "
                    "updates in the same step. Make it non-trainable: layer.trainable = False, or "
                    "add_weight(..., trainable=False)."
                )

    def _symbolic_tensor_outside(self) -> ArgumentError:
        name = self.loss.loss_function.name
        return ArgumentError(
            f"{name} uses a symbolic tensor (KerasTensor) that is not an argument of the loss. "
            f"Pass it: def {name}(y_true, y_pred, tensor): ..., and attach(model, {name}(tensor))."
        )

    def _explain(self, error: Exception, y_true: Any, y_pred: Any, args: Mapping[str, Any]) -> None:
        """Add to an exception of the user's function what the function was called with."""
        if isinstance(error, LossArgsError):  # these name the argument themselves
            return
        name = self.loss.loss_function.name
        if "KerasTensor" in str(error):
            raise self._symbolic_tensor_outside() from error
        samples, parts = _shape(y_pred)[:1], []
        for argument, value in {"y_true": y_true, "y_pred": y_pred, **args}.items():
            part = f"{argument}: {type(value).__name__}"
            if keras.ops.is_tensor(value) or isinstance(value, np.ndarray):
                dtype = getattr(value.dtype, "name", str(value.dtype).removeprefix("torch."))
                part = f"{argument}: {dtype} {_shape(value)}"
                size = _shape(value)[:1]
                is_known = None not in (*size, *samples)
                if argument in self.batch and size and samples and is_known and size != samples:
                    part += f", which are {size[0]} for the {samples[0]} of y_pred"
            parts.append(part)
        note = f"It was raised in the loss {name}, called with {'; '.join(parts)}."
        error.add_note(f"{note} {describe_lists(args)}".rstrip())


class _InnerLoss(keras.losses.Loss):
    """A bound loss as the function of another one calls it: one number for each sample."""

    def __init__(self, loss: Any, call: Call) -> None:
        self._loss = loss
        self._call = call

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None, **extra: Any) -> Any:
        call = self._call.for_loss(self._loss, weight=sample_weight, extra=extra, reduction=None)
        return call.evaluate(y_true, y_pred)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_loss"), name)

    def __eq__(self, other: object) -> bool:
        return bool(self._loss == (other._loss if isinstance(other, _InnerLoss) else other))

    def __hash__(self) -> int:
        return hash(self._loss)


def build(call: Call, y_true: Any, y_pred: Any) -> Any:
    """Check a model before its first step, in which Keras computes the loss of stand-ins."""
    if call.model is not None and torch_processes() > 1:
        raise EngineError(
            f"torch.distributed runs {torch_processes()} processes, and on PyTorch Keras's "
            "fit() trains in one: each would train a model of its own, on all the data it is "
            "given. Write the loop yourself: parallel = DistributedDataParallel(model), "
            "loss(y_true, parallel(x, training=True), ...).backward(), and a torch.optim "
            "optimizer; examples/distributed.py has it."
        )
    layers = attached_layers(call.model)
    for layer in layers:
        layer.prepare(call.model)
    if call.model is not None:
        call.loss.checked_models.discard(call.model)  # it may be compiled again
    if any(call.loss in layer.get_losses() for layer in layers):
        return keras.ops.zeros((), dtype=call.loss.dtype)  # stand-ins carry no values
    return call.evaluate(y_true, y_pred)


def attached_layers(model: Any) -> list[Any]:
    """Return the `LossArgs` layers of a model."""
    layers = [] if model is None else flat_layers(model)
    return [layer for layer in layers if hasattr(layer, "get_losses")]


def _step_being_built() -> Step | None:
    model = model_being_built()
    if model is None:
        return None
    return Step(weakref.ref(model), training=False, has_loss=True, keeps_state=False)


def _refuse_metrics(loss: Any) -> None:
    if in_metrics():
        raise AttachError(
            f"{loss!r} has live arguments, and was given to compile as a metric. Metrics are "
            "computed outside the step of the model, where these have no value. Let the model "
            "track it: attach(..., loss, track=[this one])."
        )


def _split(loss: Any, sample_weight: Any) -> tuple[Mapping[str, Any], Any]:
    """Return the extra arguments and the sample weight in the third element of the data."""
    if not isinstance(sample_weight, Mapping):
        return {}, sample_weight
    name = loss.loss_function.name
    batch = {key: value for key, value in sample_weight.items() if key != SAMPLE_WEIGHT}
    loss.loss_function.check_names(
        [key for key in batch if not any(inner.takes(key) for inner in loss.inner_losses)],
        "The batch (third element of the data) has an entry",
        error=BatchError,
        instead=(
            " Leave it out; or, where several losses read one batch, let the function take and"
            " ignore it: add **extra to its parameters."
        ),
    )
    for key, value in batch.items():
        if value is None:
            raise BatchError(
                f"The batch entry {key!r} for {name} is None. Leave it out to use the bound or "
                "default value, or give an array."
            )
        if getattr(getattr(value, "dtype", None), "kind", "") in ("O", "S", "U"):
            raise BatchError(
                f"The batch entry {key!r} for {name} is an array of {value.dtype}, which no "
                "backend can compute with. Give numbers, e.g. array.astype('float32')."
            )
    # Keras weights such a metric by the first entry of the dict, in the order of its keys.
    first = min(sample_weight) if batch else SAMPLE_WEIGHT
    metrics = weighted_metrics_in_use() if first != SAMPLE_WEIGHT else None
    if metrics:
        raise BatchError(
            f"weighted_metrics={metrics} would be weighted by the batch entry {first!r}, since "
            "Keras takes the first entry of a dict for the sample weights. Give these metrics as "
            "metrics=[...], without weights."
        )
    return batch, sample_weight.get(SAMPLE_WEIGHT)


def _map(function: Callable[..., Any], value: Any) -> Any:
    """Return a value that is mostly one tensor, converted."""
    if keras.ops.is_tensor(value):
        return function(value)
    return keras.tree.map_structure(function, value)


def _of_same_rank(y_true: Any, y_pred: Any) -> Any:
    if keras.ops.is_tensor(y_true) and keras.ops.is_tensor(y_pred):
        return squeeze_or_expand_to_same_rank(y_true, y_pred)
    pairs = keras.tree.map_structure(squeeze_or_expand_to_same_rank, y_true, y_pred)
    return [keras.tree.map_structure_up_to(y_true, lambda p, i=i: p[i], pairs) for i in (0, 1)]


def _is_one_number(values: Any, sample_weight: Any) -> bool:
    """Return whether the values are one number for all samples, and the weights one for each."""
    weights = _shape(sample_weight)
    shape = _shape(values)
    if not shape:
        return bool(weights)
    return all(size == 1 for size in shape) and any(size not in (1, None) for size in weights)


def _shape(values: Any) -> tuple[int | None, ...]:
    shape = values.shape if hasattr(values, "shape") else np.shape(values)
    return () if getattr(shape, "rank", 0) is None else tuple(shape)  # unknown on TensorFlow
