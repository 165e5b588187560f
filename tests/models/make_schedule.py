"""Write `schedule-<backend>.keras`: a model with schedules in its loss and its optimizer."""

import json
import sys
from pathlib import Path

import keras
import numpy as np

from lossargs import attach

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import losses  # noqa: E402  (needs the path above)
import schedules  # noqa: E402

LOSS = losses.shifted(schedules.cyclical(8))
RATE = schedules.joined([schedules.warmup(4), schedules.cyclical(8)], 3)
X, Y = np.ones((4, 3), "float32"), np.zeros((4, 2), "float32")


def model():
    """A model that was trained for two steps."""
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    network.set_weights([np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2), np.zeros(2)])
    network = attach(network, LOSS)
    network.compile(keras.optimizers.SGD(RATE), loss=LOSS)
    network.fit(X, Y, epochs=2, verbose=0)
    return network


def trained(network):
    """What the logs of two further steps hold."""
    history = network.fit(X, Y, epochs=2, verbose=0).history
    return {name: [float(value) for value in values] for name, values in history.items()}


if __name__ == "__main__":
    made = model()
    made.save(HERE / f"schedule-{keras.backend.backend()}.keras")
    (HERE / "schedule.json").write_text(json.dumps(trained(made), indent=1) + "\n")
