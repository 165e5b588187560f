"""What the benchmarks share: paired times, what a step of training is, and the machine."""

import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

BACKEND = keras.backend.backend()
MODES: dict[str, dict[str, Any]] = {
    "jax": {"jit": {}},
    "tensorflow": {"XLA": {"jit_compile": True}, "graph": {"jit_compile": False}},
    "torch": {"eager": {"jit_compile": False}, "torch.compile": {"jit_compile": True}},
}.get(BACKEND, {})


def paired_times(actions: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each action in each turn, in which all run one after another."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(turns):
        for name in list(actions)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            actions[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], base: list[float]) -> dict[str, Any]:
    """The median of paired ratios, their quartiles, and the median time."""
    ratios = [one / other for one, other in zip(times, base, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "milliseconds": 1000 * statistics.median(times),
        "ratio": median,
        "quartiles": (lower, upper),
    }


def step_times(
    models: dict[str, keras.Model], data: tuple[Any, Any], batch: int, turns: int, base: str
) -> dict[str, Any]:
    """The times of a step of training of each model, in `fit`, beside that of one of them."""
    steps = -(-len(keras.tree.flatten(data)[0]) // batch)

    def fit(model: keras.Model) -> Callable[[], Any]:
        return lambda: model.fit(*data, batch_size=batch, shuffle=False, verbose=0)

    times = paired_times({name: fit(model) for name, model in models.items()}, turns)
    per_step = {name: [one / steps for one in values] for name, values in times.items()}
    return {name: ratio(values, per_step[base]) for name, values in per_step.items()}


def program(model: keras.Model, batch: Any) -> dict[str, int]:
    """What a step of training is.

    Returns:
        On JAX instructions and temporary bytes of the optimized program; on TensorFlow nodes of the
        graph, and the bytes they make; on PyTorch the operators run, and the bytes they make.
    """
    return globals()[f"_program_on_{BACKEND}"](model, batch)


def _program_on_jax(model: keras.Model, batch: Any) -> dict[str, int]:
    import jax

    state = model._get_jax_state(
        trainable_variables=True, non_trainable_variables=True,
        optimizer_variables=True, metrics_variables=True,
    )  # fmt: skip
    compiled = jax.jit(model.train_step).lower(state, batch).compile()
    instructions = sum(" = " in line for line in compiled.as_text().splitlines())
    memory = compiled.memory_analysis().temp_size_in_bytes
    return {"instructions": instructions, "temporary bytes": memory}


def _program_on_tensorflow(model: keras.Model, batch: Any) -> dict[str, int]:
    import tensorflow as tf

    function = tf.function(model.train_step, autograph=False)
    graph = function.get_concrete_function(tf.nest.map_structure(tf.constant, batch)).graph
    definition = graph.as_graph_def()
    inner = sum(len(function.node_def) for function in definition.library.function)
    outputs = [output for node in graph.get_operations() for output in node.outputs]
    # Variables have no shape of their own here, and are not made in the step.
    known = [one for one in outputs if one.dtype.is_numeric and one.shape.is_fully_defined()]
    made = sum(one.shape.num_elements() * one.dtype.size for one in known)
    return {"nodes": len(definition.node) + inner, "bytes made": made}


def _program_on_torch(model: keras.Model, batch: Any) -> dict[str, int]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        operators = made = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operators += 1
            result = function(*args, **(kwargs or {}))
            storages = {
                one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
                for one in (result if isinstance(result, (tuple, list)) else [result])
                if isinstance(one, torch.Tensor)
            }
            given = {
                one.untyped_storage().data_ptr() for one in args if isinstance(one, torch.Tensor)
            }
            self.made += sum(size for place, size in storages.items() if place not in given)
            return result

    tensors = keras.tree.map_structure(torch.as_tensor, batch)
    with Counter() as counter:
        model.train_step(tensors)
    return {"operators": counter.operators, "bytes made": counter.made}


def accelerators() -> list[str]:
    """The GPUs that the backend computes on."""
    if BACKEND == "jax":
        import jax

        return [device.device_kind for device in jax.devices() if device.platform != "cpu"]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return [device.name for device in tf.config.list_physical_devices("GPU")]
    import torch

    return [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())]


def machine() -> dict[str, Any]:
    """What the numbers were measured with."""
    versions = {"keras": keras.__version__, "numpy": np.__version__}
    return {
        "backend": BACKEND,
        "versions": versions | {BACKEND: importlib.import_module(BACKEND).__version__},
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "accelerators": accelerators(),
    }


def write(path: Path | None, record: dict[str, Any]) -> None:
    """Keep the numbers with what they were measured with."""
    if path:
        path.write_text(json.dumps({**machine(), **record}, indent=2) + "\n", encoding="utf-8")
