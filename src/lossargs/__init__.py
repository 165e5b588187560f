"""Keras losses with extra arguments."""

from lossargs._errors import (
    ArgumentError,
    BatchError,
    ImmutableError,
    LossArgsError,
    SavingError,
    SignatureError,
)
from lossargs._factory import with_args

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BatchError",
    "ImmutableError",
    "LossArgsError",
    "SavingError",
    "SignatureError",
    "with_args",
]
