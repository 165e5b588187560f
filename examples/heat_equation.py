"""A physics-informed network for the heat equation: its loss is made of the network's derivatives.

The network u(x, t) shall solve u_t = ALPHA u_xx for x from 0 to 1 and t from 0 to 1, where only
u(x, 0), u(0, t) and u(1, t) are known. So it is trained with the residual of the equation at
random points (Raissi et al. 2019, https://doi.org/10.1016/j.jcp.2018.10.045), plus the error of u
at those where u is known. The residual gets u_t and u_xx as tensors of the graph, by
`derivatives`; the error gets with each batch the weight of each point, zero where u is unknown.

It learns without data, on JAX, TensorFlow or PyTorch, and is compared with the exact solution:

    python heat_equation.py
    python heat_equation.py --backend torch --epochs 60 --json run.json --plot run.png

The picture shows the exact solution, the network's, its error, and both parts of the loss.

It needs lossargs, a backend of Keras, and matplotlib (for --plot).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
PARSER.add_argument("--seed", type=int, default=0, help="default: %(default)s")
PARSER.add_argument("--plot", type=Path, metavar="PATH.png", help="draw the solution and its error")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write errors and history there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402

from lossargs import attach, derivatives, with_args  # noqa: E402

ALPHA, POINTS, BATCH = 0.1, 20_000, 200


def squared(values):
    return ops.squeeze(ops.square(values), axis=-1)  # one number for each point


@with_args
def residual(_u_true, _u, *, u_t, u_xx):
    return squared(u_t - ALPHA * u_xx)


@with_args
def error(u_true, u, *, weight):
    return weight * squared(u_true - u)


def compiled_network(steps: int) -> keras.Model:
    x, t = keras.Input((1,), name="x"), keras.Input((1,), name="t")
    hidden = layers.Rescaling(2.0, offset=-1.0)(layers.Concatenate()([x, t]))
    for _ in range(3):
        hidden = layers.Dense(32, activation="tanh")(hidden)
    u = layers.Dense(1)(hidden)

    u, u_t, u_xx = derivatives(u, (u, t), (u, x, x))
    loss = residual(u_t=u_t, u_xx=u_xx) + error()  # its `weight` comes with the batch
    model = keras.Model([x, t], attach(u, loss))
    rate = keras.optimizers.schedules.CosineDecay(1e-2, steps)
    model.compile(keras.optimizers.Adam(rate, beta_2=0.99), loss=loss)
    return model


def exact(x, t):
    def mode(k: int) -> np.ndarray:
        return np.exp(-ALPHA * (k * np.pi) ** 2 * t) * np.sin(k * np.pi * x)

    return mode(1) + 0.5 * mode(3)


def points(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, t, u where it is known, and the weight of its error: 20 there, 0 elsewhere."""
    rng = np.random.default_rng(seed)
    x, t = rng.random((2, POINTS, 1), "float32")
    initial, boundary = slice(0, POINTS // 10), slice(POINTS // 10, POINTS // 5)
    t[initial] = 0
    x[boundary] = x[boundary] > 0.5
    weight = np.zeros(POINTS, "float32")
    weight[: boundary.stop] = 20
    return x, t, exact(x, t) * (weight[:, None] > 0), weight


def draw(true, found, history: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure  # without pyplot it needs no screen

    figure = Figure(figsize=(14, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    limits = {"cmap": "viridis", "vmin": true.min(), "vmax": true.max()}
    shown = [("exact solution u(x, t)", true, limits), ("network", found, limits)]
    shown.append(("absolute error", np.abs(found - true), {"cmap": "magma"}))
    for panel, (title, values, options) in zip(panels, shown, strict=False):
        image = panel.imshow(values, origin="lower", extent=(0, 1, 0, 1), aspect="auto", **options)
        panel.set(title=title, xlabel="t", ylabel="x")
        figure.colorbar(image, ax=panel)
    epochs = range(1, len(history["loss"]) + 1)
    for name in ("loss", "residual", "error"):
        panels[3].semilogy(epochs, history[name], linewidth=2, label=name)
    panels[3].set(title="training", xlabel="epoch")
    panels[3].grid(alpha=0.3)
    panels[3].spines[["top", "right"]].set_visible(False)
    panels[3].legend(frameon=False)
    figure.savefig(path, format="png", dpi=75)


def main(options: argparse.Namespace) -> None:
    keras.utils.set_random_seed(options.seed)
    x, t, u, weight = points(options.seed)
    model = compiled_network(steps=options.epochs * POINTS // BATCH)
    training = {"epochs": options.epochs, "batch_size": BATCH, "sample_weight": {"weight": weight}}
    history = model.fit([x, t], u, **training).history
    with tempfile.TemporaryDirectory() as folder:  # no custom_objects: all is registered
        model.save(f"{folder}/heat.keras")
        loaded = keras.saving.load_model(f"{folder}/heat.keras")

    x, t = np.meshgrid(np.linspace(0, 1, 101), np.linspace(0, 1, 101), indexing="ij")
    grid, true = [x.reshape(-1, 1), t.reshape(-1, 1)], exact(x, t)
    found = model.predict(grid, batch_size=1024, verbose=0).reshape(true.shape)
    moved = np.abs(loaded.predict(grid, batch_size=1024, verbose=0).reshape(true.shape) - found)
    errors = {
        "max_error": float(np.abs(found - true).max()),
        "relative_l2_error": float(np.linalg.norm(found - true) / np.linalg.norm(true)),
    }
    print(", ".join(f"{name} {value:.5f}" for name, value in errors.items()))
    print(f"loaded: predictions differ by {moved.max():.1g} at most")
    if options.json:
        record = {"backend": keras.backend.backend(), "seed": options.seed, **errors}
        text = json.dumps(record | {"history": history}, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        draw(true, found, history, options.plot)
    if not errors["max_error"] < 1e-2:
        sys.exit("heat_equation.py: error: it did not solve the equation to 1e-2")


if __name__ == "__main__":
    main(OPTIONS)
