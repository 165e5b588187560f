"""Writes `balance-<backend>.keras` and how it goes on; run once for each version of the format."""

import json
from pathlib import Path

import keras
import numpy as np

from lossargs import attach, balance, with_args
from lossargs.balancing import ReLoBRaLo, SoftAdapt, Uncertainty

HERE = Path(__file__).parent
RULES = {
    "uncertainty": Uncertainty,
    "softadapt": lambda: SoftAdapt(beta=2.0),
    # Always looks back: backends draw different numbers.
    "relobralo": lambda: ReLoBRaLo(alpha=0.7, temperature=0.5, lookback=1.0, seed=3),
}
X = np.linspace(-1, 1, 36, dtype="float32").reshape(12, 3)


def model_and_losses():
    """A model with a balanced loss for each of three outputs."""
    x = keras.Input((3,))
    kernel = keras.initializers.Constant(0.1)
    outputs = {name: keras.layers.Dense(2, kernel_initializer=kernel)(x) for name in RULES}
    mse, log_cosh = map(with_args, (keras.losses.mean_squared_error, keras.losses.log_cosh))
    losses = {name: balance([mse(), log_cosh()], rule()) for name, rule in RULES.items()}
    return keras.Model(x, attach(outputs, losses)), losses


def trained(model, steps):
    """The logs of these steps, each on a batch of its own."""
    logs = []
    for step in range(steps):
        model.reset_metrics()
        x = X[step % 4 :: 4]
        targets = dict.fromkeys(RULES, x[:, :2])
        logs.append(model.train_on_batch(x, targets, return_dict=True))
    return [{name: float(value) for name, value in one.items()} for one in logs]


def main():
    model, losses = model_and_losses()
    model.compile(keras.optimizers.SGD(0.05), loss=losses)
    trained(model, 5)
    model.save(HERE / f"balance-{keras.backend.backend()}.keras")
    return trained(model, 5)


if __name__ == "__main__":
    EXPECTED = main()
    (HERE / "balance.json").write_text(json.dumps(EXPECTED, indent=2) + "\n")
