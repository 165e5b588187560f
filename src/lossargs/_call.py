"""One evaluation of a bound loss: its arguments in this step, and checks of its function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from lossargs._checks import check_reads, check_result, check_updates, check_weights, explain
from lossargs._errors import ArgumentError, AttachError, BatchError, LossArgsError, listed, taken
from lossargs._inputs import Inputs, shape_of
from lossargs._keras import (
    ReadScope,
    Sandbox,
    in_stateless_scope,
    in_symbolic_scope,
    is_compiled_by_torch,
    is_random_state,
    scale_loss_for_distribution,
    squeeze_or_expand_to_same_rank,
    torch_processes,
    uncompiled,
    unscale_loss_for_distribution,
    variables_can_be_assigned,
)
from lossargs._live import layers_of
from lossargs._sums import SUM, Arithmetic
from lossargs._values import map_leaves, to_tensors


class Call(keras.losses.Loss):
    """A bound loss in one step, as a Keras loss. Functions receive inner losses in this form.

    `Loss.__call__` of Keras converts, masks, weights and reduces, by `name`, `dtype` and
    `reduction`. These are set here, without `Loss.__init__`.
    """

    def __init__(
        self,
        loss: Any,
        inputs: Inputs,
        *,
        weight: Any = None,  # of the samples
        extra: Mapping[str, Any] | None = None,  # arguments of the call, by name
        reduction: str | None = None,  # of the losses of the samples
    ) -> None:
        self.loss = loss
        self.name = loss.name
        self.inputs = inputs
        self.weight = weight
        self.extra = extra or {}
        self.reduction = reduction
        # Inner losses do not share: inside `cond`, their tensors are invalid outside.
        self.is_shared = False

    @classmethod
    def reduced(cls, loss: Any, inputs: Inputs, extra: Mapping[str, Any] | None = None) -> "Call":
        """Return the call of a loss with its own reduction and the weights of the samples."""
        call = cls(loss, inputs, weight=inputs.weight, extra=extra, reduction=loss.reduction)
        call.is_shared = not call.extra
        return call

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None, **extra: Any) -> Any:
        """Return the unreduced loss to the function that received it; a scalar from `balance`."""
        call = Call(self.loss, self.inputs, weight=sample_weight, extra=extra)
        return call.evaluate(y_true, y_pred)

    @property
    def dtype(self) -> str:
        """The dtype of the loss."""
        return str(self.loss.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "loss"), name)

    def __eq__(self, other: object) -> bool:
        return bool(self.loss == (other.loss if isinstance(other, Call) else other))

    def __hash__(self) -> int:
        return hash(self.loss)

    @property
    def model(self) -> Any:
        """The model of the running step or symbolic build; `None` in a user's own loop."""
        return self.inputs.step and self.inputs.step.model

    def evaluate(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of a batch, and check which variables the function reads and assigns."""
        values = self.inputs.values
        state = [v for one in values if self.loss in one.losses() for v in one.state()]
        if is_compiled_by_torch() and any(is_random_state(v) for v in state):  # pragma: no cover
            # Keras does not let PyTorch compile random numbers, nor the functions around them.
            return uncompiled(self._evaluate)(y_true, y_pred, state)
        return self._evaluate(y_true, y_pred, state)

    def _evaluate(self, y_true: Any, y_pred: Any, state: Sequence[keras.Variable]) -> Any:
        # TensorFlow and JAX run this code only in traces.
        is_torch, step = keras.backend.backend() == "torch", self.inputs.step
        is_checked = self.model is None or (is_torch and self.model in self.loss.checked_models)
        if is_checked and not state:
            return self._reduce(y_true, y_pred)
        is_frozen = not variables_can_be_assigned()  # on JAX, in a user's own training step
        pairs = [pair for values in self.inputs.values for pair in values.forward_values]
        forward_values = [] if in_stateless_scope() else pairs
        lost = {id(variable) for variable, _ in forward_values}
        # Evaluation does not change the state of layers among the arguments.
        fixed = {id(variable) for variable in state} if step and not step.training else set()
        with ReadScope(forward_values, dropped=lost | fixed) as scope:
            try:
                value = self._reduce(y_true, y_pred)
            except LossArgsError:
                raise
            except Exception as error:
                if not is_checked:
                    check_reads(self.loss, self.model, scope, is_frozen, error)
                raise
        check_updates(self.loss, step, scope, lost)
        if not is_checked:
            check_reads(self.loss, self.model, scope, is_frozen)
            if not in_symbolic_scope():  # which draws no random numbers on PyTorch
                self.loss.checked_models.add(self.model)
        return value

    # Arguments.

    def _resolve_args(self) -> dict[str, Any]:
        """Return all arguments by name. Precedence: call, live values, batch, constants."""
        loss, function = self.loss, self.loss.loss_function
        takers = (loss, *loss.all_terms())
        for name in self.extra:
            if not any(one.takes(name) for one in takers):
                known = list(dict.fromkeys(known for one in takers for known in one.parameters))
                raise ArgumentError(f"{loss.title} has no argument {name!r}. {taken(name, known)}")
        args = dict(loss.bound_args)
        args |= {name: value for name, value in self.inputs.batch.items() if loss.takes(name)}
        values = [one for one in self.inputs.values if loss in one.losses()]
        for one in values:
            args |= one.args_of(loss)
        args |= {name: value for name, value in self.extra.items() if loss.takes(name)}
        missing = function.missing(args)
        lost = [] if values else [n for n in self._names_from_layers() if n not in self.extra]
        # Outside of a model, a loss without live values only lacks an argument.
        if lost and not (missing and self.model is None and not loss.live_names):
            raise self._not_attached(lost)
        if missing:
            raise ArgumentError(
                f"{function.name} needs a value for {listed(missing)}. Bind it, "
                f"{function.name}({missing[0]}=...). Or give it with each batch, also for "
                f"validation: fit(x, y, sample_weight={{{missing[0]!r}: ...}})."
            )
        return args

    def _names_from_layers(self) -> list[str]:
        """Return the arguments that a layer should have given with the predictions."""
        names = dict.fromkeys(self.loss.live_names)
        if self.loss.layers:
            layers = self.loss.layers if self.model is None else layers_of(self.model)
            for layer in layers:
                names |= dict.fromkeys(layer.names_given_to(self.loss))
        return list(names)

    def _not_attached(self, names: Sequence[str]) -> AttachError:
        what = f"{self.loss!r} has live arguments ({listed(names)}), and "
        attached = [one.layer() for one in self.inputs.values if one.losses()]
        attached = attached or layers_of(self.model)
        others = [layer for layer in attached if layer.loss is not self.loss]
        if others:
            return AttachError(
                f"{what}this model was attached to another loss, {others[0].loss!r}. Compile with "
                f"that one: model.get_layer({others[0].name!r}).loss. For another loss: "
                "model = attach(model, loss)."
            )
        by_hand = f"In a call by hand give the values: loss(y_true, y_pred, {names[0]}=...)."
        return AttachError(
            f"{what}`y_pred` does not come directly from a model that is attached to it. Write "
            "model = attach(model, loss) or keras.Model(x, attach(y_pred, loss)) before compile; "
            "in a subclassed model, return self.loss_args(y_pred). "
            f"{'' if self.loss.terms else by_hand}"
        )

    # Evaluation.

    def _reduce(self, y_true: Any, y_pred: Any) -> Any:
        of, reduced = self.inputs.reduced.get(self.loss, (None, None))
        if self.is_shared and of is y_pred:
            return reduced
        value = self._reduce_now(y_true, y_pred)
        if self.is_shared:
            self.inputs.reduced[self.loss] = y_pred, value
        return value

    def _reduce_now(self, y_true: Any, y_pred: Any) -> Any:
        # For `call`, which Keras calls in `Loss.__call__`.
        self._args = self._resolve_args()
        self._given = (y_true, y_pred)
        try:
            if self.loss.terms:
                return self._combine(y_true, y_pred)
            targets = () if y_true is None else y_true  # `None` is a leaf to Keras
            weight = self.weight
            if weight is not None and keras.backend.backend() == "torch":
                weight = keras.ops.copy(weight)  # Keras multiplies it by the mask in place
            return super().__call__(targets, y_pred, weight)
        except Exception as error:
            given = {"y_true": y_true, "y_pred": y_pred, **self._args}
            explain(error, self.loss, given, self.inputs.batch)
            raise

    def _combine(self, y_true: Any, y_pred: Any) -> Any:
        """Return the value of a loss that combines the values of its terms."""
        terms, values = self.loss.terms, {}
        # An unreduced sum adds the losses of samples. All others combine reduced terms.
        is_reduced = self.reduction is not None or self.loss.loss_function is not SUM
        # A term may be an inner loss of another one, which then reuses the result.
        for term in sorted(dict.fromkeys(terms), key=lambda term: len(term.inner_losses)):
            takers = (term, *term.all_terms())
            extra = {n: v for n, v in self.extra.items() if any(one.takes(n) for one in takers)}
            if is_reduced:
                call = Call.reduced(term, self.inputs, extra)
            else:
                call = Call(term, self.inputs, weight=self.weight, extra=extra)
            value = call.evaluate(y_true, y_pred)
            value = unscale_loss_for_distribution(value) if is_reduced else value
            values[term] = keras.ops.cast(value, self.dtype)
        given = self._tensors({name: v for name, v in self._args.items() if name != "terms"})
        training = any(one.training for one in self.inputs.values)
        value = self.loss.loss_function.fn([values[term] for term in terms], training, **given)
        if isinstance(value, (tuple, list)):
            value, weights = value
            if self.is_shared:
                self.inputs.term_weights[self.loss] = weights
        value = keras.ops.cast(value, self.dtype)
        return scale_loss_for_distribution(value) if is_reduced else value

    def _tensors(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments as the function receives them."""

        def inner(leaf: Any) -> Any:
            return Call(leaf, self.inputs) if isinstance(leaf, Arithmetic) else leaf

        given = {name: to_tensors(value, self.dtype, name) for name, value in args.items()}
        if self.loss.inner_losses or self.extra:
            given = {name: map_leaves(value, inner) for name, value in given.items()}
        return given

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each sample; called by Keras's `Loss.__call__` with tensors."""
        key = (self.loss, *self._given)
        values = None if self.extra else self.inputs.recall(key)
        if values is None:
            values = self._call_function(y_true, y_pred)
            if self.is_shared:
                self.inputs.remember(key, values)
        if self.weight is not None:
            check_weights(self.loss, values, self.weight)
        return values

    def _call_function(self, y_true: Any, y_pred: Any) -> Any:
        if isinstance(y_true, tuple) and not y_true:  # see `_reduce_now`
            y_true = None
        # As `compile` does for a plain function.
        elif keras.ops.is_tensor(y_true) and keras.ops.is_tensor(y_pred):
            y_true, y_pred = squeeze_or_expand_to_same_rank(y_true, y_pred)
        else:
            pairs = keras.tree.map_structure(squeeze_or_expand_to_same_rank, y_true, y_pred)
            y_true, y_pred = (
                keras.tree.map_structure_up_to(y_true, lambda pair, i=i: pair[i], pairs)
                for i in (0, 1)
            )
        for converted, tensor in zip((y_true, y_pred), self._given, strict=True):
            self.inputs.identify(converted, tensor)

        def call(changed: Mapping[str, Any]) -> Any:
            given = self._tensors({**self._args, **changed})
            return self.loss.loss_function.fn(y_true, y_pred, **given)

        values = call({})
        check_result(self.loss, values)
        if self.inputs.batch:
            self._check_broadcast(values, y_pred, call)
        return values

    def _check_broadcast(self, values: Any, y_pred: Any, call: Callable[..., Any]) -> None:
        """Raise if an entry of shape `(N,)` broadcasts the losses of `N` samples to `(N, N)`."""
        shape = shape_of(values)
        if len(shape) != 2 or shape[0] != shape[1]:
            return
        for name, entry in self.inputs.batch.items():
            if len(shape_of(entry)) != 1 or not self.loss.takes(name):
                continue
            try:
                with Sandbox():
                    other = shape_of(call({name: keras.ops.expand_dims(entry, -1)}))
            except Exception:  # noqa: BLE001, S112 - then the function wants this shape
                continue
            if len(other) == 2 and other[1] == 1 != shape[1]:
                raise BatchError(
                    f"The batch entry {name!r} of shape {shape_of(entry)} broadcasts the losses "
                    f"of {self.loss.loss_function.name} to {shape}, where y_pred has "
                    f"{shape_of(y_pred)}. Give it the shape {other}, e.g. {name}[:, None]."
                )


def build(call: Call, y_true: Any, y_pred: Any) -> Any:
    """Check the model in Keras's symbolic build, and return the loss of its placeholders."""
    if call.model is not None and torch_processes() > 1:
        raise LossArgsError(
            f"torch.distributed runs {torch_processes()} processes. In each of them, Keras's fit() "
            "would train a model of its own. Write the loop yourself, with "
            "DistributedDataParallel(model), as examples/distributed.py does."
        )
    layers = layers_of(call.model)
    for layer in layers:
        layer.prepare(call.model)
    if call.model is not None:
        call.loss.checked_models.discard(call.model)  # it may be compiled again
    if any(call.loss in layer.get_losses() for layer in layers):
        return keras.ops.zeros((), dtype=call.loss.dtype)  # placeholders carry no values
    return call.evaluate(y_true, y_pred)
