"""Kinds of arguments that are not lossargs' own."""

import keras
import numpy as np
from keras import ops

import losses
from helpers import attached
from lossargs import Adapter


@keras.saving.register_keras_serializable("kinds")
class MovingAverage(Adapter):
    """The exponential moving average of a tensor's mean."""

    reads_tensor, shape = True, ()

    def __init__(self, tensor=None, decay=0.9, **kwargs):
        super().__init__(tensor, **kwargs)
        self.decay = decay
        self.average = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def value(self, tensor, training):
        average = self.decay * self.average + (1 - self.decay) * ops.mean(tensor)
        if training:
            self.average.assign(average)
        return average

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


def averaging_model():
    """A model whose loss adds the average of what comes in its second input."""
    rewards = keras.Input((), name="rewards")
    return attached(losses.shifted(MovingAverage(rewards, decay=0.5)))


def averages(model, rewards):
    """The average that each step of training logs."""
    x, logged = np.zeros((12, 3), "float32"), []
    for reward in rewards:
        model.reset_metrics()
        batch = [x, np.full(12, reward, "float32")], x[:, :2]
        logged.append(float(model.train_on_batch(*batch, return_dict=True)["shift"]))
    return logged


class Countdown:
    """A number that gets smaller by one in each step of training."""

    def __init__(self, start):
        self.start = start


@keras.saving.register_keras_serializable("kinds")
class CountdownAdapter(Adapter):
    adapts, shape = Countdown, ()

    def __init__(self, countdown, **kwargs):
        super().__init__(**kwargs)
        self.left = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(countdown.start), trainable=False
        )

    def value(self, tensor, training):
        left = self.left + 0
        if training:
            self.left.assign(ops.maximum(left - 1, 0))
        return left

    def get_config(self):
        return super().get_config()  # the start does not matter any more

    @classmethod
    def from_config(cls, config):
        return cls(Countdown(0), **config)


@keras.saving.register_keras_serializable("kinds")
class Handing(Adapter):
    """Hands over a layer."""

    def __init__(self, layer, **kwargs):
        super().__init__(**kwargs)
        self.layer = layer

    def value(self, tensor, training):
        return self.layer

    def get_config(self):
        return {**super().get_config(), "layer": keras.saving.serialize_keras_object(self.layer)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "layer": keras.saving.deserialize_keras_object(config["layer"])})
