"""A Wasserstein GAN with gradient penalty, in one `fit`: its loss reads a gradient of the critic.

The loss of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028) is the critic's score of generated
images minus that of real ones, plus a penalty. Between them, the gradient norm of the critic should
be 1. The argument `slope` is that gradient, `grad(score, mixed)`. The generator learns in the same
step: `reverse` turns the sign of its gradient (Ganin et al. 2016, arXiv:1505.07818). It learns from
1,297 digits of scikit-learn. The check uses 500 others:

    python wgan_gp.py
    python wgan_gp.py --backend torch --epochs 60 --json run.json --plot run.png

A nearest-neighbour classifier must find each digit in 3 % of 1,000 images or more. Fidelity is the
mean distance to the nearest held-out digit, coverage that from these to the nearest image. Both
must be below d + 2/3 (e - d): d for training digits, e for a normal distribution fitted to them.
It needs lossargs, a backend of Keras, scikit-learn, and matplotlib (for --plot).
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from sklearn import datasets, metrics, neighbors

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw digits and a curve")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the check and history there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, grad, with_args  # noqa: E402

PIXELS, NOISE, WIDTH, BATCH, STEPS = 64, 16, 256, 128, 75  # STEPS of an epoch


def steepness(slope):
    return ops.square(ops.sqrt(ops.sum(ops.square(slope), axis=-1) + 1e-12) - 1)


@with_args
def wgan_gp_loss(_images, real_score, *, fake_score, slope, weight=1.0):
    return weight * steepness(slope) - ops.squeeze(real_score - fake_score, axis=-1)


@with_args
def distance(_images, real_score, *, fake_score):
    return ops.squeeze(real_score - fake_score, axis=-1)


@with_args
def penalty(_images, _real_score, *, slope):
    return steepness(slope)


class Random(layers.Layer):
    """For each image, noise for the generator, and a share from 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = keras.random.SeedGenerator()

    def call(self, x, training=False):
        seeds = (self.generator,) * 2 if training else (0, 1)  # so that a test can be repeated
        noise = keras.random.normal((ops.shape(x)[0], NOISE), seed=seeds[0])
        return noise, keras.random.uniform((ops.shape(x)[0], 1), seed=seeds[1])


def perceptron(inputs: int, outputs: int, hidden: int, last: str | None = None):
    wide = [layers.Dense(WIDTH, activation="leaky_relu") for _ in range(hidden)]
    return keras.Sequential([keras.Input((inputs,)), *wide, layers.Dense(outputs, activation=last)])


def reverse(tensor):
    return 2 * ops.stop_gradient(tensor) - tensor  # the same values, and minus their gradient


def compiled_gan(steps: int) -> tuple[keras.Model, keras.Model]:
    generator, critic = perceptron(NOISE, PIXELS, 2, "sigmoid"), perceptron(PIXELS, 1, 3)
    real = keras.Input((PIXELS,))
    noise, share = Random()(real)
    fake = generator(noise)
    mixed = share * real + (1 - share) * ops.stop_gradient(fake)  # the penalty is the critic's
    slope, fake_score = grad(critic(mixed), mixed), critic(reverse(fake))
    loss = wgan_gp_loss(fake_score=fake_score, slope=slope)
    terms = [distance(fake_score=fake_score), penalty(slope=slope)]  # for the log
    model = keras.Model(real, attach(critic(real), loss, track=terms))
    rate = keras.optimizers.schedules.PolynomialDecay(1e-3, steps, 1e-5)
    model.compile(keras.optimizers.Adam(rate, beta_1=0, beta_2=0.9), loss=loss)
    return model, generator


def distances(images: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """From an image to the nearest digit, and from a digit to the nearest image, on average."""
    table = metrics.pairwise_distances(images, held_out)
    return {"fidelity": float(table.min(1).mean()), "coverage": float(table.min(0).mean())}


def draw(shown: dict[str, np.ndarray], history: dict[str, list], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    panels = (figure := Figure(figsize=(13, 4), layout="constrained")).subplots(1, 3)
    for panel, (title, images) in zip(panels, shown.items(), strict=False):
        tiles = np.pad(images[:64].reshape(8, 8, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)))
        panel.imshow(tiles.swapaxes(1, 2).reshape(80, 80), cmap="gray_r")
        panel.set(title=title, xticks=[], yticks=[])
    panels[2].plot(history["distance"], linewidth=2)
    panels[2].set(title="estimated distance (Wasserstein-1)", xlabel="epoch, from 0")
    figure.savefig(path, format="png", dpi=80)


def main(options: argparse.Namespace) -> None:
    keras.utils.set_random_seed(options.seed)
    digits, rng = datasets.load_digits(), np.random.default_rng(options.seed)
    order = rng.permutation(len(digits.data))
    train, held_out = np.split((digits.data[order] / 16).astype("float32"), [-500])
    real = rng.choice(train, BATCH * STEPS)
    model, generator = compiled_gan(options.epochs * STEPS)
    history = model.fit(real, real, epochs=options.epochs, batch_size=BATCH).history
    images = generator.predict(rng.normal(size=(1000, NOISE)), verbose=0)
    normal = np.clip(rng.multivariate_normal(train.mean(axis=0), np.cov(train.T), 1000), 0, 1)
    kinds = {"training": train[:1000], "normal": normal, "generated": images}
    apart = {kind: distances(some, held_out) for kind, some in kinds.items()}
    found = neighbors.KNeighborsClassifier().fit(train, digits.target[order[:-500]]).predict(images)
    shares = np.bincount(found, minlength=10) / len(found)
    print(*(f"{kind}: {values}" for kind, values in apart.items()), f"shares: {shares}", sep="\n")
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, "history": history}
        record |= {"shares": shares.tolist(), "distances": apart}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw({"real digits": held_out, "generated digits": images}, history, options.plot)
    low, high, made = apart.values()
    if not all(3 * made[k] < low[k] + 2 * high[k] for k in made) or shares.min() < 0.03:
        sys.exit("wgan_gp.py: error: it did not learn to make images like digits of all ten kinds")


if __name__ == "__main__":
    main(OPTIONS)
