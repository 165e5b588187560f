"""What several test modules use."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

from lossargs import LossArgsError

BACKEND = keras.backend.backend()
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
TESTS = Path(__file__).parent


def linear_model() -> keras.Model:
    """The same linear model, 3 to 2, on every backend."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.set_weights([np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2), np.zeros(2)])
    return model


def predictions(x: np.ndarray) -> np.ndarray:
    """What `linear_model` predicts."""
    return x @ np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2)


def to_float(value: object) -> float:
    return float(keras.ops.convert_to_numpy(keras.ops.cast(value, "float32")))


def gradient(function: object, value: np.ndarray) -> np.ndarray:
    """The derivative of a scalar function at `value`, by the backend in use."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tensor = tf.constant(value)
        with tf.GradientTape() as tape:
            tape.watch(tensor)
            result = function(tensor)
        return tape.gradient(result, tensor).numpy()
    if BACKEND == "jax":
        import jax

        return np.asarray(jax.grad(function)(value))
    import torch

    tensor = torch.tensor(value, requires_grad=True)
    function(tensor).backward()
    return tensor.grad.numpy()


def message_of(error: LossArgsError) -> str:
    """The text of an error, on one line."""
    return " ".join(str(error).split())


def values_on_tensors() -> dict[int, object]:
    """What Keras keeps for tensors of JAX that take no attributes."""
    from keras.src.backend.common.global_state import get_global_attribute

    return get_global_attribute("_lossargs_steps_dict") or {}


def run_python(code: str, *, backend: str = BACKEND, cwd: Path = TESTS) -> str:
    """What a fresh process prints that runs this code; fails if the process does."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
