"""Writes `live-<backend>.keras` and what it gives; run once for each version of the format."""

import json
from pathlib import Path

import keras
import numpy as np

import losses
from lossargs import attach

HERE = Path(__file__).parent


def main():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.set_weights([np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2), np.zeros(2)])
    loss = losses.flexible(
        constant=1.5,
        schedule=keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0),
        variable=keras.Variable(0.5, trainable=False, name="variable"),
        trained=keras.Variable(0.25, name="trained"),
    )
    model = attach(model, loss)
    model.compile(keras.optimizers.SGD(0.0), loss=loss)
    x = np.linspace(-1, 1, 36, dtype="float32").reshape(12, 3)
    for _ in range(7):
        model.train_on_batch(x, x[:, :2])
    model.save(HERE / f"live-{keras.backend.backend()}.keras")
    return {
        "live": {"variable": 0.5, "trained": 0.25},
        "trainable": ["trained"],
        "logs": model.evaluate(x, x[:, :2], verbose=0, return_dict=True),
    }


if __name__ == "__main__":
    EXPECTED = main()
    (HERE / "live.json").write_text(json.dumps(EXPECTED, indent=2) + "\n")
