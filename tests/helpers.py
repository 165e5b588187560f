"""What several test modules use."""

import collections
import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest

from lossargs import LossArgs, LossArgsError, attach

BACKEND = keras.backend.backend()
KERAS = tuple(int(part) for part in keras.__version__.split(".")[:2])
TESTS = Path(__file__).parent


def each_writer(test):
    """Run a test with the stored models of each backend, on the Keras that wrote them."""
    skip = pytest.mark.skipif(KERAS < (3, 15), reason="layers of the Keras that wrote it have more")
    return skip(pytest.mark.parametrize("written_on", ["jax", "tensorflow", "torch"])(test))


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


def value_and_gradient(function: object, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A scalar function and its derivative at `value`, by the backend in use."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tensor = tf.constant(value)
        with tf.GradientTape() as tape:
            tape.watch(tensor)
            result = function(tensor)
        return result.numpy(), tape.gradient(result, tensor).numpy()
    if BACKEND == "jax":
        import jax

        return tuple(map(np.asarray, jax.value_and_grad(function)(value)))
    import torch

    tensor = torch.tensor(value, requires_grad=True)
    result = function(tensor)
    result.backward()
    return result.detach().numpy(), tensor.grad.numpy()


def gradient(function: object, value: np.ndarray) -> np.ndarray:
    """The derivative of a scalar function at `value`, by the backend in use."""
    return value_and_gradient(function, value)[1]


@contextlib.contextmanager
def raising(kind: type[Exception], *words: str) -> Iterator[None]:
    """Fail unless an error of this class is raised, whose text has all these words."""
    with pytest.raises(kind) as caught:
        yield
    text = " ".join(str(caught.value).split())
    assert [word for word in words if word not in text] == [], text


def message_of(error: LossArgsError) -> str:
    """The text of an error, on one line."""
    return " ".join(str(error).split())


def fixed(value: object = 1.0, name: str = "shift", **options: object) -> keras.Variable:
    """Return a variable that is not trained."""
    return keras.Variable(value, trainable=False, name=name, **options)


def nested_in_itself() -> list:
    """Return a list that contains itself."""
    loop: list = []
    loop.append(loop)
    return loop


def step_itself() -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a schedule whose value is the step."""
    return keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)


def attached(
    loss: object, model: object = None, rate: float = 0.0, track: object = (), **options: object
) -> keras.Model:
    """Return the model attached to the loss and compiled with it; a rate of 0 changes nothing."""
    model = attach(linear_model() if model is None else model, loss, track=track)
    model.compile(keras.optimizers.SGD(rate), loss=loss, **options)
    return model


def logs_of(model: keras.Model, x: object, y: object, **options: object) -> dict[str, float]:
    """Return the logs of `evaluate`."""
    return model.evaluate(x, y, verbose=0, return_dict=True, **options)


def error_of(data: object) -> float:
    """Return the mean squared error of `linear_model`."""
    return float(np.mean((data.y - predictions(data.x)) ** 2))


def layer_of(model: keras.Model) -> LossArgs:
    """Return the one `LossArgs` layer of a model."""
    (layer,) = [layer for layer in model.layers if isinstance(layer, LossArgs)]
    return layer


def objects_of_lossargs() -> collections.Counter:
    """Count the objects in memory whose classes the package defines."""
    gc.collect()
    classes = (type(one) for one in gc.get_objects())
    return collections.Counter(
        cls.__name__ for cls in classes if str(cls.__module__).startswith("lossargs.")
    )


def values_on_tensors() -> dict[int, object]:
    """What Keras keeps for tensors of JAX that take no attributes."""
    from keras.src.backend.common.global_state import get_global_attribute

    return get_global_attribute("_lossargs_steps_dict") or {}


def operations_of_train_step(model: keras.Model, batch: tuple) -> list[str]:
    """Return the instructions of JAX's optimized program, the operations of TensorFlow's graph, or
    the operators that PyTorch calls."""
    model._symbolic_build(data_batch=batch)
    model.optimizer.build(model.trainable_variables)
    if BACKEND == "jax":
        import jax

        kinds = ("trainable", "non_trainable", "optimizer", "metrics")
        state = model._get_jax_state(**{f"{kind}_variables": True for kind in kinds})
        text = jax.jit(model.train_step).lower(state, batch).compile().as_text()
        return [line for line in text.splitlines() if " = " in line]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tensors = tf.nest.map_structure(tf.constant, batch)
        graph = tf.function(model.train_step, autograph=False).get_concrete_function(tensors).graph
        definition = graph.as_graph_def()
        parts = (definition.node, *(inner.node_def for inner in definition.library.function))
        return [node.op for nodes in parts for node in nodes]
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    tensors = keras.tree.map_structure(torch.as_tensor, batch)
    model.train_step(tensors)  # what happens once only
    called: list[str] = []
    with Watching():
        model.train_step(tensors)
    return called


def run_python(code: str, *, backend: str = BACKEND, cwd: Path = TESTS) -> str:
    """What a fresh process prints that runs this code; fails if the process does."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
