"""Writes `sums-<backend>.keras` and what it gives; run once for each version of the format."""

import json
from pathlib import Path

import keras
import numpy as np

import sums
from lossargs import attach, live_args

HERE = Path(__file__).parent


def main():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.set_weights([np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2), np.zeros(2)])
    loss = sums.everything(model.outputs[0])
    model = attach(model, loss)
    model.compile(keras.optimizers.SGD(0.0), loss=loss)
    x = np.linspace(-1, 1, 36, dtype="float32").reshape(12, 3)
    batch = {"mask": x[:, :2] > 0}
    for _ in range(7):
        model.train_on_batch(x, x[:, :2], sample_weight=batch)
    model.save(HERE / f"sums-{keras.backend.backend()}.keras")
    logs = model.evaluate(x, x[:, :2], sample_weight=batch, verbose=0, return_dict=True)
    return {"loss": repr(model.layers[-1].loss), "live": list(live_args(model)), "logs": logs}


if __name__ == "__main__":
    EXPECTED = main()
    (HERE / "sums.json").write_text(json.dumps(EXPECTED, indent=2) + "\n")
