"""Derivatives inside a step, by the backend in use: one body for each.

The only module that names a backend; each is imported when its body runs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import keras

from lossargs._keras import compute_output_spec, in_symbolic_scope

# A derivative: the index of a result of a function, and the indices of the arguments to
# differentiate along, one after another.
Path = tuple[int, tuple[int, ...]]
Function = Callable[[list[Any]], list[Any]]
Values = dict[Path, Any]


def _plan(paths: Iterable[Path]) -> dict[Path, list[int]]:
    """Return what to differentiate, lower orders first, and along which arguments each."""
    plan: dict[Path, list[int]] = {}
    steps = {(k, y, path[:k], path[k]) for y, path in paths for k in range(len(path))}
    for _, y, path, x in sorted(steps):
        plan.setdefault((y, path), []).append(x)
    return plan


def _tensorflow(function: Function, xs: list[Any], paths: list[Path]) -> Values:
    import tensorflow as tf  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    plan = _plan(paths)
    xs = [tf.identity(x) for x in xs]  # two of them may be one tensor

    def up_to(order: int) -> Values:
        if order == 0:
            return {(place, ()): y for place, y in enumerate(function(xs))}
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(xs)
            values = up_to(order - 1)
        for (y, path), along in plan.items():
            if len(path) == order - 1:
                sources, zero = [xs[x] for x in along], tf.UnconnectedGradients.ZERO
                slopes = tape.gradient(values[y, path], sources, unconnected_gradients=zero)
                for x, slope in zip(along, slopes, strict=True):
                    values[y, (*path, x)] = tf.convert_to_tensor(slope)
        return values

    return up_to(max(len(path) for _, path in paths))


def _jax(function: Function, xs: list[Any], paths: list[Path]) -> Values:
    import jax  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    plan = _plan(paths)

    def up_to(order: int) -> Callable[[list[Any]], Values]:
        if order == 0:
            return lambda xs: {(place, ()): y for place, y in enumerate(function(xs))}

        def value(xs: list[Any]) -> Values:
            # As `jax.vjp`, but what all derivatives need is computed, and differentiated, once.
            values: Values
            values, push_forward = jax.linearize(up_to(order - 1), xs)
            for (y, path), along in plan.items():
                if len(path) == order - 1:

                    def push_this(dxs: list[Any], of: Path = (y, path)) -> Any:
                        return push_forward(dxs)[of]

                    pull_back = jax.linear_transpose(push_this, xs)
                    (slopes,) = pull_back(keras.ops.ones_like(values[y, path]))
                    values |= {(y, (*path, x)): slopes[x] for x in along}
            return values

        return value

    return up_to(max(len(path) for _, path in paths))(xs)


def _torch(
    function: Function, xs: list[Any], paths: list[Path], *, probing: bool = False
) -> Values:
    import torch  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    plan = _plan(paths)
    recording = torch.is_grad_enabled()
    careful = probing or in_symbolic_scope()
    with torch.enable_grad():  # also when evaluating
        # Two of them may be one tensor.
        xs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in xs]
        values: Values = {(place, ()): y for place, y in enumerate(function(xs))}
        for (y, path), along in plan.items():
            value, sources = values[y, path], [xs[x] for x in along]
            slopes: Any = [None] * len(along)
            if value.requires_grad:
                slopes = torch.autograd.grad(
                    value,
                    sources,
                    # With a gradient, a function that is differentiable only once shows itself.
                    torch.ones_like(value, requires_grad=careful),
                    create_graph=recording or any((y, (*path, x)) in plan for x in along),
                    retain_graph=True,
                    allow_unused=True,
                )
                if careful and any(slope is None for slope in slopes):
                    _refuse_cut_graph(value)
            for x, source, slope in zip(along, sources, slopes, strict=True):
                values[y, (*path, x)] = torch.zeros_like(source) if slope is None else slope
    if not recording:
        values = {path: value.detach() for path, value in values.items()}
    return values


def _refuse_cut_graph(value: Any) -> None:
    """Fail if a zero derivative may be due to a function that can be differentiated only once."""
    pending, seen = [value.grad_fn], {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += [before for before, _ in node.next_functions]
            if type(node).__name__ == "Error":  # which `once_differentiable` leaves
                raise RuntimeError("a function marked with @once_differentiable is in the way")


def _torch_uncompiled(
    function: Function, xs: list[Any], paths: list[Path], *, probing: bool = False
) -> Values:
    import torch  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

    # What `torch.compile` makes has no second derivative.
    body = torch.compiler.disable(_torch) if torch.compiler.is_compiling() else _torch
    return body(function, xs, paths, probing=probing)


_BODIES = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch_uncompiled}


def has_derivatives() -> bool:
    """Return whether the backend in use can differentiate."""
    return keras.backend.backend() in _BODIES


def differentiate(function: Function, xs: list[Any], paths: list[Path]) -> Values:
    """Return gradients of sums of the results of a function by their paths, and maybe others."""
    return _BODIES[keras.backend.backend()](function, xs, paths)


def probe(function: Function, xs: list[Any], paths: list[Path]) -> None:
    """Fail as `differentiate` would, and leave nothing in the program of the step."""
    if keras.backend.backend() == "torch":
        _torch_uncompiled(function, xs, paths, probing=True)
        return
    specs = [keras.KerasTensor(x.shape, x.dtype) for x in xs]
    compute_output_spec(lambda xs: [*differentiate(function, xs, paths).values()], specs)
