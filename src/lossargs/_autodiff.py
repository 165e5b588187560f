"""Derivatives inside a step, by the backend in use: one body for each.

The only module that names a backend; each is imported when its body runs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import keras

# A derivative: the place of what is differentiated among the results of a function, and the places
# of what it is differentiated along, one after another, among its arguments.
Path = tuple[int, tuple[int, ...]]
Function = Callable[[list[Any]], tuple[list[Any], Any]]
Values = dict[Path, Any]


def _plan(paths: Iterable[Path]) -> dict[Path, list[int]]:
    """What to differentiate, lower orders first, and along which arguments each."""
    plan: dict[Path, list[int]] = {}
    steps = {(k, y, path[:k], path[k]) for y, path in paths for k in range(len(path))}
    for _, y, path, x in sorted(steps):
        plan.setdefault((y, path), []).append(x)
    return plan


def _tensorflow(function: Function, xs: list[Any], paths: list[Path]) -> tuple[Values, Any]:
    import tensorflow as tf  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    plan = _plan(paths)
    xs = [tf.identity(x) for x in xs]  # two of them may be one tensor

    def up_to(order: int) -> tuple[Values, Any]:
        if order == 0:
            ys, aside = function(xs)
            return {(place, ()): y for place, y in enumerate(ys)}, aside
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(xs)
            values, aside = up_to(order - 1)
        for (y, path), along in plan.items():
            if len(path) == order - 1:
                sources, zero = [xs[x] for x in along], tf.UnconnectedGradients.ZERO
                slopes = tape.gradient(values[y, path], sources, unconnected_gradients=zero)
                for x, slope in zip(along, slopes, strict=True):
                    values[y, (*path, x)] = tf.convert_to_tensor(slope)
        return values, aside

    return up_to(max(len(path) for _, path in paths))


def _jax(function: Function, xs: list[Any], paths: list[Path]) -> tuple[Values, Any]:
    import jax  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    def derivative(y: int, path: tuple[int, ...]) -> Callable[[list[Any]], Any]:
        if not path:
            return lambda xs: function(xs)[0][y]
        lower, x = derivative(y, path[:-1]), path[-1]

        def value(xs: list[Any]) -> Any:
            result, pull_back = jax.vjp(lambda new: lower([*xs[:x], new, *xs[x + 1 :]]), xs[x])
            return pull_back(keras.ops.ones_like(result))[0]

        return value

    # What is computed more than once, XLA merges.
    ys, aside = function(xs) if any(not path for _, path in paths) else ([], None)
    values: Values = {(place, ()): y for place, y in enumerate(ys)}
    return values | {(y, path): derivative(y, path)(xs) for y, path in paths if path}, aside


def _torch(function: Function, xs: list[Any], paths: list[Path]) -> tuple[Values, Any]:
    import torch  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    plan = _plan(paths)
    recording = torch.is_grad_enabled()
    with torch.enable_grad():  # also when evaluating
        # Two of them may be one tensor.
        xs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in xs]
        ys, aside = function(xs)
        values: Values = {(place, ()): y for place, y in enumerate(ys)}
        for (y, path), along in plan.items():
            value = values[y, path]
            slopes = (
                torch.autograd.grad(
                    value,
                    [xs[x] for x in along],
                    torch.ones_like(value),
                    create_graph=recording or any((y, (*path, x)) in plan for x in along),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                if value.requires_grad
                else [torch.zeros_like(xs[x]) for x in along]
            )
            values |= {(y, (*path, x)): slope for x, slope in zip(along, slopes, strict=True)}
    if not recording:
        values = {path: value.detach() for path, value in values.items()}
    return values, aside


def _torch_uncompiled(function: Function, xs: list[Any], paths: list[Path]) -> tuple[Values, Any]:
    import torch  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    # What `torch.compile` makes has no second derivative.
    body = torch.compiler.disable(_torch) if torch.compiler.is_compiling() else _torch
    return body(function, xs, paths)


_BODIES = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch_uncompiled}


def has_derivatives() -> bool:
    """Whether the backend in use can differentiate."""
    return keras.backend.backend() in _BODIES


def differentiate(function: Function, xs: list[Any], paths: list[Path]) -> tuple[Values, Any]:
    """Derivatives of the results of a function, by the backend in use.

    Args:
        function: Takes a list of tensors and gives a list of tensors, which are differentiated,
            and anything aside. It may be called more than once.
        xs: The tensors, floating-point.
        paths: The derivatives to take. Each is the gradient of the sum of what it differentiates,
            which for the samples of a batch is each one's own; it can be differentiated further.

    Returns:
        The values by their paths, and among them maybe others; and what the function gave aside,
        if one of the paths is a result itself.
    """
    return _BODIES[keras.backend.backend()](function, xs, paths)
