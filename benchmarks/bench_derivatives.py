"""First and second derivatives of a network: lossargs beside a model written for one backend.

The step is that of a physics-informed network: u, u_x, u_t, u_xx and u_tt of a perceptron of x and
t, which all go into the loss. By hand, `call` takes the derivatives with the backend's own tools,
from one evaluation of the network. lossargs takes them by `derivatives(u, (u, x), ...)`, or by
`grad` for each. All run in one process, by turns, in `fit`:

    python bench_derivatives.py --backend jax --json jax.json

Written are, for each form, the ratio of its step time to that by hand, the median and quartiles
of paired turns; and what the step is: instructions and temporary memory of JAX's optimized
program; nodes of TensorFlow's graph; operators that torch runs.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--turns", type=int, default=20, help="default: %(default)s")
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
from keras import layers, ops  # noqa: E402
from measuring import BACKEND, MODES, program, step_times, write  # noqa: E402

from lossargs import attach, derivatives, grad, with_args  # noqa: E402

STEPS = 20  # of a turn
# Depth, width, batch: so small that only overhead is left; a usual one; one that computes.
SIZES = {"tiny": (2, 8, 16), "usual": (4, 32, 256), "large": (4, 128, 1024)}


def residual(u: Any, u_x: Any, u_t: Any, u_xx: Any, u_tt: Any) -> Any:
    return ops.square(u_tt - u_xx + 0.1 * (u_t + u_x) + u)


@with_args
def equation(y_true, y_pred, *, u_x, u_t, u_xx, u_tt):
    return ops.square(y_true - y_pred) + residual(y_pred, u_x, u_t, u_xx, u_tt)


def equation_by_hand(y_true, y_pred):
    u = y_pred[:, :1]
    return ops.square(y_true - u) + residual(u, *ops.split(y_pred[:, 1:], 4, axis=1))


def network(depth: int, width: int) -> keras.Sequential:
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(width, "tanh") for _ in range(depth)]
    return keras.Sequential([keras.Input((2,)), *hidden, layers.Dense(1)])


class ByHand(keras.Model):
    """u and its derivatives side by side, by the backend's own tools."""

    def __init__(self, net: keras.Sequential) -> None:
        super().__init__()
        self.net = net

    def call(self, inputs):
        u, u_x, u_t, u_xx, u_tt = globals()[f"by_{BACKEND}"](self.net, *inputs)
        return ops.concatenate([u, u_x, u_t, u_xx, u_tt], axis=1)


def by_tensorflow(net, x, t):
    import tensorflow as tf

    with tf.GradientTape(persistent=True) as second:
        second.watch([x, t])
        with tf.GradientTape() as first:
            first.watch([x, t])
            u = net(tf.concat([x, t], 1))
        u_x, u_t = first.gradient(u, [x, t])
    return u, u_x, u_t, second.gradient(u_x, x), second.gradient(u_t, t)


def by_jax(net, x, t):
    import jax
    import jax.numpy as jnp

    def u(x, t):
        return net(jnp.concatenate([x, t], 1))

    def first(x, t):
        value, pull_back = jax.vjp(u, x, t)
        return value, *pull_back(jnp.ones_like(value))

    ones = jnp.ones_like(x)
    value, u_x, u_t = first(x, t)
    u_xx = jax.vjp(lambda x: first(x, t)[1], x)[1](ones)[0]
    u_tt = jax.vjp(lambda t: first(x, t)[2], t)[1](ones)[0]
    return value, u_x, u_t, u_xx, u_tt


def by_torch(net, x, t):
    import torch

    recording = torch.is_grad_enabled()
    with torch.enable_grad():
        x, t = (tensor.detach().requires_grad_() for tensor in (x, t))
        u = net(torch.cat([x, t], 1))
        ones = torch.ones_like(u)
        u_x, u_t = torch.autograd.grad(u, [x, t], ones, create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x, [x], ones, create_graph=recording, retain_graph=True)
        (u_tt,) = torch.autograd.grad(u_t, [t], ones, create_graph=recording)
    return u, u_x, u_t, u_xx, u_tt


def by_hand(depth: int, width: int) -> tuple[keras.Model, Any]:
    return ByHand(network(depth, width)), equation_by_hand


def by_lossargs(depth: int, width: int, *, at_once: bool) -> tuple[keras.Model, Any]:
    x, t = keras.Input((1,)), keras.Input((1,))
    u = network(depth, width)(ops.concatenate([x, t], axis=1))
    if at_once:
        u, u_x, u_t, u_xx, u_tt = derivatives(u, (u, x), (u, t), (u, x, x), (u, t, t))
    else:
        u_x, u_t = grad(u, x), grad(u, t)
        u_xx, u_tt = grad(u_x, x), grad(u_t, t)
    loss = equation(u_x=u_x, u_t=u_t, u_xx=u_xx, u_tt=u_tt)
    return keras.Model([x, t], attach(u, loss)), loss


FORMS = {
    "by hand": by_hand,
    "derivatives": lambda depth, width: by_lossargs(depth, width, at_once=True),
    "grad for each": lambda depth, width: by_lossargs(depth, width, at_once=False),
}


def compare(size: str, mode: str, turns: int) -> dict[str, Any]:
    """Each form's step time as a ratio to that by hand, and its program."""
    depth, width, batch = SIZES[size]
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (2, STEPS * batch, 1)).astype("float32")
    data = ([*points], np.sin(3 * points[0]))
    models: dict[str, keras.Model] = {}
    expected: list[float] = []
    for name, form in FORMS.items():
        model, loss = form(depth, width)
        model.compile(keras.optimizers.Adam(1e-3), loss=loss, **MODES[mode])
        history = model.fit(*data, batch_size=batch, shuffle=False, epochs=2, verbose=0).history
        if models:
            np.testing.assert_allclose(history["loss"], expected, rtol=1e-3)
        expected = history["loss"]
        models[name] = model
    results = step_times(models, data, batch, turns, base="by hand")
    first = keras.tree.map_structure(lambda array: array[:batch], data)
    for name in FORMS:
        results[name] |= program(models[name], first)
        print(size, mode, name, results[name], flush=True)
    return results


def main(options: argparse.Namespace) -> None:
    results = {}
    for size in SIZES:
        for mode in MODES:
            if mode == "torch.compile":
                continue  # torch does not compile the derivative of a derivative
            results[f"{size}, {mode}"] = compare(size, mode, options.turns)
    write(options.json, {"turns": options.turns, "sizes": SIZES, "results": results})


if __name__ == "__main__":
    main(OPTIONS)
