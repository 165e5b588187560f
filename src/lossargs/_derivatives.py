"""`grad` and `derivatives`: derivatives of symbolic tensors, as symbolic tensors."""

import contextlib
import functools
import itertools
import types
from collections.abc import Iterable
from typing import Any, Self

import keras

from lossargs._autodiff import Path, differentiate, has_derivatives, probe
from lossargs._backends import CHOOSE
from lossargs._errors import ArgumentError, DerivativeError, SavingError, listed
from lossargs._keras import (
    LayerOfOthers,
    Sandbox,
    ancestor_calls,
    ancestors,
    get_keras_mask,
    has_producer,
    in_sharing_scope,
    in_symbolic_scope,
    output_specs,
    set_keras_mask,
)
from lossargs._serialization import reading
from lossargs._values import TensorRef, format_value, map_leaves

_CONFIG = "The config of a Derivatives layer"


def grad(y: keras.KerasTensor, x: keras.KerasTensor) -> keras.KerasTensor:
    """Return the gradient of a symbolic tensor with respect to another, as a symbolic tensor.

    Pass the result to a loss, to another `grad`, or use it as an output of the model. The gradient
    uses the layers of `y`. Layers with state, e.g. `BatchNormalization`, update it once, as if `y`
    were an output.

    Args:
        y: The tensor to differentiate, floating-point, of any shape. The gradient is that of the
            sum of all its elements. For one component, pass `y[:, :1]`.
        x: A `keras.Input`, or a tensor between an input and `y`, floating-point, of any shape. All
            other tensors are held constant.

    Returns:
        The gradient of the sum of `y`, with the shape and dtype of `x`. Row `i` is the gradient of
        sample `i`, unless layers mix the samples of a batch, as batch normalization does.

    Raises:
        DerivativeError: `y` does not depend on `x`, one of them is not floating-point, or the
            backend cannot take the derivative.
        ArgumentError: One of them is not a symbolic tensor.

    Examples:
        The loss of a physics-informed network for the heat equation (Raissi et al., 2019):

        >>> import keras
        >>> from lossargs import attach, grad, with_args
        >>> @with_args
        ... def heat_loss(y_true, y_pred, *, u_t, u_xx):
        ...     return keras.ops.square(y_true - y_pred) + keras.ops.square(u_t - u_xx)
        >>> x, t = keras.Input((1,)), keras.Input((1,))
        >>> hidden = keras.layers.Dense(16, "tanh")(keras.layers.concatenate([x, t]))
        >>> u = keras.layers.Dense(1)(hidden)
        >>> loss = heat_loss(u_t=grad(u, t), u_xx=grad(grad(u, x), x))
        >>> model = keras.Model([x, t], attach(u, loss))
        >>> model.compile("adam", loss=loss)
    """
    return derivatives((y, x))[0]


def derivatives(*wanted: Any) -> list[keras.KerasTensor]:
    """Return several derivatives from one evaluation of the layers that they share.

    Each call of `grad` evaluates the layers again. Compilers remove only some of the repeated
    work. Eager PyTorch removes none. With random layers, e.g. `Dropout`, only the derivatives of
    one call use the same random mask.

    Args:
        *wanted: Tuples `(y, x1, x2, ...)`. `(y, x)` is the gradient of `y` with respect to `x`, and
            `(y, x, t)` is the gradient of that with respect to `t`. A tensor `y` alone returns `y`,
            computed in the same evaluation. All tensors are as for `grad`.

    Returns:
        A list with a symbolic tensor for each argument. A derivative has the shape and dtype of its
        last `x`, and `y` its own.

    Raises:
        DerivativeError: As for `grad`, or one `x` is computed from another.
        ArgumentError: An argument is not a symbolic tensor.

    Examples:
        >>> import keras
        >>> from lossargs import derivatives
        >>> x, t = keras.Input((1,)), keras.Input((1,))
        >>> hidden = keras.layers.Dense(16, "tanh")(keras.layers.concatenate([x, t]))
        >>> u = keras.layers.Dense(1)(hidden)
        >>> u, u_t, u_xx = derivatives(u, (u, t), (u, x, x))
        >>> u_xx.shape
        (None, 1)
    """
    paths = [one if isinstance(one, tuple) else (one,) for one in wanted]
    for tensor in (tensor for path in paths for tensor in path or [None]):
        if not isinstance(tensor, keras.KerasTensor) or not has_producer(tensor):
            raise ArgumentError(
                f"Cannot differentiate {tensor!r}. grad(y, x) takes symbolic tensors: a "
                "keras.Input, and the outputs of layers; derivatives() takes tuples (y, x, ...)."
            )
    if not has_derivatives():
        raise DerivativeError(
            f"Keras's backend {keras.backend.backend()!r} cannot differentiate. Choose another "
            f"one before importing Keras: {CHOOSE.format('jax')}."
        )
    _check(paths)
    return _differentiate(paths) if any(path[1:] for path in paths) else [y for (y,) in paths]


def _distinct(tensors: Iterable[Any]) -> list[Any]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _check(paths: list[tuple[Any, ...]]) -> None:
    """Raise unless tensors are floats, each `y` depends on its `x`, and no `x` on another."""
    for tensor in (tensor for path in paths for tensor in path):
        if not keras.backend.is_float_dtype(tensor.dtype):
            raise DerivativeError(
                f"{format_value(tensor)} is {tensor.dtype}, and derivatives are floating-point. "
                "Write keras.Input(shape, dtype='float32') or keras.ops.cast(y, 'float32'), or "
                "differentiate with respect to the output of a layer such as Embedding."
            )
    xs = _distinct(x for path in paths for x in path[1:])
    for x, other in itertools.permutations(xs, 2):
        if _depends(x, other):
            raise DerivativeError(
                f"{format_value(x)} is computed from {format_value(other)}, and derivatives() "
                "needs independent variables. Write grad(y, x1), grad(y, x2)."
            )
    for y, x in ((y, x) for y, *along in paths for x in along):
        if not _depends(y, x):
            names = listed(tensor.name for tensor in ancestors([y])[0].values())
            raise DerivativeError(
                f"y, {format_value(y)}, is not computed from x, {format_value(x)}, "
                f"but from the inputs {names}: the derivative would be zero. Take the output for "
                "this x: y = network(x), and not network.output."
            )


def _depends(y: Any, x: Any) -> bool:
    calls = ancestor_calls([y], _sources)
    return y is x or any(source is x for call in calls for source in _sources(call))


def _sources(call: Any) -> list[Any]:
    """Return the tensors from which a call computes its results."""
    is_ours = isinstance(call.operation, Derivatives)
    return list(call.arguments.args[0] if is_ours else call.input_tensors)


def _originals(call: Any) -> list[Any]:
    """Return the tensors that a call of `Derivatives` makes the model compute beside it."""
    is_ours = isinstance(call.operation, Derivatives)
    return list(call.arguments.kwargs.get("originals", ())) if is_ours else []


def _differentiate(paths: list[tuple[Any, ...]]) -> list[Any]:
    """Return the derivatives along paths, from a layer that repeats the calls between x and y."""
    xs = _distinct(x for path in paths for x in path[1:])
    ys = _distinct(path[0] for path in paths)
    depends = {id(x) for x in xs}
    calls = []
    for call in ancestor_calls(ys, _sources):
        if any(id(source) in depends for source in _sources(call)):
            calls.append(call)
            depends |= {id(output) for output in call.outputs}
    used = [*ys, *(source for call in calls for source in _sources(call))]
    inputs = [*xs, *_distinct(tensor for tensor in used if id(tensor) not in depends)]
    results = [output for call in calls for output in call.outputs]
    refs = {id(tensor): TensorRef(index) for index, tensor in enumerate([*inputs, *results])}

    def repeated(call: Any) -> Any:
        kwargs = call.arguments.kwargs | ({"originals": []} if _originals(call) else {})
        parts = [call.operation, call.arguments.args, kwargs]
        return map_leaves(parts, lambda leaf: refs.get(id(leaf), leaf))

    layer = Derivatives(
        [repeated(call) for call in calls],
        [tuple(refs[id(tensor)].index for tensor in path) for path in paths],
    )
    originals: list[Any] = []
    if layer.has_state(inputs) or any(_originals(call) for call in calls):
        originals = [one for y in ys for one in _originals(ancestor_calls([y])[-1]) or [y]]
    return list(layer(inputs, originals=_distinct(originals)))


def undifferentiated(tensor: keras.KerasTensor) -> keras.KerasTensor:
    """Return `y` computed by its original layers, if `derivatives` returned it, or the tensor."""
    call = ancestor_calls([tensor])[-1]
    if isinstance(call.operation, Derivatives):
        paths = zip(call.operation.program.paths, call.outputs, strict=True)
        (path,) = (path for path, output in paths if output is tensor)
        if len(path) == 1:
            return call.operation.replay(_sources(call))[path[0]]
    return tensor


@keras.saving.register_keras_serializable(package="lossargs")
class Derivatives(LayerOfOthers):
    """Repeat calls of a graph, and return derivatives of their results.

    The repeated calls change no variables and add no losses. The original calls do. If a layer has
    state, `call` also takes the original results, so that the model computes them.

    Args:
        calls: The layer or operation, arguments and keyword arguments of each call, in order. A
            `TensorRef` represents a tensor: first the inputs of this layer, then the results of
            the calls.
        paths: The derivatives `(y, x, ...)`, by the indices of tensors; each `x` is an input.
        **kwargs: Arguments of `keras.layers.Layer`.
    """

    def __init__(self, calls: list[Any], paths: list[Path], **kwargs: Any) -> None:
        # Each layer inside casts its inputs.
        super().__init__(**{**kwargs, "dtype": keras.config.floatx(), "autocast": False})
        self.supports_masking = True
        operations = _distinct(operation for operation, _, _ in calls)
        if not all(isinstance(one, keras.Operation) for one in operations):
            raise TypeError("'calls' has an object that is not a keras.Operation")
        inner: list[Any] = [one for one in operations if isinstance(one, Derivatives)]
        self.order: int = max(map(len, paths)) - 1 + max((one.order for one in inner), default=0)
        # For Keras to find the layers.
        self.operations: list[Any] = _distinct(
            itertools.chain(operations, *(one.operations for one in inner))
        )
        # In a namespace, because Keras wraps lists among the attributes of a layer.
        self.program = types.SimpleNamespace(calls=calls, paths=paths)
        self._was_called = True  # unless it was loaded: its first call may show that it is damaged
        self._tried_order = 0

    def replay(self, inputs: list[Any], training: bool | None = None) -> dict[int, Any]:
        """Return the inputs and the results of the calls, by their indices."""
        values = dict(enumerate(inputs))

        def value(leaf: Any) -> Any:
            return values[leaf.index] if isinstance(leaf, TensorRef) else leaf

        for operation, args, kwargs in self.program.calls:
            named = map_leaves(kwargs, value)
            if training is not None and "training" in named:
                named["training"] = training  # as a Functional model does
            for result in keras.tree.flatten(operation(*map_leaves(args, value), **named)):
                values[len(values)] = result
        return values

    def has_state(self, inputs: list[Any]) -> bool:
        """Return whether the layers have non-trainable variables or add losses."""
        sandbox = Sandbox(collect_losses=True)

        def replay(inputs: list[Any]) -> list[Any]:
            with sandbox:
                return list(self.replay(inputs).values())

        output_specs(replay, inputs)
        return bool(self.non_trainable_variables or self.metrics_variables or sandbox.losses)

    def call(self, inputs: list[Any], originals: Any = (), training: Any = None) -> list[Any]:  # noqa: ARG002
        """Return the derivatives; a model computes `originals` for the state of their layers."""
        paths = self.program.paths
        order = self.order + bool(training)
        given = dict(enumerate(inputs))
        xs = {x: given[x] for path in paths for x in path[1:]}

        def function(xs: dict[int, Any], state: Any = ()) -> dict[int, Any]:
            for x, tensor in xs.items():
                if (mask := get_keras_mask(given[x])) is not None:
                    set_keras_mask(tensor, mask)
            with Sandbox(state):
                values = self.replay(list((given | xs).values()), training)
            return {path[0]: values[path[0]] for path in paths}

        try:
            gradients = differentiate(function, xs, paths)
            if order > self._tried_order and not in_symbolic_scope():
                # The probe runs in a new scope, so pass the current values.
                state = [(variable, variable.value) for variable in self.variables]
                tried = [(*path, path[-1]) if training else path for path in paths if path[1:]]
                probe(functools.partial(function, state=state), xs, tried)
                self._tried_order = order
        except Exception as error:
            function(xs)  # an error without derivatives is the layer's own
            layers = (one for one in self.operations if not isinstance(one, Derivatives))
            backend = keras.backend.backend()
            raise DerivativeError(
                f"{backend} cannot take a derivative of order {order}"
                f"{', which training needs,' if training else ''} through "
                f"{listed(one.name for one in layers)}: {error} ({type(error).__name__}). "
                "Replace the layer, or choose another backend before importing Keras: "
                f"{CHOOSE.format('torch' if backend == 'jax' else 'jax')}."
            ) from error
        return [gradients[path] for path in paths]

    def compute_output_spec(self, inputs: Any, originals: Any = (), **kwargs: Any) -> Any:  # noqa: ARG002
        with contextlib.nullcontext() if self._was_called else reading(_CONFIG):
            specs = output_specs(functools.partial(self.call, **kwargs), inputs)
        self._was_called = True
        return specs

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Return no mask."""

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **vars(self.program), "shared": in_sharing_scope()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        if not config.pop("shared", True):
            raise SavingError(
                "Cannot clone a model with derivatives: the copy would not share its layers. Write "
                "copy.deepcopy(model), or save and load the model."
            )
        with reading(_CONFIG):
            program = {name: config[name] for name in ("calls", "paths")}
            program = keras.saving.deserialize_keras_object(program)
            program["paths"] = [tuple(path) for path in program["paths"]]
            layer = cls(**{**config, **program})
        layer._was_called = False
        return layer
