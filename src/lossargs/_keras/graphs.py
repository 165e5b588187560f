"""The graph of a Functional model, and models made like others."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras.src.backend import compute_output_spec
from keras.src.backend.common.global_state import get_global_attribute


def keeps_constructor(model: Any, base: type) -> bool:
    """Return whether a model of this class is constructed as one of the base class is."""
    own = inspect.getfullargspec(type(model).__init__)
    known = inspect.getfullargspec(vars(base)["__init__"])
    return own.args == known.args or bool(own.varargs and own.varkw)


@functools.cache
def _names_that_keras_sets(cls: Any) -> frozenset[str]:
    """Return the attributes of a compiled model of a class of Keras."""
    # Fixed names and initializer: automatic names and seeds of the user's layers do not change.
    x, dense = (
        keras.Input((1,), name="x"),
        keras.layers.Dense(1, name="y", kernel_initializer="zeros"),
    )
    inside: Any = [[x, dense]] if cls is keras.Sequential else [x, dense(x)]
    model = cls(*inside, name="model")
    model.compile("sgd", "mse")
    runs = ("history", "stop_evaluating", "stop_predicting", "_jax_state", "_eval_epoch_iterator")
    names = ("output_names", "_torch_params", "torch_params")  # set later, or kept
    return frozenset([*vars(model), *getattr(model, "_modules", ()), *runs, *names])


def new_like(model: Any, base: type, *args: Any) -> Any:
    """Return a model of the class of another one, made as one of `base` is made of `args`."""
    cls: Any = type(model)
    new: Any = cls.__new__(cls)
    vars(base)["__init__"](new, *args, name=model.name)
    return new


def copy_own_state(model: Any, new: Any, base: type) -> None:
    """Give a model the attributes and weights that another one has besides those of Keras."""
    for variable in own_variables(model):  # also those without an attribute
        new._track_variable(variable)
    given = {**vars(model), **getattr(model, "_modules", {})}
    for name in [name for name in given if name not in _names_that_keras_sets(base)]:
        setattr(new, name, given[name])
    for name in ("autocast", "dtype_policy", "supports_jit"):
        setattr(new, name, getattr(model, name))


def has_producer(tensor: keras.KerasTensor) -> bool:
    """Return whether a symbolic tensor is a `keras.Input` or the result of a layer or operation."""
    return "_keras_history" in vars(tensor)


def producer(tensor: keras.KerasTensor) -> tuple[Any, list[keras.KerasTensor]]:
    """Return the layer or operation that made a symbolic tensor, and its input tensors."""
    operation, node, _ = vars(tensor)["_keras_history"]
    return operation, operation._inbound_nodes[node].input_tensors


def ancestor_calls(
    tensors: Iterable[keras.KerasTensor],
    sources: Callable[[Any], list[Any]] = lambda call: list(call.input_tensors),
) -> list[Any]:
    """Return the nodes of Keras's graph that tensors come from, in the order to call them again.

    The search goes from each node to its `sources`.
    """
    known: set[int] = set()
    calls = []
    pending = [(tensor, False) for tensor in tensors]
    while pending:
        tensor, after_its_sources = pending.pop()
        operation, index, _ = vars(tensor)["_keras_history"]
        call = operation._inbound_nodes[index]
        if after_its_sources:
            calls.append(call)
        elif id(call) not in known:
            known.add(id(call))
            pending += [(tensor, True), *((source, False) for source in sources(call))]
    return calls


def output_specs(function: Callable[[Any], Any], tensors: Any) -> Any:
    """Return what a function returns for tensors of these shapes and dtypes, as symbolic tensors.

    The function receives new symbolic tensors: Keras wrongly marks `tensor * number` as sparse.
    """
    specs = keras.tree.map_structure(lambda one: keras.KerasTensor(one.shape, one.dtype), tensors)
    return compute_output_spec(function, specs)


def ancestors(
    tensors: list[keras.KerasTensor],
) -> tuple[dict[int, keras.KerasTensor], list[keras.Layer]]:
    """Return the inputs, by `id`, and the layers that symbolic tensors are computed from."""
    calls = ancestor_calls(tensors)
    inputs = {id(call.outputs[0]): call.outputs[0] for call in calls if not call.input_tensors}
    operations = {id(call.operation): call.operation for call in calls}
    return inputs, [one for one in operations.values() if isinstance(one, keras.Layer)]


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """Return the weights of a layer, without those of its sublayers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def after_earlier_calls(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a Functional model, some layers of which may have been loaded before.

    The config counts the calls of a layer from the first one in this graph. A layer that another
    graph shares has calls already.
    """
    loaded = get_global_attribute("shared_objects/id_to_obj_map") or {}
    earlier = {
        layer["name"]: len(loaded[layer["shared_object_id"]]._inbound_nodes)
        for layer in config["layers"]
        if layer.get("shared_object_id") in loaded and layer["inbound_nodes"]
    }

    def moved(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: moved(one) for key, one in part.items()}
        if not isinstance(part, list):
            return part
        if len(part) == 3 and isinstance(part[0], str) and part[0] in earlier:
            name, call, place = part
            return [name, call + earlier[name], place]
        return [moved(one) for one in part]

    layers = [{**one, "inbound_nodes": moved(one["inbound_nodes"])} for one in config["layers"]]
    ends = {name: moved(config[name]) for name in ("input_layers", "output_layers")}
    return {**config, "layers": layers, **ends}


def forget_calls(layers: Iterable[keras.Layer], of: type) -> None:
    """Let layers forget which layers of a class were given their outputs.

    Keras notes that, and never reads it.
    """
    for layer in layers:
        kept = [node for node in layer._outbound_nodes if not isinstance(node.operation, of)]
        layer._outbound_nodes[:] = kept
