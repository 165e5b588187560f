"""`python -m lossargs`: what is installed, what is in use, and what to type next."""

import sys

import keras

import lossargs
from lossargs._backends import TRAINING, choice, choosing, is_installed, version

EXAMPLE = """\
import keras, lossargs
huber = lossargs.with_args(keras.losses.huber)
model.compile("adam", loss=huber(delta=2.0))"""


def row(backend: str, in_use: str) -> str:
    """The line of one backend."""
    found = version(backend) if is_installed(backend) else "not installed"
    chosen = f"in use, chosen by {choice()[1]}" if backend == in_use else ""
    return f"  {backend:12}{found:16}{chosen}".rstrip()


def screen() -> str:
    """What is printed."""
    in_use = keras.backend.backend()
    versions = {
        "lossargs": lossargs.__version__,
        "Keras": keras.__version__,
        "Python": sys.version.split()[0],
    }
    another = max((name for name in TRAINING if name != in_use), key=is_installed)
    lines = [
        ", ".join(f"{name} {number}" for name, number in versions.items()),
        "",
        "Backends:",
        *(row(backend, in_use) for backend in dict.fromkeys((*TRAINING, in_use))),
        "",
        "Next, with any model:",
        *(f"  {line}" for line in EXAMPLE.splitlines()),
        "",
        "Another backend, before Keras is imported:",
        *([] if is_installed(another) else [f"  python -m pip install {another}"]),
        f"  {choosing(another)}",
        "",
        "More: https://lossargs.github.io/lossargs/",
    ]
    return "\n".join(lines)


print(screen())  # noqa: T201
