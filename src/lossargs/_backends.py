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


def package_of(backend: str) -> str:
    """What has to be installed for a backend of Keras."""
    return "jax" if backend == "numpy" else backend  # it borrows parts of Keras's JAX backend


def is_installed(backend: str) -> bool:
    """Whether what a backend needs can be found."""
    spec = importlib.util.find_spec(package_of(backend))
    return spec is not None and spec.origin is not None  # a mere folder of that name has none


def version(backend: str) -> str:
    """The version of an installed backend; TensorFlow comes under several names."""
    names = importlib.metadata.packages_distributions().get(backend)
    return importlib.metadata.version(names[0]) if names else "unknown version"


def choice() -> tuple[str, str]:
    """The backend that Keras is told to use, and by what; Keras itself may fail before it tells."""
    if backend := os.environ.get("KERAS_BACKEND"):
        return backend, "KERAS_BACKEND"
    home = Path.home()
    default = (home if os.access(home, os.W_OK) else Path("/tmp")) / ".keras"  # noqa: S108
    path = Path(os.environ.get("KERAS_HOME", default)).expanduser() / "keras.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["backend"], str(path)
    except (OSError, ValueError, KeyError):
        return "tensorflow", "Keras's default"


def choosing(backend: str) -> str:
    """What to write to have Keras use another backend."""
    return f'import os; os.environ["KERAS_BACKEND"] = "{backend}"'


def explain(error: Exception) -> None:
    """Say what to do, where Keras could not be imported because its backend is not there.

    Run as `python -m lossargs`, the process ends with this line instead of a traceback.

    Raises:
        ModuleNotFoundError: No `LossArgsError`, which nobody could import here.
    """
    backend, source = choice()
    found = [name for name in TRAINING if is_installed(name)]
    missing = package_of(backend)
    if backend not in KNOWN:
        cause = f"Keras has no backend {backend!r} ({source}).{nearest(backend, KNOWN)}"
        remedies = [] if found else ["install one: `python -m pip install jax`"]
    elif getattr(error, "name", "keras") == "keras" or is_installed(backend):
        return  # Keras itself is not there, or something else went wrong
    else:
        cause = f"Keras is to run on {backend!r} ({source}), and {missing!r} is not installed."
        remedies = [f"install it: `python -m pip install {missing}`"]
    if found:
        remedies.append(f"before importing Keras, `{choosing(found[0])}`")
    remedy = ", or ".join(remedies)
    message = f"{cause} Backends installed: {listed(found)}. {remedy[0].upper()}{remedy[1:]}."
    if sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)] in ("lossargs", "-mlossargs"):
        sys.exit(message)
    no_backend = ModuleNotFoundError(message, name=missing)
    no_backend.add_note(more(ModuleNotFoundError))
    raise no_backend from error
