"""`python -m lossargs`, and `import lossargs` where Keras finds no backend."""

import importlib
import json
import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import lossargs
from helpers import BACKEND
from lossargs._backends import CHOOSE, choice, is_installed, version
from lossargs._errors import DOCUMENTATION
from test_site import is_message, sections

SOURCE = Path(lossargs.__file__).parents[1]
PACKAGES = ("tensorflow", "jax", "torch")
PACKAGE = "jax" if BACKEND == "numpy" else BACKEND

# Run by each process when it starts: then these packages are not found, as if not installed.
HIDE = """
import os, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        hidden = name.split(".")[0] in os.environ["HIDDEN"].split()
        return None if hidden else self.finder.find_spec(name, *args)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def run(tmp_path):
    """Run Python where some packages cannot be found, with an own `keras.json`."""

    def run(*arguments, backend=BACKEND, hidden=(), config=None):
        (tmp_path / "sitecustomize.py").write_text(HIDE)
        if config is not None:
            (tmp_path / "keras.json").write_text(json.dumps(config))
        environment = {
            **os.environ,
            "HIDDEN": " ".join(hidden),
            "KERAS_BACKEND": backend,
            "KERAS_HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)]),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment
        )

    return run


def test_the_screen(run):
    done = run("-m", "lossargs")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == (
        f"lossargs {lossargs.__version__}, Keras {keras.__version__}, "
        f"Python {platform.python_version()}"
    )
    (used,) = (line for line in lines if "in use, chosen by KERAS_BACKEND" in line)
    assert used.split()[0] == BACKEND
    assert version(BACKEND) in used
    assert len(lines) < 24
    assert max(len(line) for line in lines) < 100
    start = lines.index("Next, with any model:") + 1
    namespace = {"model": keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])}
    exec("\n".join(line.strip() for line in lines[start : start + 3]), namespace)
    assert namespace["model"].loss.args["delta"] == 2.0


def test_a_choice_by_keras_json_with_one_backend(monkeypatch, capsys, tmp_path):
    others = [name for name in PACKAGES if name not in (BACKEND, "jax")]
    monkeypatch.setenv("KERAS_BACKEND", "")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "keras.json").write_text(json.dumps({"backend": BACKEND}))
    for name in others:
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    runpy.run_module("lossargs", run_name="__main__")
    screen = capsys.readouterr().out
    assert f"in use, chosen by {tmp_path / 'keras.json'}" in screen
    for name in others:
        assert f"  {name:12}not installed" in screen.splitlines()
    assert 'os.environ["KERAS_BACKEND"] = ' in screen


def test_a_folder_is_no_backend(monkeypatch, tmp_path):
    (tmp_path / "openvino").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("openvino")
    (tmp_path / "openvino" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert is_installed("openvino")


OTHERS = [name for name in PACKAGES if name != PACKAGE]
NO_BACKEND = [
    ("torch", "KERAS_BACKEND", PACKAGES, None, "'torch' is not installed"),
    ("numpy", "KERAS_BACKEND", PACKAGES, None, "'jax' is not installed"),
    ("pytorch", "KERAS_BACKEND", PACKAGES, None, "Keras has no such backend. Did you mean 'torch'"),
    ("tensorflow", "", PACKAGES, None, "'tensorflow' is not installed"),  # Keras's default
    (OTHERS[1], "keras.json", OTHERS, {"backend": OTHERS[1]}, f"{OTHERS[1]!r} is not installed"),
]


@pytest.mark.parametrize(("backend", "source", "hidden", "config", "problem"), NO_BACKEND)
def test_no_backend(run, backend, source, hidden, config, problem):  # noqa: PLR0913, PLR0917
    by_environment = backend if source == "KERAS_BACKEND" else ""
    code = "try: import lossargs\nexcept ImportError as error: print(error.name); raise"
    done = run("-c", code, backend=by_environment, hidden=hidden, config=config)
    package = {"pytorch": None, "numpy": "jax"}.get(backend, backend)
    assert (done.returncode, done.stdout) == (1, f"{package}\n")
    *_, text, note = done.stderr.splitlines()
    assert text.startswith(f"ModuleNotFoundError: Keras selects the backend {backend!r} (")
    assert f"{source}), and {problem}" in text
    found = f"{PACKAGE!r}" if hidden is OTHERS else "nothing"
    choose = f", or choose one before importing Keras: `{CHOOSE.format(PACKAGE)}`"
    end = choose if hidden is OTHERS else ""
    install = f"`python -m pip install {package or 'jax'}`"
    assert text.endswith(f"Backends installed: {found}. Install one: {install}{end}.")
    assert note == f"More: {DOCUMENTATION}errors/#modulenotfounderror"
    assert is_message(sections()["ModuleNotFoundError"][0], text)


@pytest.mark.parametrize("hidden", ["keras", "absl"])
def test_other_failures_stay_what_they_are(run, hidden):
    done = run("-c", "import lossargs", hidden=[hidden])
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named {hidden!r}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [('{"backend": "torch"}', "torch"), ("{}", "tensorflow"), ("no JSON", "tensorflow")],
)
def test_choice_of_keras(monkeypatch, tmp_path, written, expected):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    assert choice() == ("tensorflow", "Keras's default")
    (tmp_path / "keras.json").write_text(written)
    assert choice()[0] == expected
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert choice() == ("jax", "KERAS_BACKEND")
