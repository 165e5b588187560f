"""A Wasserstein GAN with gradient penalty, in one `fit`: its loss reads the slope of the critic.

The loss of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028) is the critic's score of generated
points less that of real ones, plus a penalty where the slope of the critic between them is not 1.
The slope is `grad(score, mixed)`, a tensor of the graph, and an argument of the loss. In the same
step the generator learns: `reverse` turns the sign of its gradient (Ganin et al. 2016,
arXiv:1505.07818). It is to make points of eight clusters, of which a GAN easily forgets some:

    python wgan_gp.py
    python wgan_gp.py --backend torch --epochs 60 --json run.json --plot run.png

The picture shows both kinds of points on the scores of the critic, and their estimated distance.
It needs lossargs, a backend of Keras, and matplotlib (for --plot).
"""

import argparse
import json
import os
import sys
from pathlib import Path

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
CENTRES = np.array([(np.cos(angle), np.sin(angle)) for angle in np.arange(8) * np.pi / 4])


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


class Random(layers.Layer):
    """For each point, noise for the generator, and a share from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = keras.random.SeedGenerator()

    def call(self, x, training=False):
        seeds = (self.generator,) * 2 if training else (0, 1)  # so that a test can be repeated
        noise = keras.random.normal((ops.shape(x)[0], NOISE), seed=seeds[0])
        return noise, keras.random.uniform((ops.shape(x)[0], 1), seed=seeds[1])


def perceptron(inputs: int, outputs: int, hidden: int, name: str) -> keras.Sequential:
    wide = [layers.Dense(64, activation="leaky_relu") for _ in range(hidden)]
    return keras.Sequential([keras.Input((inputs,)), *wide, layers.Dense(outputs)], name=name)


def reverse(tensor):
    return 2 * ops.stop_gradient(tensor) - tensor  # the same values, and minus their gradient


def compiled_gan(steps: int) -> keras.Model:
    generator, critic = perceptron(NOISE, 2, 2, "generator"), perceptron(2, 1, 3, "critic")
    real = keras.Input((2,))
    noise, share = Random()(real)
    fake = generator(noise)
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
    return rng.normal(CENTRES[rng.integers(8, size=count)], SPREAD).astype("float32")


def draw(model: keras.Model, points: np.ndarray, history: dict[str, list], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    x, y = np.meshgrid(*[np.linspace(-1.5, 1.5, 90)] * 2)
    scores = model.get_layer("critic").predict(np.c_[x.ravel(), y.ravel()], verbose=0)
    shown = {"real": ring(2000, 1), "generated": points}
    for panel, (title, dots) in zip(panels, shown.items(), strict=False):
        panel.contourf(x, y, scores.reshape(x.shape), levels=20, cmap="Blues", alpha=0.8)
        panel.plot(*dots.T, ".", color="black", markersize=1.5)
        panel.set(title=f"{title} points, scores of the critic", aspect="equal")
    panels[2].plot(history["distance"], linewidth=2)
    panels[2].set(title="estimated distance (Wasserstein-1)", xlabel="epoch, from 0")
    figure.savefig(path, format="png", dpi=80)


def main(options: argparse.Namespace) -> None:
    keras.utils.set_random_seed(options.seed)
    model = compiled_gan(options.epochs * STEPS)
    real = ring(BATCH * STEPS, options.seed)
    history = model.fit(real, real, epochs=options.epochs, batch_size=BATCH).history
    noise = np.random.default_rng(options.seed).normal(size=(2000, NOISE))
    points = model.get_layer("generator").predict(noise, verbose=0)
    far = np.linalg.norm(points[:, None] - CENTRES, axis=-1)
    found = np.mean(far < 3 * SPREAD, axis=0)  # the share of the points near each centre
    print(f"near a centre: {found.sum():.3f} of the points, {found.min():.3f} at least")
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, "history": history}
        record["shares"] = found.tolist()
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(model, points, history, options.plot)
    if not (found.sum() > 0.8 and found.min() > 0.05):
        sys.exit("wgan_gp.py: error: it did not learn to make points of all eight clusters")


if __name__ == "__main__":
    main(OPTIONS)
