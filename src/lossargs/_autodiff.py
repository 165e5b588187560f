"""Derivatives of a function of tensors, by the backend in use.

The only module that imports a backend, in the function that runs on it.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import keras

from lossargs._keras import in_symbolic_scope, output_specs

Path = tuple[int, ...]  # a result, and the arguments of its derivatives, one after another
Gradients = dict[Path, Any]
Along = dict[Path, set[int]]
Tensors = dict[int, Any]
Function = Callable[[Tensors], Gradients]

# The function of a backend returns the values of `function`, and gradients of some of them. The
# entry `(*path, x)` is the gradient of the sum of the entry `path` with respect to `xs[x]`.


def _tensorflow(function: Function, along: Along, xs: Tensors) -> Gradients:
    import tensorflow as tf  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    xs = {x: tf.identity(tensor) for x, tensor in xs.items()}  # two of them may be one tensor
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(list(xs.values()))
        values = function(xs)
    for path, places in along.items():
        sources, zero = [xs[x] for x in places], tf.UnconnectedGradients.ZERO
        slopes = tape.gradient(values[path], sources, unconnected_gradients=zero)
        for x, slope in zip(places, slopes, strict=True):
            values[*path, x] = tf.convert_to_tensor(slope)
    return values


def _jax(function: Function, along: Along, xs: Tensors) -> Gradients:
    import jax  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    values: Gradients
    # As `jax.vjp`, but the work that gradients share is done once.
    values, push_forward = jax.linearize(function, xs)
    for path, places in along.items():

        def push_this(dxs: Tensors, path: Path = path) -> Any:
            return push_forward(dxs)[path]

        pull_back = jax.linear_transpose(push_this, xs)
        (slopes,) = pull_back(keras.ops.ones_like(values[path]))
        values |= {(*path, x): slopes[x] for x in places}
    return values


def _torch(function: Function, along: Along, xs: Tensors) -> Gradients:
    import torch  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    recording, checking = torch.is_grad_enabled(), in_symbolic_scope()
    with torch.enable_grad():  # also when evaluating
        # Two of them may be one tensor.
        xs = {x: tensor.view_as(tensor).requires_grad_() for x, tensor in xs.items()}
        values = function(xs)
        for path, places in along.items():
            value, sources = values[path], [xs[x] for x in places]
            slopes: Any = map(torch.zeros_like, sources)
            if value.requires_grad:
                if checking:
                    _refuse_cut_graph(value)
                slopes = torch.autograd.grad(
                    value,
                    sources,
                    # With this, a function that is differentiable only once leaves an `Error`.
                    torch.ones_like(value, requires_grad=checking),
                    create_graph=recording,
                    retain_graph=True,
                    materialize_grads=True,
                )
            values |= {(*path, x): slope for x, slope in zip(places, slopes, strict=True)}
    return values if recording else {path: value.detach() for path, value in values.items()}


def _torch_uncompiled(function: Function, along: Along, xs: Tensors) -> Gradients:
    import torch  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    # Compiled PyTorch code has no second derivative.
    body = torch.compiler.disable(_torch) if torch.compiler.is_compiling() else _torch
    return body(function, along, xs)


def _refuse_cut_graph(value: Any) -> None:
    """Fail if a value is a gradient of a function that can be differentiated only once."""
    pending, seen = [value.grad_fn], {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += [before for before, _ in node.next_functions]
            if type(node).__name__ == "Error":  # which `once_differentiable` leaves
                raise RuntimeError("a function marked with @once_differentiable is in the way")


_BACKENDS = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch_uncompiled}


def has_derivatives() -> bool:
    """Return whether the backend in use can differentiate."""
    return keras.backend.backend() in _BACKENDS


def differentiate(
    function: Callable[[Tensors], Tensors], xs: Tensors, paths: Collection[Path]
) -> Gradients:
    """Return the gradients of sums of results along paths, and all gradients of lower order."""

    def results(xs: Tensors) -> Gradients:
        return {(y,): value for y, value in function(xs).items()}

    derived: Function = results
    for order in range(1, max(map(len, paths))):
        along: Along = {}
        for path in paths:
            if len(path) > order:
                along.setdefault(path[:order], set()).add(path[order])
        derived = functools.partial(_BACKENDS[keras.backend.backend()], derived, along)
    return derived(xs)


def probe(function: Callable[[Tensors], Tensors], xs: Tensors, paths: Collection[Path]) -> None:
    """Fail as `differentiate` would, and leave nothing in the program of the step."""
    # PyTorch runs other functions for tensors without values, so it takes real ones.
    if keras.backend.backend() == "torch":
        with keras.SymbolicScope():
            differentiate(function, xs, paths)
    else:
        output_specs(lambda xs: [*differentiate(function, xs, paths).values()], xs)
