"""`grad` and `derivatives`: derivatives of symbolic tensors, as symbolic tensors."""

import types
from collections.abc import Iterable
from typing import Any, Self

import keras

from lossargs._autodiff import Path, differentiate, has_derivatives, probe
from lossargs._errors import ArgumentError, DerivativeError, SavingError, listed
from lossargs._keras import (
    LayerOfOthers,
    Sandbox,
    ancestor_calls,
    ancestors,
    compute_output_spec,
    get_keras_mask,
    in_sharing_scope,
    set_keras_mask,
)
from lossargs._serialization import checked, damaged, reading
from lossargs._values import TensorRef, format_value, map_leaves


def grad(y: keras.KerasTensor, x: keras.KerasTensor) -> keras.KerasTensor:
    """Return the gradient of a symbolic tensor with respect to another, as a symbolic tensor.

    Pass the result to a loss, to another `grad`, or use it as an output of the model. It shares the
    layers of `y`. Their state changes as with the output `y`.

    Args:
        y: The tensor to differentiate, floating-point, of any shape. It is summed over all axes but
            the batch. For one component, pass `y[:, :1]`.
        x: A `keras.Input`, or a tensor between an input and `y`, floating-point. Other tensors
            that `y` depends on are constant.

    Returns:
        The gradient of the sum of `y`, with the shape and dtype of `x`. Each sample has its own
        gradient, unless layers mix the samples of a batch, as batch normalization does.

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

    Each call of `grad` evaluates the layers again. Compilers merge only a part of that, and eager
    PyTorch nothing. If layers are random, only derivatives of one call have the same draw.

    Args:
        *wanted: Tuples `(y, x1, x2, ...)`. `(y, x)` is the gradient of `y` along `x`, and
            `(y, x, t)` is the gradient of that along `t`. A tensor `y` alone is returned with the
            same draw. All tensors are as for `grad`.

    Returns:
        A symbolic tensor for each.

    Raises:
        DerivativeError: As for `grad`; or a tensor to differentiate along depends on another one.
        ArgumentError: An argument is not a symbolic tensor.

    Examples:
        >>> import keras
        >>> from lossargs import derivatives
        >>> x, t = keras.Input((1,)), keras.Input((1,))
        >>> hidden = keras.layers.Dense(16, "tanh")(keras.layers.concatenate([x, t]))
        >>> u = keras.layers.Dense(1)(hidden)
        >>> u, u_t, u_xx = derivatives(u, (u, t), (u, x, x))
    """
    paths = [one if isinstance(one, tuple) else (one,) for one in wanted]
    for tensor in (tensor for path in paths for tensor in (path or [None])):
        if not isinstance(tensor, keras.KerasTensor):
            raise ArgumentError(
                f"Cannot differentiate {tensor!r}. grad(y, x) takes symbolic tensors: a "
                "keras.Input, and the outputs of layers; derivatives() takes tuples (y, x, ...)."
            )
    if not has_derivatives():
        raise DerivativeError(
            f"Keras's backend {keras.backend.backend()!r} cannot differentiate. Set KERAS_BACKEND "
            "to 'tensorflow', 'jax' or 'torch'."
        )
    ys = _distinct(path[0] for path in paths)
    xs = _distinct(x for path in paths for x in path[1:])
    _check(paths, ys, xs)
    if not xs:
        return [y for (y,) in paths]
    x_place, y_place = ({id(one): i for i, one in enumerate(ones)} for ones in (xs, ys))
    by_place = [(y_place[id(y)], tuple(x_place[id(x)] for x in along)) for y, *along in paths]
    return _apply_between(xs, ys, by_place)


def _distinct(tensors: Iterable[Any]) -> list[Any]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _check(paths: list[tuple[Any, ...]], ys: list[Any], xs: list[Any]) -> None:
    for tensor in (*ys, *xs):
        if not keras.backend.is_float_dtype(tensor.dtype):
            raise DerivativeError(
                f"{format_value(tensor)} is {tensor.dtype}, and derivatives are floating-point. "
                "Write keras.Input(shape, dtype='float32'), or differentiate along the output of a "
                "layer such as Embedding."
            )
    for x in xs:
        others = [other for other in xs if other is not x]
        for other in others:
            if _depends(x, other, others):
                raise DerivativeError(
                    f"{format_value(x)} is computed from {format_value(other)}, and derivatives() "
                    "needs independent variables. Take them one after another, by grad()."
                )
    for y, x in ((y, x) for y, *along in paths for x in along):
        if y is not x and not _depends(y, x):
            names = listed(tensor.name for tensor in ancestors([y])[0].values())
            raise DerivativeError(
                f"y, {format_value(y)}, is not computed from x, {format_value(x)}, "
                f"but from the inputs {names}: the derivative would be zero. Take the output of "
                "the network for this x, y = network(x), and not network.output."
            )


def _depends(y: Any, x: Any, until: Iterable[Any] = ()) -> bool:
    return any(given is x for call in _calls([y], until) for given in _given(call))


def _given(call: Any) -> list[Any]:
    """Return the tensors that the results of a call are computed from."""
    derivatives = isinstance(call.operation, Derivatives)
    return list(call.arguments.args[0] if derivatives else call.input_tensors)


def _calls(ys: list[Any], until: Iterable[Any] = ()) -> list[Any]:
    """Return the calls that `ys` are computed from, without those only for `evaluated`."""
    needed = {id(y) for y in ys}
    calls = []
    for call in reversed(ancestor_calls(ys, until)):
        if any(id(output) in needed for output in call.outputs):
            needed |= {id(given) for given in _given(call)}
            calls.append(call)
    return calls[::-1]


def _evaluated(ys: list[Any]) -> list[Any]:
    """Return tensors whose computation calls each layer of `ys` as in the plain network."""
    tensors: list[Any] = []
    for y in ys:
        call = ancestor_calls([y])[-1]
        derived = isinstance(call.operation, Derivatives)
        tensors += call.arguments.kwargs.get("evaluated", []) if derived else [y]
    return _distinct(tensors)


def _apply_between(xs: list[Any], ys: list[Any], paths: list[Path]) -> list[Any]:
    """Return the derivatives along paths, by a new layer."""
    depends = {id(x) for x in xs}
    between = []
    for call in _calls(ys, until=xs):
        if any(id(given) in depends for given in _given(call)):
            between.append(call)
            depends |= {id(output) for output in call.outputs}
    given = [tensor for call in between for tensor in _given(call)]
    fixed = _distinct(tensor for tensor in (*given, *ys) if id(tensor) not in depends)
    inputs = [*xs, *fixed]
    made = [tensor for call in between for tensor in call.outputs]
    # An `x` that is made on the way, beside another result of its layer, is still the one given.
    slots = {id(tensor): TensorRef(place) for place, tensor in enumerate([*inputs, *made])}
    slots |= {id(tensor): TensorRef(place) for place, tensor in enumerate(inputs)}

    def slot(leaf: Any) -> Any:  # `None` for what is `evaluated` beside derivatives
        return slots.get(id(leaf)) if isinstance(leaf, keras.KerasTensor) else leaf

    operations = _distinct(call.operation for call in between)
    place = {id(operation): place for place, operation in enumerate(operations)}
    calls = [
        (
            place[id(c.operation)],
            map_leaves(c.arguments.args, slot),
            map_leaves(c.arguments.kwargs, slot),
        )
        for c in between
    ]
    results = [slots[id(y)].index for y in ys]
    layer = Derivatives(operations, calls, results, len(xs), paths)
    # As inputs, the original results are computed once by each model that has this layer.
    return list(layer(inputs, evaluated=_evaluated(ys) if layer.has_state(inputs) else []))


def undifferentiated(tensor: keras.KerasTensor) -> keras.KerasTensor:
    """Return the original of a tensor `y` that `derivatives` returned, and others as they are."""
    call = ancestor_calls([tensor])[-1]
    if not isinstance(call.operation, Derivatives):
        return tensor
    y, path = call.operation.program.paths[
        [id(output) for output in call.outputs].index(id(tensor))
    ]
    return tensor if path else call.operation.replay(_given(call))[y]


def _without_history(tensors: list[Any]) -> list[keras.KerasTensor]:
    # Keras calls the product of a tensor and a number sparse, which it is not.
    return [keras.KerasTensor(one.shape, one.dtype) for one in tensors]


_LISTS = ("operations", "calls", "results", "paths")


@keras.saving.register_keras_serializable(package="lossargs")
class Derivatives(LayerOfOthers):
    """Calls layers again, as they were called in a graph, and returns derivatives of the results.

    These calls change no variables and add no losses. The original calls do, in the same model.

    Args:
        operations: The layers and operations.
        calls: The calls in order: the place of the operation, arguments, keyword arguments. A
            `TensorRef` represents a tensor: first the inputs of this layer, then the
            results of calls.
        results: The slots of the tensors to differentiate.
        along: The number of inputs, the first ones, to differentiate along.
        paths: The derivatives, by places among results and inputs.
        **kwargs: Those of `keras.layers.Layer`.
    """

    def __init__(
        self,
        operations: list[Any],
        calls: list[Any],
        results: list[int],
        along: int,
        paths: list[Path],
        **kwargs: Any,
    ) -> None:
        # Each layer inside casts its inputs.
        super().__init__(**{**kwargs, "dtype": keras.config.floatx(), "autocast": False})
        self.supports_masking = True
        self.operations = operations  # for Keras to find the layers
        # In a namespace, for Keras not to wrap the lists for tracking.
        self.program = types.SimpleNamespace(calls=calls, results=results, along=along, paths=paths)
        self._trainable_checked = False

    def replay(self, values: list[Any], training: bool | None = None) -> list[Any]:
        """Return the tensors to differentiate, computed from the inputs of this layer."""
        values = list(values)

        def value(place: int) -> Any:
            if place >= len(values):  # Keras takes an IndexError for a layer not yet called
                raise damaged("The config of a Derivatives layer", f"there is no value {place}")
            return values[place]

        def filled(leaf: Any) -> Any:
            return value(leaf.index) if isinstance(leaf, TensorRef) else leaf

        for place, args, kwargs in self.program.calls:
            named = map_leaves(kwargs, filled)
            if training is not None and "training" in named:
                named["training"] = training  # as a Functional model does
            results = self.operations[place](*map_leaves(args, filled), **named)
            values += [results] if keras.ops.is_tensor(results) else keras.tree.flatten(results)
        return [value(place) for place in self.program.results]

    def has_state(self, inputs: list[Any]) -> bool:
        """Return whether the layers have non-trainable variables or add losses."""
        sandbox = Sandbox(collect_losses=True)

        def replay(inputs: list[Any]) -> list[Any]:
            with sandbox:
                return self.replay(inputs)

        compute_output_spec(replay, _without_history(inputs))
        return bool(self.non_trainable_variables or self.metrics_variables or sandbox.losses)

    def call(self, inputs: list[Any], evaluated: Any = (), training: Any = None) -> list[Any]:  # noqa: ARG002
        """Return the derivatives; `evaluated` only makes the model compute the original results."""
        along, paths = self.program.along, self.program.paths
        xs, fixed = inputs[:along], inputs[along:]
        masks = [get_keras_mask(x) for x in xs]
        state: list[Any] = []

        def function(xs: list[Any]) -> list[Any]:
            for x, mask in zip(xs, masks, strict=True):
                if mask is not None:
                    set_keras_mask(x, mask)
            with Sandbox(state):
                return self.replay([*xs, *fixed], training)

        try:
            values = differentiate(function, xs, paths)
            if training and not self._trainable_checked:
                state += [(v, v.value) for v in self.variables]  # a probe reads none around it
                probe(function, xs, [(y, (*path, path[-1])) for y, path in paths if path])
                self._trainable_checked = True
        except Exception as error:
            function(xs)  # an error without derivatives is the layer's own
            names = listed(one.name for one in self.operations)
            # The order that the loss reads was tried when this layer was put into the graph.
            order = max(len(path) for _, path in paths) + bool(training)
            raise DerivativeError(
                f"{keras.backend.backend()} cannot take a derivative of order {order}"
                f"{', which training needs,' if training else ''} through {names}: {error} "
                f"({type(error).__name__}). Use other layers, or another backend."
            ) from error
        return [values[path] for path in paths]

    def compute_output_spec(self, inputs: Any, evaluated: Any = (), **kwargs: Any) -> Any:  # noqa: ARG002
        return compute_output_spec(self.call, _without_history(inputs), **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Return no mask."""

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **vars(self.program),
            "operations": list(self.operations),
            "shared": in_sharing_scope(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        config = dict(config)
        if not config.pop("shared", True):
            raise SavingError(
                "A model with derivatives cannot be made again from its config alone, as "
                "clone_model does: its layers would not be shared. Save and load it, or use "
                "copy.deepcopy(model)."
            )
        with reading("The config of a Derivatives layer"):
            lists = {name: checked(config, name, list) for name in _LISTS}
            program = keras.saving.deserialize_keras_object(lists)
            program["paths"] = [(y, tuple(path)) for y, path in program["paths"]]
            program["along"] = checked(config, "along", int)
            _check_program(**program)
            return cls(**{**config, **program})


def _check_program(
    operations: list[Any], calls: list[Any], results: list[Any], along: int, paths: list[Any]
) -> None:
    """Raise for a saved program that would take a value from a place where there is none."""
    if not all(isinstance(one, keras.Operation) for one in operations):
        raise TypeError("one of its operations is no layer")
    slots = list(results)

    def look(leaf: Any) -> None:
        slots.extend([leaf.index] if isinstance(leaf, TensorRef) else [])

    for _, args, kwargs in calls:
        map_leaves([list.copy(args), dict.copy(kwargs)], look)
    sizes = [(one, len(operations)) for one, _, _ in calls] + [(y, len(results)) for y, _ in paths]
    sizes += [(x, along) for _, path in paths for x in path]
    sizes += [(slot, 2**31) for slot in slots]  # more is known in a step
    if not all(type(place) is int and place in range(size) for place, size in sizes):
        raise ValueError("it names a place that does not exist")
    if not any(path for _, path in paths):
        raise ValueError("there are no derivatives")
