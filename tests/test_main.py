"""`python -m lossargs`, and `import lossargs` where Keras finds no backend."""

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import lossargs
from helpers import BACKEND
from lossargs._backends import choice, is_installed, version
from lossargs._errors import DOCUMENTATION
from test_site import is_message, sections

SOURCE = Path(lossargs.__file__).parents[1]
PACKAGES = ("tensorflow", "jax", "torch")

# Run by each process when it starts; then the packages cannot be found, as if not installed.
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
    """Run Python where some packages cannot be found, with an own folder for `keras.json`."""

    def run(*arguments, backend=BACKEND, hidden=(), config=None):
        (tmp_path / "sitecustomize.py").write_text(HIDE)
        (tmp_path / "keras").mkdir(exist_ok=True)
        if config is not None:
            (tmp_path / "keras" / "keras.json").write_text(json.dumps(config))
        environment = {
            **os.environ,
            "HIDDEN": " ".join(hidden),
            "KERAS_BACKEND": backend,
            "KERAS_HOME": str(tmp_path / "keras"),
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SOURCE)]),
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
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
    assert [line.split()[0] for line in lines if "in use, chosen by KERAS_BACKEND" in line] == [
        BACKEND
    ]
    assert version(BACKEND) in next(line for line in lines if line.strip().startswith(BACKEND))
    assert len(lines) < 24
    assert max(len(line) for line in lines) < 100
    start = lines.index("Next, with any model:") + 1
    namespace = {"model": keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])}
    exec("\n".join(line.strip() for line in lines[start : start + 3]), namespace)
    assert namespace["model"].loss.args["delta"] == 2.0


def test_a_choice_by_keras_json_with_one_backend(run, tmp_path):
    others = [name for name in PACKAGES if name not in (BACKEND, "jax")]
    done = run("-m", "lossargs", backend="", hidden=others, config={"backend": BACKEND})
    assert done.returncode == 0, done.stderr
    assert f"in use, chosen by {tmp_path / 'keras' / 'keras.json'}" in done.stdout
    for name in others:
        assert f"  {name:12}not installed" in done.stdout.splitlines()
    assert 'os.environ["KERAS_BACKEND"] = ' in done.stdout


def test_a_folder_is_no_backend(monkeypatch, tmp_path):
    (tmp_path / "openvino").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("openvino")
    (tmp_path / "openvino" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert is_installed("openvino")


@pytest.mark.parametrize("backend", [*PACKAGES, "numpy"])
def test_no_backend(run, backend):
    package = "jax" if backend == "numpy" else backend
    done = run("-m", "lossargs", backend=backend, hidden=PACKAGES)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"Keras is to run on '{backend}' (KERAS_BACKEND), and '{package}' is not installed. "
        f"Backends installed: nothing. Install it: `python -m pip install {package}`.\n"
    )
    assert is_message(sections()["ModuleNotFoundError"][0], done.stderr)


def test_a_missing_backend_while_another_is_installed(run):
    installed = "jax" if BACKEND == "numpy" else BACKEND
    missing = next(name for name in PACKAGES if name != installed)
    hidden = [name for name in PACKAGES if name != installed]
    done = run("-m", "lossargs", backend="", hidden=hidden, config={"backend": missing})
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Keras is to run on '{missing}' (" in done.stderr
    assert "keras.json), and" in done.stderr
    assert f"Backends installed: '{installed}'. Install it: " in done.stderr
    assert f'before importing Keras, `import os; os.environ["KERAS_BACKEND"] = "{installed}"`.' in (
        done.stderr
    )


def test_by_default_keras_wants_tensorflow(run):
    done = run("-m", "lossargs", backend="", hidden=PACKAGES)
    assert "Keras is to run on 'tensorflow' (" in done.stderr
    assert done.returncode == 1


def test_a_backend_that_keras_does_not_have(run):
    done = run("-m", "lossargs", backend="pytorch", hidden=PACKAGES)
    assert done.returncode == 1
    assert done.stderr == (
        "Keras has no backend 'pytorch' (KERAS_BACKEND). Did you mean 'torch'? "
        "Backends installed: nothing. Install one: `python -m pip install jax`.\n"
    )
    assert is_message(sections()["ModuleNotFoundError"][1], done.stderr)


def test_import_without_a_backend(run):
    done = run("-c", "import lossargs", backend="torch", hidden=PACKAGES)
    assert done.returncode == 1
    *_, text, note = done.stderr.splitlines()
    assert text.startswith("ModuleNotFoundError: Keras is to run on 'torch' (KERAS_BACKEND), and")
    assert note == f"More: {DOCUMENTATION}errors/#modulenotfounderror"
    code = "try: import lossargs\nexcept ModuleNotFoundError as error: print(error.name)"
    assert run("-c", code, backend="torch", hidden=PACKAGES).stdout == "torch\n"


def test_another_program_gets_the_error_and_no_exit(run, tmp_path):
    (tmp_path / "train.py").write_text("import lossargs")
    done = run("-m", "train", backend="torch", hidden=PACKAGES)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("hidden", "message"),
    [("keras", "No module named 'keras'"), ("absl", "No module named 'absl'")],
)
def test_other_failures_stay_what_they_are(run, hidden, message):
    done = run("-c", "import lossargs", hidden=[hidden])
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {message}"


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
