"""Keras losses with extra arguments."""

try:
    import keras
except (ImportError, ValueError) as error:
    from lossargs._backends import explain

    explain(error)
    raise
else:
    del keras  # `keras` is not a public name of this package

from lossargs._attach import attach, detach, live_args
from lossargs._balance import balance
from lossargs._derivatives import derivatives, grad
from lossargs._errors import (
    ArgumentError,
    AttachError,
    BatchError,
    DerivativeError,
    LossArgsError,
    SavingError,
)
from lossargs._factory import LossFactory, with_args
from lossargs._layer import LossArgs
from lossargs._live import Adapter
from lossargs._loss import BoundLoss
from lossargs._schedule import BoundSchedule, ScheduleFactory, schedule

__version__ = "0.2.0"

__all__ = [
    "Adapter",
    "ArgumentError",
    "AttachError",
    "BatchError",
    "BoundLoss",
    "BoundSchedule",
    "DerivativeError",
    "LossArgs",
    "LossArgsError",
    "LossFactory",
    "SavingError",
    "ScheduleFactory",
    "attach",
    "balance",
    "derivatives",
    "detach",
    "grad",
    "live_args",
    "schedule",
    "with_args",
]
