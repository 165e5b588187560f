"""`attach` and `detach`: the layer of live arguments put into a model, and taken out again."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import keras

from lossargs._adapters import Adapter
from lossargs._bound import BoundLoss
from lossargs._derivatives import undifferentiated
from lossargs._errors import AttachError, listed, nearest
from lossargs._keras import (
    Functional,
    above,
    keeps_constructor,
    origin,
)
from lossargs._layer import LossArgs, check_is_bound, layers_of, names_of
from lossargs._values import checked, damaged, reading

Target = TypeVar("Target")


@keras.saving.register_keras_serializable(package="lossargs")
class AttachedModel(keras.Model):
    """A Functional model of several outputs, named as they were before losses were attached.

    Keras names the outputs of a list after the layers they come from, which are all `LossArgs`.
    """

    @property
    def output_names(self) -> list[str]:
        """The names that `compile` and the logs know the outputs by."""
        return [origin(_before(output))[0].name for output in self.outputs]

    @output_names.setter
    def output_names(self, names: list[str]) -> None:
        """Keras sets them by the layers."""

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """The model that `get_config` described.

        Raises:
            SavingError: The config is damaged. What its layers raise is left as it is.
        """
        what = f"The config of an {cls.__name__}"
        with reading(what):
            names = {checked(layer, "name", str) for layer in checked(config, "layers", list)}
            for ends in ("input_layers", "output_layers"):
                _check_places(checked(config, ends, list, dict), names)
            checked(config, "name", str)
            checked(config, "trainable", bool)
        try:
            return super().from_config(config, custom_objects)
        except IndexError as error:  # of a call that no layer has
            raise damaged(what, f"an input or output is the result of no call ({error})") from error


def _check_places(places: Any, names: Collection[str]) -> None:
    """Raise unless these are tensors as Keras writes them: layer, call, number, at any depth."""
    match places:
        case [str(name), int(call), int(number)] if name in names and min(call, number) >= 0:
            pass
        case [one, *_] if not isinstance(one, str):
            for place in places:
                _check_places(place, names)
        case dict() if places:
            for place in places.values():
                _check_places(place, names)
        case _:
            raise ValueError(f"{places!r} is no tensor of one of its layers")


def attach(target: Target, loss: Any, *, track: Any = ()) -> Target:
    """Let a model know the live arguments of its loss: variables, schedules, tensors.

    Args:
        target: A model, Functional or Sequential; or the symbolic tensor that is the output of one
            to be made, a list or dict of them if there are several.
        loss: The loss that `compile` is given as well, made by a factory of `with_args`. For
            several outputs a list or dict, as for `compile`; what is not made by a factory is left
            to `compile`. Keras names the outputs in a list by their last layers: attach to the
            model, or make a dict of the outputs, if names matter.
        track: Further bound losses, evaluated in the same step and logged under their names. For
            several outputs a list or dict of these.

    Returns:
        The same kind as `target`: the same layers, and the same predictions. A `keras.Input` among
        the arguments is an input of the new model, after those of the old one. A Sequential model
        becomes a Functional one if the loss reads tensors. An earlier `attach` is replaced.

    Raises:
        AttachError: The loss was not made by a factory, an argument is a tensor of another
            model, two things would be logged under one name, or the model is of a class that
            cannot be made of inputs and outputs.

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
            f"attach() cannot put a layer behind {_described(target)}, whose outputs are what its "
            "`call` returns. Make a layer in its __init__, self.loss_args = LossArgs(loss), and "
            "return self.loss_args(y_pred) in its `call`, with tensors by name: "
            "self.loss_args(y_pred, z_mean=z_mean)."
        )
    else:
        attached, layers = _attach_tensors(target, loss, track)
        names_of(layers)
    return cast(Target, attached)


def detach(model: keras.Model) -> keras.Model:
    """The model for `predict` and export: without `LossArgs`, and the inputs that only it used.

    Args:
        model: A Functional or Sequential model.

    Returns:
        A model of the same layers, not compiled; the same model if nothing is attached. An output
        that `derivatives` gave is computed without the derivatives.

    Raises:
        AttachError: The layer cannot be taken out of a model of this class, or it is in a model
            that is a layer of this one.

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
    if isinstance(model, keras.Sequential):
        return _sequential(model, [y for y in model.layers if not isinstance(y, LossArgs)])
    if not isinstance(model, Functional):
        raise AttachError(
            f"detach() cannot take the layer out of {_described(model)}, whose outputs are what "
            "its `call` returns. LossArgs leaves predictions as they are: `predict` and `export` "
            "work with it."
        )
    inputs, outputs = model.input, model.output
    outputs = keras.tree.map_structure(lambda y: undifferentiated(_before(y)), outputs)
    used, _ = above(keras.tree.flatten(outputs))
    if isinstance(inputs, dict):
        inputs = {name: tensor for name, tensor in inputs.items() if id(tensor) in used}
    elif isinstance(inputs, (list, tuple)):
        kept = [tensor for tensor in keras.tree.flatten(inputs) if id(tensor) in used]
        if len(kept) < len(model.inputs):
            inputs = kept[0] if len(kept) == 1 else kept
    detached = _functional(model, inputs, outputs)
    if layers_of(detached):
        inner = [layer.name for layer in detached.layers if layers_of(layer)]
        raise AttachError(
            f"The layers {listed(inner)} of {model.name!r} are attached models themselves. Detach "
            "them before they become layers of another model."
        )
    return detached


def live_args(model: keras.Model) -> dict[str, keras.Variable]:
    """The variables that the losses of a model take as arguments, also of one that was loaded.

    Args:
        model: Any model; one that nothing is attached to has none.

    Returns:
        The `keras.Variable`s by their names in the logs: those of the arguments, with the name of
        the loss in front where arguments of two losses share one.

    Examples:
        >>> import keras
        >>> from lossargs import attach, live_args, with_args
        >>> huber = with_args(keras.losses.huber)
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> delta = keras.Variable(1.0, trainable=False)
        >>> live_args(attach(model, huber(delta=delta)))["delta"] is delta
        True
    """
    named = names_of(layers_of(model))
    variables = {name: entry.adapter.variable for name, entry in named}
    return {name: variable for name, variable in variables.items() if variable is not None}


def _before(output: keras.KerasTensor) -> keras.KerasTensor:
    """The tensor that an output was before a loss was attached to it."""
    operation, given = origin(output)
    return _before(given[0]) if isinstance(operation, LossArgs) else output


def _attach_tensor(output: Any, loss: BoundLoss, track: Iterable[BoundLoss]) -> Any:
    if not isinstance(output, keras.KerasTensor):
        raise AttachError(
            f"attach() takes a model, or the symbolic tensor that is its output, and was given "
            f"{output!r}."
        )
    if isinstance(track, BoundLoss):
        track = [track]
    layer = LossArgs(loss, track=track, kept=_kept_behind(output))
    tensors = layer.tensors
    output = _before(output)
    _, layers = above([output, *(t for t in tensors if t is not None)])
    layer.note_weights_of(layers)
    return (layer(output, tensors) if tensors else layer(output)), layer


def _kept_behind(output: keras.KerasTensor) -> dict[str, Adapter]:
    """What a layer keeps that is to be replaced: of a loaded model, all there is of its values."""
    layer, given = origin(output)
    if not isinstance(layer, LossArgs):
        return {}
    readers = [adapter for adapter in layer.adapters if adapter.reads_tensor]
    for adapter, tensor in zip(readers, given[1:], strict=False):
        adapter.tensor = tensor
    return layer.adapters_by_id()


def _attach_tensors(outputs: Any, loss: Any, track: Any) -> tuple[Any, list[LossArgs]]:
    """The outputs with layers behind those that have a bound loss, and these layers."""
    if not isinstance(outputs, (Mapping, list, tuple)):
        check_is_bound(loss)
        attached, layer = _attach_tensor(outputs, loss, track)
        return attached, [layer]
    if isinstance(outputs, Mapping):
        names: Sequence[Any] = list(outputs)
        tensors = list(outputs.values())
    else:
        names = [origin(_before(output))[0].name for output in outputs]
        tensors = list(outputs)
    losses = _by_output(loss, names, "loss", all_of_them=lambda: [loss] * len(names))
    tracks = _by_output(track, names, "track", all_of_them=lambda: [()] * len(names))
    if not any(isinstance(one, BoundLoss) for one in losses):
        check_is_bound(next((one for one in losses if one is not None), None))
    layers = []
    for place, (tensor, one, tracked) in enumerate(zip(tensors, losses, tracks, strict=True)):
        if isinstance(one, BoundLoss):
            tensors[place], layer = _attach_tensor(tensor, one, tracked or ())
            layers.append(layer)
        elif tracked:
            check_is_bound(one)
    if isinstance(outputs, Mapping):
        return dict(zip(names, tensors, strict=True)), layers
    return type(outputs)(tensors), layers


def _by_output(
    given: Any, names: Sequence[str], what: str, *, all_of_them: Callable[[], list[Any]]
) -> list[Any]:
    """What was given for each output, by name, in order, or one for all."""
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise AttachError(
                    f"attach({what}=...) names the output {name!r}, and there are {listed(names)}."
                    f"{nearest(name, names)}"
                )
        return [given.get(name) for name in names]
    if what == "loss" and not isinstance(given, (list, tuple)):
        return all_of_them()
    if what == "track" and not given:
        return all_of_them()
    nested = what == "loss" or all(isinstance(one, (list, tuple)) for one in given)
    if not nested or len(given) != len(names):
        raise AttachError(
            f"attach({what}=...) was given {given!r} for the outputs {listed(names)}. Give a dict, "
            f"{{{names[0]!r}: ...}}, or a list with one entry for each."
        )
    return list(given)


def _attach_functional(model: Any, loss: Any, track: Any) -> Any:
    inputs, outputs = model.input, model.output
    outputs, layers = _attach_tensors(outputs, loss, track)
    names_of(layers)
    known = {id(tensor) for tensor in model.inputs}
    new = {}
    for layer in layers:
        for entry in layer.entries:
            tensor = entry.adapter.tensor
            if not isinstance(tensor, keras.KerasTensor):
                continue
            sources, _ = above([tensor])
            if id(tensor) in sources:
                new[id(tensor)] = tensor
            foreign = [t.name for t in sources.values() if id(t) not in known and t is not tensor]
            if foreign:
                raise AttachError(
                    f"{entry.label!r} of {entry.loss!r} is a tensor of another graph: it is "
                    f"computed from the input {listed(foreign)}, which {model.name!r} does not "
                    "have. Take the tensor that a layer gave in this model: of a model used as a "
                    "layer, what it was called with gives z = encoder(x), and not encoder.output."
                )
    extra = [tensor for key, tensor in new.items() if key not in known]
    if extra:
        if isinstance(inputs, dict):
            inputs = {**inputs, **{tensor.name: tensor for tensor in extra}}
        elif isinstance(inputs, (list, tuple)):
            inputs = [*inputs, *extra]
        else:
            inputs = [inputs, *extra]
    return _functional(model, inputs, outputs)


def _functional(model: Any, inputs: Any, outputs: Any) -> Any:
    """A model of the same class on these inputs and outputs."""
    several = len(keras.tree.flatten(outputs)) > 1
    cls = type(model)
    if cls in (Functional, AttachedModel):
        attached = any(
            isinstance(origin(output)[0], LossArgs) for output in keras.tree.flatten(outputs)
        )
        cls = AttachedModel if several and attached else keras.Model
    elif not keeps_constructor(model, Functional):
        raise AttachError(
            f"{_described(model)} has an __init__ of its own, so that attach() and detach() cannot "
            "make another one of it. Build it with the layer in it: "
            "super().__init__(inputs, attach(y_pred, loss)); or, in a model with a `call`, "
            "self.loss_args = LossArgs(loss)."
        )
    return cls(inputs=inputs, outputs=outputs, name=model.name)


def _attach_sequential(model: Any, loss: Any, track: Any) -> Any:
    check_is_bound(loss)
    old = [one for one in model.layers if isinstance(one, LossArgs)]
    kept = old[-1].adapters_by_id() if old else {}
    layer = LossArgs(loss, track=[track] if isinstance(track, BoundLoss) else track, kept=kept)
    if not layer.tensors:
        layers = [one for one in model.layers if not isinstance(one, LossArgs)]
        names_of([layer])
        return _sequential(model, [*layers, layer])
    if type(model) is not keras.Sequential or not model.built:
        raise AttachError(
            f"{loss!r} reads tensors, which makes {model.name!r} a Functional model. Make it one "
            "first, keras.Model(model.inputs, model.outputs), once it has a keras.Input."
        )
    return _attach_functional(
        keras.Model(model.inputs[0], model.outputs[0], name=model.name), loss, track
    )


def _sequential(model: Any, layers: list[Any]) -> Any:
    if not keeps_constructor(model, keras.Sequential):
        raise AttachError(
            f"{_described(model)} has an __init__ of its own, so that attach() and detach() cannot "
            "make another one of it. Add the layer yourself: model.add(LossArgs(loss))."
        )
    first = [model.inputs[0]] if model.built else []
    new = type(model)(name=model.name)
    for layer in (*first, *layers):
        new.add(layer)
    return new


def _described(model: Any) -> str:
    return f"{model.name!r}, a {type(model).__name__}"
