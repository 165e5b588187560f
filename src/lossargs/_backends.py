"""Which backends are installed, and which one Keras is told to use; none of them is imported."""

import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path

from lossargs._errors import listed, more, nearest

TRAINING = ("tensorflow", "jax", "torch")
KNOWN = (*TRAINING, "numpy", "openvino")
PACKAGES = {"numpy": "jax"}  # Keras's NumPy backend borrows parts of its JAX backend
CHOOSE = 'import os; os.environ["KERAS_BACKEND"] = "{}"'


def is_installed(backend: str) -> bool:
    """Return whether the package of a backend is installed."""
    spec = importlib.util.find_spec(PACKAGES.get(backend, backend))
    return spec is not None and spec.origin is not None  # a mere folder of that name has none


def version(backend: str) -> str:
    """Return the version of an installed backend; TensorFlow comes under several names."""
    names = importlib.metadata.packages_distributions().get(backend)
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
    """Raise an error that says what to install, if Keras failed because its backend is missing.

    Run as `python -m lossargs`, the process ends with this line instead of a traceback.
    """
    backend, source = choice()
    found = [name for name in TRAINING if is_installed(name)]
    missing = PACKAGES.get(backend, backend)
    if backend not in KNOWN:
        cause = f"Keras has no backend {backend!r} ({source}).{nearest(backend, KNOWN)}"
        remedies = [] if found else ["install one: `python -m pip install jax`"]
    elif getattr(error, "name", "keras") == "keras" or is_installed(backend):
        return
    else:
        cause = f"Keras is to run on {backend!r} ({source}), and {missing!r} is not installed."
        remedies = [f"install it: `python -m pip install {missing}`"]
    if found:
        remedies.append(f"before importing Keras, `{CHOOSE.format(found[0])}`")
    remedy = ", or ".join(remedies)
    message = f"{cause} Backends installed: {listed(found)}. {remedy[0].upper()}{remedy[1:]}."
    if sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)] in ("lossargs", "-mlossargs"):
        sys.exit(message)
    no_backend = ModuleNotFoundError(message, name=missing)
    no_backend.add_note(more(ModuleNotFoundError))
    raise no_backend from error
