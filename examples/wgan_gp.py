"""A Wasserstein GAN with gradient penalty, in one `fit`: its loss reads the slope of the critic.

The generator makes points of noise; the critic scores points, high for real and low for generated
ones. The loss of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028) is the score of generated points
less that of real ones, plus a penalty where the slope of the critic between them is not 1. The
slope is `grad(score, mixed)`, a tensor of the graph like the scores, and an argument of the loss.

Critic and generator learn in the same step from the same loss: the generated points go to the
critic by `reverse`, which turns the sign of the gradient for the generator (Ganin et al. 2016,
arXiv:1505.07818), so that it raises the score that the critic lowers. The real points are eight
clusters on a circle, of which a GAN easily forgets some. On JAX, TensorFlow or PyTorch:

    python wgan_gp.py
    python wgan_gp.py --backend torch --epochs 60 --json run.json --plot run.png

The picture shows real and generated points on the scores of the critic, and after each epoch the
estimated distance of the two (Wasserstein-1) and the penalty.

It needs lossargs, a backend of Keras, and matplotlib (for --plot).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw points and curves")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write errors and history there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, grad, with_args  # noqa: E402

NOISE, SPREAD, BATCH, STEPS = 8, 0.1, 256, 100
ANGLES = np.arange(8) * np.pi / 4
CENTRES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)


def steepness(slope):
    return ops.square(ops.sqrt(ops.sum(ops.square(slope), axis=-1) + 1e-12) - 1)


def difference(real_score, fake_score):
    return ops.squeeze(real_score - fake_score, axis=-1)


@with_args
def wgan_gp_loss(_points, real_score, *, fake_score, slope, weight=0.1):
    return weight * steepness(slope) - difference(real_score, fake_score)


@with_args
def distance(_points, real_score, *, fake_score):
    return difference(real_score, fake_score)


@with_args
def penalty(_points, _real_score, *, slope):
    return steepness(slope)


@keras.saving.register_keras_serializable(package="wgan_gp")
class Random(layers.Layer):
    """Random numbers for each sample, `normal` or `uniform`."""

    def __init__(self, kind: str, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind, self.size, self.generator = kind, size, keras.random.SeedGenerator()

    def call(self, x, training=False):
        seed = self.generator if training else 0  # so that a test can be repeated
        return getattr(keras.random, self.kind)((ops.shape(x)[0], self.size), seed=seed)

    def get_config(self):
        return {**super().get_config(), "kind": self.kind, "size": self.size}


def perceptron(inputs: int, outputs: int, hidden: int, name: str) -> keras.Sequential:
    wide = [layers.Dense(64, activation="leaky_relu") for _ in range(hidden)]
    return keras.Sequential([keras.Input((inputs,)), *wide, layers.Dense(outputs)], name=name)


def reverse(tensor):
    return 2 * ops.stop_gradient(tensor) - tensor  # the same values, and minus their gradient


def compiled_gan(steps: int) -> keras.Model:
    generator, critic = perceptron(NOISE, 2, 2, "generator"), perceptron(2, 1, 3, "critic")
    real = keras.Input((2,))
    fake = generator(Random("normal", NOISE)(real))
    share = Random("uniform", 1)(real)
    mixed = share * real + (1 - share) * ops.stop_gradient(fake)  # the penalty is the critic's

    slope, fake_score = grad(critic(mixed), mixed), critic(reverse(fake))
    loss = wgan_gp_loss(fake_score=fake_score, slope=slope)
    terms = [distance(fake_score=fake_score), penalty(slope=slope)]  # for the log
    model = keras.Model(real, attach(critic(real), loss, track=terms))
    rate = keras.optimizers.schedules.PolynomialDecay(2e-3, steps, 1e-5)
    model.compile(keras.optimizers.Adam(rate, beta_1=0.5, beta_2=0.9), loss=loss)
    return model


def ring(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = SPREAD * rng.normal(size=(count, 2))
    return (CENTRES[rng.integers(8, size=count)] + noise).astype("float32")


def shares(points: np.ndarray) -> np.ndarray:
    """For each centre, the share of the points that lie within three standard deviations of it."""
    far = np.linalg.norm(points[:, None] - CENTRES, axis=-1)
    return np.mean(far < 3 * SPREAD, axis=0)


def draw(model: keras.Model, points: np.ndarray, history: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 90), np.linspace(-1.5, 1.5, 90))
    scores = model.get_layer("critic").predict(np.c_[x.ravel(), y.ravel()], verbose=0)
    for panel, title, shown in (
        (panels[0], "real", ring(2000, 1)),
        (panels[1], "generated", points),
    ):
        panel.contourf(x, y, scores.reshape(x.shape), levels=20, cmap="Blues", alpha=0.8)
        panel.plot(*shown.T, ".", color="black", markersize=1.5)
        panel.set(title=f"{title} points, scores of the critic", aspect="equal")
    for name, title in (("distance", "estimated distance"), ("penalty", "penalty")):
        panels[2].plot(range(1, len(history[name]) + 1), history[name], linewidth=2, label=title)
    panels[2].set(title="training", xlabel="epoch")
    panels[2].grid(alpha=0.3)
    panels[2].spines[["top", "right"]].set_visible(False)
    panels[2].legend(frameon=False)
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    keras.utils.set_random_seed(options.seed)
    model = compiled_gan(options.epochs * STEPS)
    real = ring(BATCH * STEPS, options.seed)
    training = {"epochs": options.epochs, "batch_size": BATCH}
    history = model.fit(real, real, **training).history
    with tempfile.TemporaryDirectory() as folder:  # no custom_objects: all is registered
        model.save(f"{folder}/gan.keras")
        loaded = keras.saving.load_model(f"{folder}/gan.keras")

    noise = np.random.default_rng(options.seed).normal(size=(2000, NOISE))
    points, again = (m.get_layer("generator").predict(noise, verbose=0) for m in (model, loaded))
    found, expected = shares(points), shares(ring(2000, 1))
    print(f"loaded: generated points differ by {np.abs(again - points).max():.1g} at most")
    print(f"near a centre: {found.sum():.3f} of the points (real: {expected.sum():.3f}), at each "
          f"from {found.min():.3f} to {found.max():.3f}")  # fmt: skip
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed}
        record |= {"shares": found.tolist(), "history": history}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(model, points, history, options.plot)
    if not (found.sum() > 0.8 and found.min() > 0.05):
        sys.exit("wgan_gp.py: error: it did not learn to make points of all eight clusters")


if __name__ == "__main__":
    main(OPTIONS)
