"""Writes `<backend>.keras`, a compiled model with losses of many kinds, for the tests to load.

    KERAS_BACKEND=jax python tests/models/make.py

The files that lie here were written on Keras 3.15.1, and must go on loading on
every backend; `expected.json` has the loss that the model had when it was written.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import losses  # noqa: E402  (needs the path above)

LOSSES = {
    "low": losses.shifted(5),
    "high": losses.shifted(10),
    "array": losses.flexible(a=np.array([1.0, 2.0, 3.0, 4.0], "float32"), b=np.int32(2)),
    "nested": losses.described(what={"a": [1, (2.0, None)], 3: "text"}),
    "inner": losses.composed(main=losses.scaled.options(reduction=None)(2.0, power=1.0)),
    "options": losses.scaled.options(name="late", reduction="sum", dtype="float64")(0.5),
}


def model() -> keras.Model:
    """One linear output for each loss, all with the same weights."""
    inputs = keras.Input((3,), name="x")
    outputs = {name: keras.layers.Dense(2, name=name)(inputs) for name in LOSSES}
    model = keras.Model(inputs, outputs)
    kernel = np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2)
    for name in LOSSES:
        model.get_layer(name).set_weights([kernel, np.zeros(2)])
    model.compile("adam", loss=LOSSES)
    model.optimizer.build(model.trainable_variables)
    return model


def evaluated(model: keras.Model) -> dict[str, float]:
    """The losses of the model on one fixed batch."""
    x = np.linspace(0, 1, 12, dtype="float32").reshape(4, 3)
    y = dict.fromkeys(LOSSES, np.ones((4, 2), "float32"))
    logs = model.test_on_batch(x, y, return_dict=True)
    return {name: float(value) for name, value in logs.items()}


if __name__ == "__main__":
    made = model()
    made.save(HERE / f"{keras.backend.backend()}.keras")
    (HERE / "expected.json").write_text(json.dumps(evaluated(made), indent=1) + "\n")
