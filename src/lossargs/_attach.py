"""`attach` and `detach`: add the layer of live arguments to a model, and remove it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import keras

from lossargs._adapters import refer_to_owners
from lossargs._derivatives import undifferentiated
from lossargs._errors import AttachError, listed, nearest
from lossargs._keras import (
    Functional,
    ancestors,
    copy_own_state,
    keeps_constructor,
    new_like,
    own_variables,
    producer,
)
from lossargs._layer import LossArgs
from lossargs._live import Adapter, Untracked, layers_of
from lossargs._logs import LiveArg, names_of, output_names_of
from lossargs._loss import BoundLoss, check_is_bound
from lossargs._serialization import reading

Target = TypeVar("Target")
_KEPT = "_lossargs_kept"


@keras.saving.register_keras_serializable(package="lossargs")
class AttachedModel(keras.Model):
    """A Functional model whose outputs keep the names that they had before `attach`.

    Keras names the outputs in a list after their layers, which are all `LossArgs`.
    """

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs in `compile` and in the logs."""
        return _names(self.outputs)

    @output_names.setter
    def output_names(self, names: list[str]) -> None:
        """Ignore the names of the layers, which Keras sets."""

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        with reading("The config of a model with live arguments"):
            return super().from_config(config, custom_objects)


def attach(target: Target, loss: Any, *, track: Any = ()) -> Target:
    """Attach a loss to a model, which then holds the live arguments of the loss.

    Args:
        target: A Functional or Sequential model; or the symbolic output of a model that is not
            made yet, or a list or dict of outputs.
        loss: The bound loss that `compile` is given as well. For several outputs a list or dict, as
            for `compile`; other losses in it are left to `compile`.
        track: Further bound losses, logged under their names. For several outputs a list or dict.

    Returns:
        The same kind as `target`, with the same layers, predictions, weights and attributes. New
        `keras.Input`s that an argument is computed from follow the inputs of the model. A
        Sequential model becomes a Functional one if the loss reads tensors. An earlier `attach` is
        replaced. Schedules continue at their positions.

    Raises:
        AttachError: The loss was not made by a factory, an argument is a tensor of another
            model, two things would be logged under one name, or the class of the model has a
            constructor of its own.

    Examples:
        >>> import keras
        >>> from lossargs import attach, with_args
        >>> @with_args
        ... def scaled(y_true, y_pred, scale):
        ...     return scale * keras.losses.mean_squared_error(y_true, y_pred)
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> loss = scaled(scale=keras.Variable(0.5, trainable=False, name="scale"))
        >>> model = attach(model, loss)
        >>> model.compile("adam", loss=loss)
    """
    attached: Any
    if isinstance(target, keras.Sequential):
        attached = _attach_sequential(target, loss, track)
    elif isinstance(target, Functional):
        attached = _attach_functional(target, loss, track)
    elif isinstance(target, keras.Model):
        raise AttachError(
            f"attach() cannot add a layer to {_described(target)}, whose outputs are what its "
            "`call` returns. Make a layer in its __init__, self.loss_args = LossArgs(loss), and "
            "return self.loss_args(y_pred) in its `call`, with tensors by name: "
            "self.loss_args(y_pred, z_mean=z_mean)."
        )
    else:
        attached, layers = _attach_tensors(target, loss, track, {})
        names_of(layers, outputs=layers, by_layer=False)
    return cast(Target, attached)


def detach(model: keras.Model) -> keras.Model:
    """Return the model without `LossArgs`, and without the inputs that only the loss needs.

    Args:
        model: A Functional or Sequential model.

    Returns:
        A model of the same layers, not compiled; the same model if nothing is attached. Outputs of
        `derivatives` are computed without derivatives.

    Raises:
        AttachError: The model is subclassed, or the layer is in a model that is one of its layers.

    Examples:
        >>> import keras
        >>> from lossargs import attach, detach, with_args
        >>> huber = with_args(keras.losses.huber)
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> loss = huber(delta=keras.Variable(1.0, trainable=False))
        >>> [layer.name for layer in detach(attach(model, loss)).layers] == [model.layers[0].name]
        True
    """
    if not layers_of(model):
        return model
    detached: Any
    if isinstance(model, keras.Sequential):
        layers = [layer for layer in model.layers if not isinstance(layer, LossArgs)]
        detached = _sequential(model, layers)
    elif isinstance(model, Functional):
        outputs = keras.tree.map_structure(lambda y: undifferentiated(_before(y)), model.output)
        used, _ = ancestors(keras.tree.flatten(outputs))
        detached = _functional(
            model, _inputs_without(model, _loss_inputs(model) - used.keys()), outputs
        )
    else:
        raise AttachError(
            f"detach() cannot take the layer out of {_described(model)}, whose outputs are what "
            "its `call` returns. LossArgs leaves predictions as they are: `predict` and `export` "
            "work with it."
        )
    if layers_of(detached):
        inner = [layer.name for layer in detached.layers if layers_of(layer)]
        raise AttachError(
            f"The layers {listed(inner)} of {model.name!r} are attached models themselves. Detach "
            "them before they become layers of another model."
        )
    return _remember(detached, _kept_by(model))


def _loss_inputs(model: Any) -> set[int]:
    """Return the ids of the inputs that a model has for its losses."""
    found: set[int] = set()
    for output in keras.tree.flatten(model.output):
        layer, given = producer(output)
        if isinstance(layer, LossArgs):
            read, _ = ancestors(given[1:])
            new = layer.new_inputs
            found |= {k for k, one in read.items() if new is None or producer(one)[0].name in new}
    return found


def _inputs_without(model: Any, dropped: set[int]) -> Any:
    """Return the inputs of a model, in their structure, without some."""
    if isinstance(model.input, dict):
        return {name: one for name, one in model.input.items() if id(one) not in dropped}
    if not dropped:
        return model.input
    kept = [tensor for tensor in model.inputs if id(tensor) not in dropped]
    return kept[0] if len(kept) == 1 else kept


def _remember(model: Any, adapters: dict[Any, Adapter]) -> Any:
    """Return the model, which keeps these adapters for the next `attach`."""
    setattr(model, _KEPT, Untracked(adapters))
    return model


def _kept_by(model: Any) -> dict[Any, Adapter]:
    """Return the adapters that a model holds or keeps, by the keys of their values."""
    kept: dict[Any, Adapter] = getattr(model, _KEPT, Untracked({})).value
    return kept | {k: a for one in layers_of(model) for k, a in one.adapters_by_key().items()}


def live_args(model: keras.Model) -> dict[str, keras.Variable]:
    """Return the variables that the losses of a model take as arguments.

    Args:
        model: Any model, also one that was loaded.

    Returns:
        The `keras.Variable`s by their names in the logs.

    Examples:
        >>> import keras
        >>> from lossargs import attach, live_args, with_args
        >>> huber = with_args(keras.losses.huber)
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> delta = keras.Variable(1.0, trainable=False)
        >>> live_args(attach(model, huber(delta=delta)))["delta"] is delta
        True
    """
    named = names_of(layers_of(model), outputs=output_names_of(model))
    variables = {name: one.adapter.variable for name, one in named if isinstance(one, LiveArg)}
    return {name: variable for name, variable in variables.items() if variable is not None}


def _before(output: keras.KerasTensor) -> keras.KerasTensor:
    """Return an output without the layers that `attach` added."""
    operation, given = producer(output)
    return _before(given[0]) if isinstance(operation, LossArgs) else output


def _attach_tensor(output: Any, loss: BoundLoss, track: Any, kept: dict[Any, Adapter]) -> Any:
    if not isinstance(output, keras.KerasTensor):
        raise AttachError(
            f"attach() takes a model, or the symbolic tensor that is its output, and was given "
            f"{output!r}."
        )
    replaced, given = producer(output)
    if isinstance(replaced, LossArgs):
        for adapter, tensor in zip(replaced.readers(), given[1:], strict=False):
            adapter.tensor = tensor
        kept = kept | replaced.adapters_by_key()
    layer = LossArgs(loss, track=[track] if isinstance(track, BoundLoss) else track, kept=kept)
    tensors = [adapter.tensor for adapter in layer.readers()]
    output = _before(output)
    _, layers = ancestors([output, *(t for t in tensors if t is not None)])
    refer_to_owners(layer.adapters, layers)
    return (layer(output, tensors) if tensors else layer(output)), layer


def _attach_tensors(
    outputs: Any, loss: Any, track: Any, kept: dict[Any, Adapter]
) -> tuple[Any, dict[LossArgs, str]]:
    """Return the outputs with layers behind those that have a bound loss, and these layers.

    With the layers come the names of their outputs, if there are several.
    """
    if not isinstance(outputs, (Mapping, list, tuple)):
        check_is_bound(loss)
        attached, layer = _attach_tensor(outputs, loss, track, kept)
        return attached, {layer: ""}
    by_name = dict(outputs) if isinstance(outputs, Mapping) else None
    names = list(by_name) if by_name is not None else _names(outputs)
    tensors = list(by_name.values()) if by_name is not None else list(outputs)
    is_one = not isinstance(loss, (list, tuple))
    losses = _by_output(loss, names, "loss", is_one=is_one)
    tracks = _by_output(track or (), names, "track", is_one=not track)
    if not any(isinstance(one, BoundLoss) for one in losses):
        check_is_bound(next((one for one in losses if one is not None), None))
    layers = {}
    for place, (tensor, one, tracked) in enumerate(zip(tensors, losses, tracks, strict=True)):
        if isinstance(one, BoundLoss):
            tensors[place], layer = _attach_tensor(tensor, one, tracked or (), kept)
            layers[layer] = names[place] if len(names) > 1 else ""
        else:
            tensors[place] = _before(tensor)
            if tracked:
                check_is_bound(one)
    if by_name is not None:
        return dict(zip(names, tensors, strict=True)), layers
    return (tuple if isinstance(outputs, tuple) else list)(tensors), layers


def _names(outputs: Any) -> list[str]:
    """Return the names of the outputs in a list, as they were before losses were attached."""
    return [producer(_before(output))[0].name for output in outputs]


def _by_output(given: Any, names: Sequence[str], what: str, *, is_one: bool) -> list[Any]:
    """Return what was given for each output: by name, in order, or one for all."""
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise AttachError(
                    f"attach({what}=...) names the output {name!r}, and there are {listed(names)}."
                    f"{nearest(name, names)}"
                )
        return [given.get(name) for name in names]
    if is_one:
        return [given] * len(names)
    is_nested = what == "loss" or all(isinstance(one, (list, tuple)) for one in given)
    if not is_nested or len(given) != len(names):
        raise AttachError(
            f"attach({what}=...) was given {given!r} for the outputs {listed(names)}. Give a dict, "
            f"{{{names[0]!r}: ...}}, or a list with one entry for each."
        )
    return list(given)


def _attach_functional(model: Any, loss: Any, track: Any) -> Any:
    outputs, layers = _attach_tensors(model.output, loss, track, _kept_by(model))
    names_of(layers, outputs=layers, by_layer=False)
    new: dict[int, Any] = {}
    for one in (one for layer in layers for one in layer.get_live()):
        if isinstance(one.adapter.tensor, keras.KerasTensor):
            sources, _ = ancestors([one.adapter.tensor])
            _refuse_inputs_of_layers(one, sources, model)
            new |= sources
    known = {id(tensor) for tensor in model.inputs}
    extra = [tensor for key, tensor in new.items() if key not in known]
    before = _loss_inputs(model)
    added = [*extra, *(tensor for tensor in model.inputs if id(tensor) in before)]
    for layer in layers:
        layer.new_inputs = tuple(producer(tensor)[0].name for tensor in added)
    inputs = model.input
    if extra and isinstance(inputs, dict):
        for tensor in extra:
            tensor.name = producer(tensor)[0].name  # the key, also when the model is loaded
        inputs = {**inputs, **{tensor.name: tensor for tensor in extra}}
    elif extra:
        inputs = [*(inputs if isinstance(inputs, (list, tuple)) else [inputs]), *extra]
    attached = _functional(model, inputs, outputs)
    if list(attached.output_names) != list(model.output_names):
        attached.output_names = list(model.output_names)
        for layer in layers if isinstance(outputs, (list, tuple)) else []:
            layer.unsaved = (
                "its outputs are a list, whose names a model of its class would lose. Give it a "
                "dict of outputs, keras.Model(inputs, {name: output})."
            )
    _refuse_saving_own_weights(attached, layers)
    return _remember(attached, _kept_by(model))


def _refuse_saving_own_weights(model: Any, layers: Iterable[LossArgs]) -> None:
    own = {id(variable) for variable in own_variables(model)}
    for layer in layers:
        for one in layer.get_live():
            if id(one.adapter.variable) in own:
                layer.unsaved = (
                    f"{one.label!r} is a weight of the model itself, and would load as two "
                    "variables. Make it a weight of a layer."
                )


def _refuse_inputs_of_layers(one: Any, sources: dict[int, Any], model: Any) -> None:
    """Raise if an argument is a tensor of a model that is a layer of this one, from within it."""
    known = {id(tensor) for tensor in model.inputs}
    for layer in model.layers:
        for tensor in getattr(layer, "inputs", None) or ():
            if id(tensor) in sources and id(tensor) not in known:
                raise AttachError(
                    f"{one.label!r} of {one.loss!r} is a tensor of another graph: it is "
                    f"computed from the input {tensor.name!r}, which {model.name!r} does not "
                    "have. Take the tensor that a layer gave in this model: of a model used as a "
                    "layer, what it was called with gives z = encoder(x), and not encoder.output."
                )


def _functional(model: Any, inputs: Any, outputs: Any) -> Any:
    """Return a model of the same class, with the same state, on these inputs and outputs."""
    if type(model) in (Functional, AttachedModel):
        flat = keras.tree.flatten(outputs)
        is_attached = any(isinstance(producer(output)[0], LossArgs) for output in flat)
        cls = AttachedModel if is_attached else Functional
        new = cls(inputs, outputs, name=model.name)
    elif keeps_constructor(model, Functional):
        new = new_like(model, Functional, inputs, outputs)
    else:
        raise AttachError(
            f"{_described(model)} has an __init__ of its own, so that attach() and detach() cannot "
            "make another one of it. Build it with the layer in it: "
            "super().__init__(inputs, attach(y_pred, loss)); or, in a model with a `call`, "
            "self.loss_args = LossArgs(loss)."
        )
    copy_own_state(model, new, Functional)
    return new


def _attach_sequential(model: Any, loss: Any, track: Any) -> Any:
    check_is_bound(loss)
    kept = _kept_by(model)
    layer = LossArgs(loss, track=[track] if isinstance(track, BoundLoss) else track, kept=kept)
    if not layer.readers():
        layers = [one for one in model.layers if not isinstance(one, LossArgs)]
        names_of([layer], by_layer=False)
        refer_to_owners(layer.adapters, layers)
        attached = _sequential(model, [*layers, layer])
        _refuse_saving_own_weights(attached, [layer])
        return _remember(attached, kept)
    if type(model) is not keras.Sequential or not model.built:
        raise AttachError(
            f"{loss!r} reads tensors, which makes {model.name!r} a Functional model. Make it one "
            "first, keras.Model(model.inputs, model.outputs), once it has a keras.Input."
        )
    functional = Functional(model.inputs[0], model.outputs[0], name=model.name)
    copy_own_state(model, functional, keras.Sequential)
    return _attach_functional(_remember(functional, kept), loss, track)


def _sequential(model: Any, layers: list[Any]) -> Any:
    if not keeps_constructor(model, keras.Sequential):
        raise AttachError(
            f"{_described(model)} has an __init__ of its own, so that attach() and detach() cannot "
            "make another one of it. Add the layer yourself: model.add(LossArgs(loss))."
        )
    new = new_like(model, keras.Sequential)
    for layer in (*([model.inputs[0]] if model.built else []), *layers):
        new.add(layer)
    copy_own_state(model, new, keras.Sequential)
    return new


def _described(model: Any) -> str:
    return f"{model.name!r}, a {type(model).__name__}"
