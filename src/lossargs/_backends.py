"""Which backends are installed, and which one Keras is told to use; none of them is imported."""

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

from lossargs._errors import listed, more, nearest

TRAINING = ("tensorflow", "jax", "torch")
# Keras's NumPy backend needs JAX.
PACKAGES = {**{name: name for name in TRAINING}, "numpy": "jax", "openvino": "openvino"}
CHOOSE = 'import os; os.environ["KERAS_BACKEND"] = "{}"'


def is_installed(package: str) -> bool:
    """Return whether a package is installed."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder of that name has none


def version(package: str) -> str:
    """Return the version of an installed package; TensorFlow comes under several names."""
    names = importlib.metadata.packages_distributions().get(package)
    return importlib.metadata.version(names[0]) if names else "unknown version"


def choice() -> tuple[str, str]:
    """Return the backend that Keras selects, and where it is set, without importing Keras."""
    if backend := os.environ.get("KERAS_BACKEND"):
        return backend, "KERAS_BACKEND"
    home = Path.home()
    default = (home if os.access(home, os.W_OK) else Path("/tmp")) / ".keras"  # noqa: S108
    path = Path(os.environ.get("KERAS_HOME", default)).expanduser() / "keras.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["backend"], str(path)
    except (OSError, ValueError, KeyError):
        return "tensorflow", "Keras's default"


def explain(error: Exception) -> None:
    """Raise an error that says what to install, if Keras failed because its backend is missing."""
    backend, source = choice()
    package = PACKAGES.get(backend)
    if getattr(error, "name", "") == "keras" or (package and is_installed(package)):
        return
    found = [name for name in TRAINING if is_installed(name)]
    problem = f"{package!r} is not installed" if package else "Keras has no such backend"
    message = (
        f"Keras selects the backend {backend!r} ({source}), and {problem}."
        f"{nearest(backend, PACKAGES) if not package else ''} Backends installed: {listed(found)}. "
        f"Install one: `python -m pip install {package or 'jax'}`"
    )
    if found:
        message += f", or choose one before importing Keras: `{CHOOSE.format(found[0])}`"
    no_backend = ModuleNotFoundError(f"{message}.", name=package)
    no_backend.add_note(more(ModuleNotFoundError))
    raise no_backend from error
