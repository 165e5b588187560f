"""Writes `derivatives-<backend>.keras`; run once for each version of the format."""

from pathlib import Path

import keras
import numpy as np
from keras import ops

import losses
from lossargs import attach, derivatives, grad

HERE = Path(__file__).parent


def main():
    x, t = keras.Input((1,), name="x"), keras.Input((1,), name="t")
    hidden = keras.layers.Dense(4, "tanh", name="hidden")(ops.concatenate([x, t], axis=1))
    u = keras.layers.Dense(2, name="out")(hidden)[:, :1]
    slope = grad(grad(u, x), t)  # through the layers that the rest of the model has as well
    again, u_t, u_xx = derivatives(u, (u, t), (u, x, x))
    loss = losses.equation(u_t=u_t, u_xx=u_xx)
    outputs = {"u": u, "u_xt": slope, "again": attach(again, loss)}
    model = keras.Model([x, t], outputs)
    values = [np.linspace(-1, 1, int(np.prod(w.shape))).reshape(w.shape) for w in model.weights]
    model.set_weights(values)
    model.save(HERE / f"derivatives-{keras.backend.backend()}.keras")


if __name__ == "__main__":
    main()
