"""What type checkers know of `with_args`: never run, only checked."""

from collections.abc import Mapping
from typing import Any, assert_type

from lossargs import BoundLoss, BoundSchedule, LossFactory, ScheduleFactory, schedule, with_args


@with_args
def shifted(y_true: Any, y_pred: Any, shift: float, *, scale: float = 1.0) -> Any:
    return scale * (y_true - y_pred) + shift


@with_args(name="late", reduction="sum", dtype="float32", package="mine")
def late(y_true: Any, y_pred: Any, **extra: float) -> Any:
    return y_true - y_pred


def plain(labels: Any, outputs: Any, /, mask: Any = None) -> Any:
    return labels - outputs


loss = shifted(10)
assert_type(loss, BoundLoss)
assert_type(shifted(shift=10, scale=2.0), BoundLoss)
assert_type(shifted(), BoundLoss)  # `shift` comes with the batch
assert_type(shifted(shift="a variable, a schedule"), BoundLoss)
assert_type(late(a=1.0), BoundLoss)
assert_type(with_args(plain)(mask=1), BoundLoss)
assert_type(with_args(plain, name="other")(), BoundLoss)


@schedule
def cyclical(step: Any, period: float, *, ratio: float = 0.5) -> Any:
    return (step % period) / (ratio * period)


@schedule(package="mine")
def constant(step: Any) -> Any:
    return 1.0 + 0 * step


assert_type(cyclical(2000, ratio=1.0), BoundSchedule)
assert_type(constant(), BoundSchedule)
kept: ScheduleFactory[[]] = constant
cyclical(ratio=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
cyclical("long")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

renamed: LossFactory[...] = shifted.options(name="late", reduction=None)
assert_type(shifted.options(dtype="float64")(1), BoundLoss)

assert_type(loss.replace(shift=5), BoundLoss)
arguments: Mapping[str, Any] = loss.args

with_args(1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
shifted.options(color="red")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
loss.args = {}  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
