"""The classes of attached models, and models made like others."""

from typing import Any

import keras

from lossargs._adapters import LayerAdapter
from lossargs._derivatives import undifferentiated
from lossargs._errors import AttachError
from lossargs._keras import (
    Functional,
    after_earlier_calls,
    copy_own_state,
    forget_calls,
    in_sharing_scope,
    in_symbolic_scope,
    keeps_constructor,
    new_like,
    producer,
    running_step,
)
from lossargs._layer import LossArgs, losses_from_config
from lossargs._live import Untracked, layers_of
from lossargs._serialization import reading


class _WritesSharedLayersOnce:
    """Makes the config of a model contain each layer once that losses and graph share."""

    def get_config(self) -> dict[str, Any]:
        """Return the config.

        Keras marks a config as shared when it writes the object again. The config of a layer within
        a layer of the graph is copied before that. So write the layers in the losses first.
        """
        for adapter in (one for layer in layers_of(self) for one in layer.adapters):
            if in_sharing_scope() and isinstance(adapter, LayerAdapter):
                keras.saving.serialize_keras_object(adapter.layer)
        config: dict[str, Any] = super().get_config()  # type: ignore[misc]
        return config


@keras.saving.register_keras_serializable(package="lossargs")
class AttachedModel(_WritesSharedLayersOnce, keras.Model):
    """A Functional model whose outputs keep the names that they had before `attach`.

    Keras names the outputs in a list after their layers, which are all `LossArgs`. The constructor
    of `keras.Model` makes the class Functional.
    """

    _predictor = Untracked(None)  # made by the first `predict`

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs in `compile` and in the logs."""
        return names_of_outputs(self.outputs)

    @output_names.setter
    def output_names(self, names: list[str]) -> None:
        """Ignore the names of the layers, which Keras sets."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Return the predictions, in `predict` without the tensors that only losses read."""
        step = running_step()
        if step is None or step.method != "predict_step" or in_symbolic_scope():
            return super().call(inputs, training=training, mask=mask)
        if self._predictor.value is None:
            outputs = keras.tree.map_structure(plain_output, self.output)
            self._predictor = Untracked(Functional(self.input, outputs))
        return self._predictor.value.call(inputs, training=training, mask=mask)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        with reading("The config of a model with live arguments"):
            # Networks in the losses may call layers of this graph, and are loaded before it.
            for layer in config["layers"]:
                if layer["registered_name"] == keras.saving.get_registered_name(LossArgs):
                    losses_from_config(layer["config"])
            return super().from_config(after_earlier_calls(config), custom_objects)


@keras.saving.register_keras_serializable(package="lossargs")
class AttachedSequential(_WritesSharedLayersOnce, keras.Sequential):
    """A Sequential model with a loss attached."""


def functional_like(model: Any, inputs: Any, outputs: Any) -> Any:
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
            f"attach() and detach() cannot rebuild {described(model)}, because its class defines "
            "__init__. Add the layer there: "
            "super().__init__(inputs, attach(y_pred, loss)); or, in a model with a `call`, "
            "self.loss_args = LossArgs(loss)."
        )
    copy_own_state(model, new, Functional)
    return new


def sequential_like(model: Any, layers: list[Any]) -> Any:
    """Return a model of the same class, with the same state, of these layers."""
    if not keeps_constructor(model, keras.Sequential):
        raise AttachError(
            f"attach() and detach() cannot rebuild {described(model)}, because its class defines "
            "__init__. Add the layer yourself: model.add(LossArgs(loss))."
        )
    new = new_like(model, keras.Sequential)
    if type(new) in (keras.Sequential, AttachedSequential):
        is_attached = any(isinstance(layer, LossArgs) for layer in layers)
        new = (AttachedSequential if is_attached else keras.Sequential)(name=model.name)
    for layer in (*([model.inputs[0]] if model.built else []), *layers):
        new.add(layer)
    copy_own_state(model, new, keras.Sequential)
    forget_calls(layers, LossArgs)
    return new


def plain_output(output: keras.KerasTensor) -> keras.KerasTensor:
    """Return an output without losses and derivatives."""
    return undifferentiated(before_loss(output))


def before_loss(output: keras.KerasTensor) -> keras.KerasTensor:
    """Return an output without the layers that `attach` added."""
    operation, given = producer(output)
    return before_loss(given[0]) if isinstance(operation, LossArgs) else output


def names_of_outputs(outputs: Any) -> list[str]:
    """Return the names of the outputs in a list, as they were before losses were attached."""
    return [producer(before_loss(output))[0].name for output in outputs]


def described(model: Any) -> str:
    """Return the name and the class of a model for a message."""
    return f"{model.name!r} ({type(model).__name__})"
