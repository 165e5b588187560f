"""Layers, models and random generators as arguments: the function receives the object itself."""

from collections.abc import Iterable
from typing import Any

import keras

from lossargs._errors import AttachError
from lossargs._keras import flat_layers, in_sharing_scope
from lossargs._live import Adapter


@keras.saving.register_keras_serializable(package="lossargs")
class LayerAdapter(Adapter):
    """A layer or a model, with its weights in the step.

    The layer is a part of the adapter, and so of the model. Its config and weights say all of it:
    a loss saves the layer, and never this adapter.
    """

    adapts = keras.Layer

    def __init__(self, layer: keras.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer = layer

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return self.layer

    @property
    def metrics(self) -> list[Any]:
        """None: a model asks all layers, and leaves out the metrics of `compile`."""
        return []

    def check_is_alone(self, what: str) -> None:
        """Raise if the layer is a model that a loss is attached to."""
        if any(isinstance(one, Adapter) for one in flat_layers(self.layer)):
            raise AttachError(
                f"{what} is attached to a loss of its own, whose live arguments would belong to "
                f"two models. Pass the model without it: detach({self.layer.name})."
            )

    def check_is_built(self, what: str) -> None:
        """Raise if the layer would make its weights in the compiled step."""
        for one in flat_layers(self.layer):
            if not one.built and type(one).build is not keras.Layer.build:
                raise AttachError(
                    f"{what} is not built: {one.name!r} has no weights yet, and would make them in "
                    "the compiled step. Build it before fit: layer.build(input_shape), or call it "
                    "on an example."
                )


@keras.saving.register_keras_serializable(package="lossargs")
class SeedGeneratorAdapter(Adapter):
    """A random generator: new draws in each step of training."""

    adapts = keras.random.SeedGenerator

    def __init__(self, generator: keras.random.SeedGenerator, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = generator

    def value(self, tensor: Any, training: bool) -> Any:  # noqa: ARG002
        return self.generator

    def save_own_variables(self, store: Any) -> None:
        """Save the state, which Keras does not do by itself."""
        store["state"] = keras.ops.convert_to_numpy(self.generator.state.value)

    def load_own_variables(self, store: Any) -> None:
        """Load the state."""
        self.generator.state.assign(store["state"])


def share_layers(layers: Iterable[Any]) -> None:
    """Let layers in the losses of `LossArgs` layers be written as shared with those of the graph.

    Keras marks a config as shared when it writes the object again. The config of a layer within a
    layer of the graph is copied before that: so this function writes all of them first.
    """
    for adapter in (one for layer in layers for one in layer.adapters):
        if in_sharing_scope() and isinstance(adapter, LayerAdapter):
            keras.saving.serialize_keras_object(adapter.layer)
