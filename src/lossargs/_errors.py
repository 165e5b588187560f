"""Exceptions of lossargs. They are not a ValueError, which Keras wraps in its own error."""

import difflib
from collections.abc import Collection, Iterable

DOCUMENTATION = "https://lossargs.github.io/lossargs/"


def more(error: type[Exception]) -> str:
    """Return the note that links to the documentation of an error."""
    return f"More: {DOCUMENTATION}errors/#{error.__name__.lower()}"


class LossArgsError(Exception):
    """The base class of all errors of lossargs."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        documented = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__)
        # Not in the text, which Keras and other errors quote.
        self.add_note(more(documented))


class ArgumentError(LossArgsError, TypeError):
    """A function or an argument is invalid, unknown or missing."""


class AttachError(LossArgsError):
    """A live argument has no value in a step, or cannot get one from this model."""


class BatchError(LossArgsError):
    """A batch entry or a sample weight is unknown or invalid, or would weight a metric."""


class SavingError(LossArgsError):
    """A loss cannot be saved so that it loads again, or cannot be loaded."""


class DerivativeError(LossArgsError):
    """A derivative does not exist, or the backend cannot take it."""


def listed(names: Iterable[str]) -> str:
    """Return names for a message: `'a', 'b'`, or `nothing`."""
    return ", ".join(repr(name) for name in names) or "nothing"


def taken(name: object, known: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the known names, and a similar one."""
    return f"It takes {listed(known)}.{nearest(name, known)}"


def nearest(name: object, known: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the known name that is most similar, or `""`."""
    matches = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
