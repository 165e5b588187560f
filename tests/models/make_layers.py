"""Writes `layers-<backend>.keras` and how it trains on; run once for each version of the format."""

import json
from pathlib import Path

import keras
import numpy as np

import networks

HERE = Path(__file__).parent


def main():
    model, loss, *_ = networks.attached(*networks.CASES)
    model.compile(keras.optimizers.SGD(0.02, momentum=0.5), loss=loss)
    networks.fitted(model)
    model.save(HERE / f"layers-{keras.backend.backend()}.keras")
    model.compile(keras.optimizers.SGD(0.02, momentum=0.5), loss=loss)
    history = networks.fitted(model, 2)["loss"]
    return {"loss": history, "weights": [np.array(v).tolist() for v in model.weights]}


if __name__ == "__main__":
    EXPECTED = main()
    (HERE / "layers.json").write_text(json.dumps(EXPECTED) + "\n")
