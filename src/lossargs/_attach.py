"""`attach` and `detach`: add the layer of live arguments to a model, and remove it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import keras

from lossargs._adapters import LayerAdapter, SeedGeneratorAdapter
from lossargs._errors import AttachError, listed, nearest
from lossargs._keras import (
    Functional,
    ancestors,
    copy_own_state,
    flat_layers,
    forget_calls,
    has_producer,
    metric_names,
    own_variables,
    producer,
)
from lossargs._layer import LossArgs, note_shared_weights
from lossargs._live import Adapter, Untracked, layers_of
from lossargs._logs import LiveArg, check_log_names, names_of, output_names_of
from lossargs._loss import BoundLoss, check_is_bound
from lossargs._models import (
    AttachedModel,
    AttachedSequential,
    before_loss,
    described,
    functional_like,
    names_of_outputs,
    plain_output,
    sequential_like,
)

Target = TypeVar("Target")
_KEPT = "_lossargs_kept"


def attach(target: Target, loss: Any, *, track: Any = ()) -> Target:
    """Return a new model that holds the live arguments of a loss.

    Args:
        target: A Functional or Sequential model. Or a symbolic output, or a list or dict of
            outputs, from which you then create the model: `keras.Model(x, attach(y, loss))`.
        loss: The bound loss that you also give to `compile`. For several outputs, one for all, or a
            list or dict, as for `compile`. Losses in it that are not bound, e.g. `"mse"`, are
            ignored here.
        track: Further bound losses, logged under their names. For several outputs, a dict by
            output name, or a list with an entry for each output: a loss, a list of losses or
            `None`.

    Returns:
        For a model, a new, uncompiled model of the same kind, with the same layers, weights,
        attributes and predictions. If an argument is computed from a new `keras.Input`, this input
        is appended to those of the model. A Sequential model becomes a Functional one if the loss
        reads tensors. A loss that was attached before is replaced. Schedules continue at their
        positions. For tensors, tensors of the same values, shapes and dtypes.

    Raises:
        AttachError: `target` is a subclassed model, or neither a model nor symbolic tensors. The
            loss is not a bound loss. An argument is a tensor of another model, or an attached
            model. Two logs would have the same name. `loss` or `track` does not fit the outputs.
            Or the class of the model defines its own `__init__`.

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
            f"attach() does not support subclassed models, e.g. {described(target)}. In __init__, "
            "write self.loss_args = LossArgs(loss). In `call`, return self.loss_args(y_pred), with "
            "tensors by name: self.loss_args(y_pred, z_mean=z_mean)."
        )
    else:
        attached, layers = _attach_tensors(target, loss, track, {})
        check_log_names(layers)
    return cast(Target, attached)


def detach(model: keras.Model) -> keras.Model:
    """Return the model without `LossArgs`, and without the inputs that only the loss needs.

    Args:
        model: A Functional or Sequential model.

    Returns:
        A model of the same layers, not compiled. If nothing is attached, the same model. If an
        output comes from `derivatives(u, ...)`, the new model computes `u` without derivatives.

    Raises:
        AttachError: The model is subclassed, its class defines its own `__init__`, or one of its
            layers is an attached model.

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
        detached = sequential_like(model, layers)
    elif isinstance(model, Functional):
        outputs = keras.tree.map_structure(plain_output, model.output)
        used, _ = ancestors(keras.tree.flatten(outputs))
        detached = functional_like(
            model, _inputs_without(model, _loss_inputs(model) - used.keys()), outputs
        )
    else:
        raise AttachError(
            f"detach() does not support subclassed models, e.g. {described(model)}. LossArgs does "
            "not change predictions. Use the model as it is: model.predict(x), model.export(path)."
        )
    if layers_of(detached):
        inner = next(layer.name for layer in detached.layers if layers_of(layer))
        raise AttachError(
            f"The layer {inner!r} of {model.name!r} has live arguments of a loss, and is not an "
            "output. Create the model again with detach(inner_model)."
        )
    forget_calls(detached.layers, LossArgs)
    # A detached model does not keep the user's layers and generators alive.
    objects = (LayerAdapter, SeedGeneratorAdapter)
    kept = {k: one for k, one in _kept_by(model).items() if not isinstance(one, objects)}
    return _remember(detached, kept)


def _loss_inputs(model: Any) -> set[int]:
    """Return the ids of the inputs that `attach` added, or if it is unknown, that losses read."""
    found: set[int] = set()
    for output in keras.tree.flatten(model.output):
        layer, given = producer(output)
        if isinstance(layer, LossArgs):
            read, _ = ancestors(given[1:])
            new = layer.new_inputs
            found |= {k for k, one in read.items() if new is None or producer(one)[0].name in new}
    return found


def _inputs_without(model: Any, dropped: set[int]) -> Any:
    """Return the inputs of a model without some. A dict stays a dict."""
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
        model: Any model, also a loaded one.

    Returns:
        The `keras.Variable`s by the names of their arguments. If two losses use one name for
        different variables, the key is `<loss>_<argument>`. A scalar has this name in the logs.

    Raises:
        AttachError: Two different variables would have one name.

    Examples:
        >>> import keras
        >>> from lossargs import attach, live_args, with_args
        >>> huber = with_args(keras.losses.huber)
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> delta = keras.Variable(1.0, trainable=False)
        >>> live_args(attach(model, huber(delta=delta)))["delta"] is delta
        True
    """
    named = names_of(layers_of(model), metric_names(model), output_names_of(model))
    variables = {name: one.adapter.variable for name, one in named if isinstance(one, LiveArg)}
    return {name: variable for name, variable in variables.items() if variable is not None}


def _attach_tensor(output: Any, loss: BoundLoss, track: Any, kept: dict[Any, Adapter]) -> Any:
    if not isinstance(output, keras.KerasTensor) or not has_producer(output):
        raise AttachError(
            f"attach() was given {output!r}, which is neither a model nor the symbolic output of a "
            "layer. Write attach(model, loss) or attach(y_pred, loss)."
        )
    replaced, given = producer(output)
    if isinstance(replaced, LossArgs):
        # The adapters of a loaded layer have no tensors yet.
        for adapter, tensor in zip(replaced.readers(), given[1:], strict=False):
            adapter.tensor = tensor
        kept = kept | replaced.adapters_by_key()
    layer = LossArgs(loss, track=track, kept=kept)
    tensors = [adapter.tensor for adapter in layer.readers()]
    output = before_loss(output)
    _, layers = ancestors([output, *(t for t in tensors if t is not None)])
    note_shared_weights(layer, layers)
    _mark_shared_layers(layer, layers)
    attached = layer(output, tensors) if tensors else layer(output)
    forget_calls(layers, LossArgs)  # otherwise, each keeps the loss alive
    return attached, layer


def _attach_tensors(
    outputs: Any, loss: Any, track: Any, kept: dict[Any, Adapter]
) -> tuple[Any, dict[LossArgs, str]]:
    """Return the outputs, those with a bound loss passed through new layers, and these layers.

    The layers are the keys of a dict of the names of their outputs, `""` if there is one output.
    """
    if not isinstance(outputs, (Mapping, list, tuple)):
        check_is_bound(loss)
        attached, layer = _attach_tensor(outputs, loss, track, kept)
        return attached, {layer: ""}
    by_name = dict(outputs) if isinstance(outputs, Mapping) else None
    names = list(by_name) if by_name is not None else names_of_outputs(outputs)
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
            tensors[place] = before_loss(tensor)
            if tracked:
                check_is_bound(one)
    if by_name is not None:
        return dict(zip(names, tensors, strict=True)), layers
    return (tuple if isinstance(outputs, tuple) else list)(tensors), layers


def _by_output(given: Any, names: Sequence[str], what: str, *, is_one: bool) -> list[Any]:
    """Return one entry per output from a dict, a list, or one value for all."""
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise AttachError(
                    f"attach({what}=...) has no output {name!r}. Outputs: {listed(names)}. Write "
                    f"{{{names[0]!r}: ...}}.{nearest(name, names)}"
                )
        return [given.get(name) for name in names]
    if is_one:
        return [given] * len(names)
    if isinstance(given, BoundLoss) or len(given) != len(names):
        raise AttachError(
            f"attach({what}=...) was given {given!r} for the outputs {listed(names)}. Write "
            f"{{{names[0]!r}: ...}}, or a list with one entry for each output."
        )
    return list(given)


def _attach_functional(model: Any, loss: Any, track: Any) -> Any:
    outputs, layers = _attach_tensors(model.output, loss, track, _kept_by(model))
    check_log_names(layers)
    # Inputs that the tensors among the arguments are computed from.
    new: dict[int, Any] = {}
    for one in (one for layer in layers for one in layer.get_live()):
        if isinstance(one.adapter.tensor, keras.KerasTensor):
            sources, _ = ancestors([one.adapter.tensor])
            _refuse_inputs_of_layers(one, sources, model)
            new |= sources
    known = {id(tensor) for tensor in model.inputs}
    extra = [tensor for key, tensor in new.items() if key not in known]
    before = _loss_inputs(model)  # added by an earlier `attach`
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
    attached = functional_like(model, inputs, outputs)
    if isinstance(attached, AttachedModel):
        for layer in layers:
            layer.unsaved = ""  # this class writes shared layers once
    if list(attached.output_names) != list(model.output_names):
        attached.output_names = list(model.output_names)
        for layer in layers if isinstance(outputs, (list, tuple)) else []:
            layer.unsaved = (
                "its outputs are a list, whose names a model of its class would lose. Give it a "
                "dict of outputs, keras.Model(inputs, {name: output})."
            )
    _mark_own_weights(attached, layers)
    return _remember(attached, _kept_by(model))


def _mark_own_weights(model: Any, layers: Iterable[LossArgs]) -> None:
    """Mark layers as not savable whose arguments are state that would load as two variables."""
    own = {id(variable) for variable in own_variables(model)}
    others = [one for one in model.layers if not isinstance(one, LossArgs)]
    inside = {id(variable): one.name for one in others for variable in one.variables}
    for layer in layers:
        for one in layer.get_live():
            generator = getattr(one.adapter, "generator", None)
            if generator is not None and id(generator.state) in inside:
                layer.unsaved = (
                    f"{one.label!r} is a random generator of the layer "
                    f"{inside[id(generator.state)]!r}, and would load as two. Pass a generator of "
                    "its own, keras.random.SeedGenerator(), or the layer."
                )
            if id(one.adapter.variable) in own:
                layer.unsaved = (
                    f"{one.label!r} is a weight of the model itself, and would load as two "
                    "variables. Make it a weight of a layer."
                )


def _mark_shared_layers(layer: LossArgs, layers: list[Any]) -> None:
    """Mark the layer as not savable if a network in the loss shares layers with the model.

    A model of our own classes can be saved: `attach` removes the mark.
    """
    inside = {id(part): part.name for one in layers for part in flat_layers(one)}
    for one in layer.get_live():
        if not isinstance(one.adapter, LayerAdapter) or one.adapter.layer in layers:
            continue
        parts = [
            p for p in flat_layers(one.adapter.layer) if not isinstance(p, keras.layers.InputLayer)
        ]
        if any(id(part) in inside for part in parts):
            layer.unsaved = (
                f"{one.label!r} shares layers with the model, which Keras would load as two. Give "
                "attach a model of Keras's own class: attach(keras.Model(x, y), loss). Or pass a "
                "layer of that model."
            )


def _refuse_inputs_of_layers(one: Any, sources: dict[int, Any], model: Any) -> None:
    """Raise if an argument is an inner tensor of a nested model, e.g. `encoder.output`."""
    known = {id(tensor) for tensor in model.inputs}
    for layer in model.layers:
        for tensor in getattr(layer, "inputs", None) or ():
            if id(tensor) in sources and id(tensor) not in known:
                raise AttachError(
                    f"{one.label!r} of {one.loss!r} is a tensor of another graph, with the input "
                    f"{tensor.name!r}, which {model.name!r} does not have. Take the tensor of this "
                    "model: z = encoder(x), and not encoder.output."
                )


def _attach_sequential(model: Any, loss: Any, track: Any) -> Any:
    check_is_bound(loss)
    kept = _kept_by(model)
    layer = LossArgs(loss, track=track, kept=kept)
    if not layer.readers():
        layers = [one for one in model.layers if not isinstance(one, LossArgs)]
        check_log_names({layer: ""})
        note_shared_weights(layer, layers)
        attached = sequential_like(model, [*layers, layer])
        if not isinstance(attached, AttachedSequential):
            _mark_shared_layers(layer, layers)
        _mark_own_weights(attached, [layer])
        return _remember(attached, kept)
    if type(model) not in (keras.Sequential, AttachedSequential) or not model.built:
        raise AttachError(
            f"{loss!r} reads tensors, which makes {model.name!r} a Functional model. Make it one "
            "first, keras.Model(model.inputs, model.outputs), once it has a keras.Input."
        )
    functional = Functional(model.inputs[0], model.outputs[0], name=model.name)
    copy_own_state(model, functional, keras.Sequential)
    return _attach_functional(_remember(functional, kept), loss, track)
