"""The inputs that the losses of an output share in one step, besides targets and predictions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from lossargs._errors import AttachError, BatchError, taken
from lossargs._keras import (
    Step,
    in_symbolic_scope,
    is_compiled_by_torch,
    running_step,
    weighted_metrics_of,
)
from lossargs._live import StepValues, get_step_values

SAMPLE_WEIGHT = "sample_weight"  # the batch entry that is the ordinary sample weight


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Batch entries and live values of a step, and the losses of samples computed so far."""

    batch: Mapping[str, Any]  # by name
    weight: Any  # of the samples, or `None`
    values: Sequence[StepValues]  # carried by the predictions
    step: Step | None  # that is running; `None` in a user's own loop
    # `None` if no loss is evaluated twice, or if the compiler merges equal computations.
    memo: dict[Any, Any] | None = None
    # By loss: predictions and reduced value, so that rules of `balance` run once per step.
    reduced: dict[Any, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    # Of losses that compute the weights of their terms.
    term_weights: dict[Any, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, loss: Any, y_pred: Any, sample_weight: Any, inner: Sequence[Any] = ()) -> "Inputs":
        """Return the inputs among the arguments that Keras gives to a loss.

        `inner` has the losses among the extra arguments of the call.
        """
        is_symbolic = in_symbolic_scope()
        values = [] if is_symbolic else get_step_values(y_pred)
        step = values[0].step if values else running_step()
        # Check once: TensorFlow in the trace, the other backends in the symbolic build.
        if loss.holds_live and (is_symbolic or keras.backend.backend() == "tensorflow"):
            _refuse_metrics(loss)
        if not isinstance(sample_weight, Mapping):
            return cls({}, sample_weight, values, step)
        batch = {key: value for key, value in sample_weight.items() if key != SAMPLE_WEIGHT}
        _check_batch(batch, loss, (loss, *loss.inner_losses, *inner))
        # Keras weights such a metric by the first entry of the dict, in the order of its keys.
        first = min(sample_weight) if batch else SAMPLE_WEIGHT
        metrics = None if first == SAMPLE_WEIGHT else weighted_metrics_of(step and step.model)
        if metrics:
            raise BatchError(
                f"weighted_metrics={metrics} would be weighted by the batch entry {first!r}, since "
                "Keras takes the first entry of a dict for the sample weights. Give these metrics "
                "as metrics=[...], without weights."
            )
        return cls(batch, sample_weight.get(SAMPLE_WEIGHT), values, step)

    # Each loss is evaluated once per step, also if it is a term, an inner loss and tracked.

    def sharing(self) -> "Inputs":
        """Return these inputs for several losses that may be evaluated more than once."""
        return self if is_compiled_by_torch() else dataclasses.replace(self, memo={})

    def remember(self, key: tuple[Any, Any, Any], values: Any) -> None:
        """Keep the losses of the samples of a loss, for the same targets and predictions."""
        if self.memo is not None:
            loss, y_true, y_pred = key
            # Keep the tensors, so that their ids are not reused.
            self.memo[loss, self._id(y_true), self._id(y_pred)] = (values, y_true, y_pred)

    def recall(self, key: tuple[Any, Any, Any]) -> Any:
        """Return the losses of the samples that were kept, or `None`."""
        if not self.memo:
            return None
        loss, y_true, y_pred = key
        return self.memo.get((loss, self._id(y_true), self._id(y_pred)), [None])[0]

    def identify(self, converted: Any, tensor: Any) -> None:
        """Note that `converted` has the identity of `tensor`, from which it was converted."""
        if self.memo is not None and converted is not tensor:
            self.memo[id(converted)] = (self._id(tensor), converted)

    def _id(self, tensor: Any) -> int:
        same = self.memo and self.memo.get(id(tensor))
        return same[0] if same else id(tensor)


def _refuse_metrics(loss: Any) -> None:
    step = running_step()
    if step is not None and step.method == "compute_metrics":
        raise AttachError(
            f"{loss!r} has live arguments, and was given to compile as a metric, where they "
            "have no value. Track it instead: attach(model, loss, track=[metric_loss])."
        )


def _check_batch(batch: Mapping[str, Any], loss: Any, takers: Sequence[Any]) -> None:
    """Raise for an entry that no function takes, or that cannot become a tensor."""
    name = loss.title
    for key in batch:
        if not any(one.takes(key) for one in takers):
            known = list(dict.fromkeys(known for one in takers for known in one.parameters))
            raise BatchError(
                f"The batch (third element of the data) has an entry {key!r}, which {name} does "
                f"not take. {taken(key, known)} Leave it out, or accept it: "
                f"def {loss.loss_function.code_name}(y_true, y_pred, **extra): ..."
            )
    for key, value in batch.items():
        if value is None:
            raise BatchError(
                f"The batch entry {key!r} for {name} is None. Leave it out to use the bound or "
                f"default value, or write sample_weight={{{key!r}: array}}."
            )
        if getattr(getattr(value, "dtype", None), "kind", "") in ("O", "S", "U"):
            raise BatchError(
                f"The batch entry {key!r} for {name} is an array of {value.dtype}, which no "
                "backend can compute with. Give numbers, e.g. array.astype('float32')."
            )


def shape_of(values: Any) -> tuple[int | None, ...]:
    """Return the shape of a tensor or array, with `None` for sizes that are not known."""
    shape = values.shape if hasattr(values, "shape") else np.shape(values)
    return () if getattr(shape, "rank", 0) is None else tuple(shape)  # unknown on TensorFlow
