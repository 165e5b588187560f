"""lossargs beside what one would write without it, on one backend.

    python bench.py --backend jax --json jax.json

In one process and by turns: the time of a step of training, and what the step is; a change of a
value; binding; how the cost of live arguments grows; sums; balanced sums. `--only steps` measures
one of these.
"""

import argparse
import functools
import gc
import os
import statistics
import subprocess
import sys
import timeit
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--backend", choices=("jax", "tensorflow", "torch"))
PARSER.add_argument("--turns", type=int, default=30, help="default: %(default)s")
PARSER.add_argument("--only", choices=("steps", "changes", "binding", "growth", "sums", "balanced"))
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there")

if __name__ == "__main__":
    OPTIONS = PARSER.parse_args()
    if OPTIONS.backend:  # before Keras is imported: it cannot change its backend afterwards
        os.environ["KERAS_BACKEND"] = OPTIONS.backend

import keras  # noqa: E402 - only now is its backend chosen
import numpy as np  # noqa: E402
from cases import (  # noqa: E402
    CASES,
    CONSTANT,
    LIVE,
    Case,
    balanced_terms,
    closure,
    compute_loss,
    keras_losses,
    live,
    one_function,
    perceptron,
    random_data,
    squared,
    sum_of_terms,
)
from measuring import BACKEND, MODES, paired_times, program, ratio, step_times, write  # noqa: E402

from lossargs import balancing, live_args, with_args  # noqa: E402


def made(
    ways: dict[str, Any], case: Case, mode: dict[str, Any], alike: bool = True
) -> dict[str, keras.Model]:
    """The models, each trained for a moment; if `alike`, all have to come to the same loss."""
    models: dict[str, keras.Model] = {}
    data = case.data(2 * case.batch)
    expected = None
    if BACKEND == "torch" and mode["jit_compile"]:
        forget_compiled()
    for name, way in ways.items():
        keras.utils.set_random_seed(0)
        model = way(case)
        model.compile(model.optimizer, loss=model.loss, **mode)
        history = model.fit(*data, batch_size=case.batch, shuffle=False, epochs=2, verbose=0)
        expected = expected or history.history["loss"]
        if alike:
            np.testing.assert_allclose(history.history["loss"], expected, rtol=1e-3)
        models[name] = model
    return models


def forget_compiled() -> None:
    """Let each model compile: torch has a limit for all of them, and then runs on uncompiled."""
    import torch

    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.automatic_dynamic_shapes = False  # Inductor fails on convolutions so


def compared(
    ways: dict[str, Any], case: Case, mode: dict[str, Any], turns: int, alike: bool = True
) -> dict[str, Any]:
    """Times and programs, beside those of the first of the ways, which is made twice."""
    base, way = next(iter(ways.items()))
    models = made({base: way, f"{base} again": way, **ways}, case, mode, alike)
    data = case.data(case.steps * case.batch)
    results = step_times(models, data, case.batch, turns, base=base)
    first = keras.tree.map_structure(lambda array: array[: case.batch], data)
    return {name: numbers | program(models[name], first) for name, numbers in results.items()}


def steps(turns: int) -> dict[str, Any]:
    """A step of training with a constant, and with live arguments."""
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        for mode, options in MODES.items():
            for kind, ways in (("constant", CONSTANT), ("live", LIVE)):
                measured = dict(ways)
                if mode == "torch.compile":  # where `add_loss` is compiled anew in each step
                    measured.pop("add_loss", None)
                numbers = compared(measured, case, options, turns)
                results.setdefault(name, {}).setdefault(mode, {})[kind] = numbers
                print(name, mode, kind, {way: one["ratio"] for way, one in numbers.items()})
    return results


def changes(turns: int) -> dict[str, Any]:
    """A new value: assigned and one step made; or compiled in, and one step made."""
    case = CASES["MLP"]
    batch = case.data(case.batch)
    ours, recompiled = live(case), closure(case)
    weight = live_args(ours)["weights_0"]
    values = iter(range(1_000_000))

    def step() -> None:
        ours.train_on_batch(*batch)

    def assign() -> None:
        weight.assign(float(next(values)))
        ours.train_on_batch(*batch)

    def compile_again() -> None:
        shift = float(next(values))
        recompiled.compile("sgd", loss=lambda y, z: case.error(y, z) + shift)
        recompiled.train_on_batch(*batch)

    actions = {"step": step, "step again": step, "assign": assign, "compile again": compile_again}
    for action in actions.values():
        action()
    times = paired_times(actions, turns)
    results = {name: ratio(times[name], times["step"]) for name in actions}
    if BACKEND != "torch":  # where the loss runs in each step
        results["traces for 100 changes"] = traces(100)
    print(results)
    return results


def traces(number: int) -> int:
    """How often the loss is traced while its argument is assigned that many times."""
    calls = 0
    original = CASES["tiny"]

    def counted(y_true, y_pred):
        nonlocal calls
        calls += 1
        return original.error(y_true, y_pred)

    case = Case(
        original.network, counted, original.penalty, original.data, original.batch, original.steps
    )
    model = live(case)
    batch = case.data(case.batch)
    model.train_on_batch(*batch)
    assert calls
    calls = 0
    for value in range(number):
        live_args(model)["weights_0"].assign(float(value))
        model.train_on_batch(*batch)
    return calls


def binding(turns: int) -> dict[str, Any]:
    """Making a loss of a factory, beside `functools.partial`; and importing the package."""

    def shifted(y_true, y_pred, shift):
        return y_true - y_pred + shift

    factory = with_args(shifted)
    values = iter(range(100_000_000))
    kept = factory(-1)
    number = 1000
    times = paired_times(
        {
            "functools.partial": lambda: timeit.timeit(
                lambda: functools.partial(shifted, shift=next(values)), number=number
            ),
            "functools.partial again": lambda: timeit.timeit(
                lambda: functools.partial(shifted, shift=next(values)), number=number
            ),
            "bound again": lambda: timeit.timeit(lambda: factory(-1), number=number),
            "bound to a new value": lambda: timeit.timeit(
                lambda: factory(next(values)), number=number
            ),
        },
        turns,
    )
    assert factory(-1) is kept
    results: dict[str, Any] = {
        name: {"microseconds": 1e6 * statistics.median(one) / number} for name, one in times.items()
    }
    results["bytes kept after 100,000 binds"] = bytes_kept(lambda: factory(next(values)), 100_000)
    program = (
        "import time; a = time.perf_counter(); import keras; b = time.perf_counter(); "
        "import lossargs; print(b - a, time.perf_counter() - b)"
    )
    imports = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        imports.append([float(one) for one in done.stdout.split()])
    theirs, ours = (1000 * statistics.median(one) for one in zip(*imports, strict=True))
    results["import"] = {"keras, ms": theirs, "lossargs, ms": ours}
    print(results)
    return results


def bytes_kept(action: Callable[[], Any], number: int) -> int:
    """The memory that is held longer after that many actions, once it has settled."""
    held = np.zeros(3)  # in place: a new number would count itself
    tracemalloc.start()
    for place in range(3):
        for _ in range(number):
            action()
        gc.collect()
        held[place] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return int(held[2] - held[1])


def growth(turns: int) -> dict[str, Any]:
    """Live arguments beside `compute_loss`, for growing batches, numbers and sizes of them."""
    tiny = CASES["tiny"]

    def of_batch(batch: int) -> tuple[Case, int]:
        return Case(tiny.network, tiny.error, squared, tiny.data, batch, 20), 1

    def of_number(number: int) -> tuple[Case, int]:
        return Case(tiny.network, tiny.error, squared, tiny.data, tiny.batch, 20), number

    def of_size(size: int) -> tuple[Case, int]:
        return Case(
            lambda: perceptron(4, size, 1), tiny.error, squared, random_data(4, 1), 32, 20
        ), 1

    kinds = {
        "batch size": (of_batch, (8, 128, 2048, 32768)),
        "live arguments": (of_number, (1, 4, 16, 64)),
        "tensor size": (of_size, (4, 256, 16384)),
    }
    results: dict[str, Any] = {}
    mode = next(iter(MODES.values()))
    for kind, (case_of, sizes) in kinds.items():
        for size in sizes:
            case, number = case_of(size)
            ways = {
                "compute_loss": functools.partial(compute_loss, count=number),
                "lossargs": functools.partial(live, count=number),
            }
            numbers = compared(ways, case, mode, turns)
            results.setdefault(kind, {})[str(size)] = numbers
            print(kind, size, numbers, flush=True)
    return results


def sums(turns: int) -> dict[str, Any]:
    """A sum beside one function with the same logs, for growing numbers of terms."""
    results: dict[str, Any] = {}
    for mode, options in MODES.items():
        for count in (2, 4, 8):
            ways = {
                "one function": functools.partial(one_function, count=count),
                "Keras losses": functools.partial(keras_losses, count=count),
                "lossargs": functools.partial(sum_of_terms, count=count),
            }
            numbers = compared(ways, CASES["tiny"], options, turns)
            results.setdefault(mode, {})[str(count)] = numbers
            print(mode, count, numbers, flush=True)
    return results


def balanced(turns: int) -> dict[str, Any]:
    """Four terms with weights of each rule beside the same terms with fixed weights."""
    rules = [balancing.Uncertainty, balancing.SoftAdapt, balancing.ReLoBRaLo]
    ways = {"fixed weights": functools.partial(sum_of_terms, count=4)}
    ways |= {one.__name__: functools.partial(balanced_terms, rule=one, count=4) for one in rules}
    results: dict[str, Any] = {}
    for mode, options in MODES.items():
        results[mode] = {
            name: compared(ways, case, options, turns, alike=False) for name, case in CASES.items()
        }
        print(mode, results[mode], flush=True)
    return results


def main(options: argparse.Namespace) -> None:
    measures: dict[str, Callable[[int], dict[str, Any]]]
    measures = {"steps": steps, "changes": changes, "binding": binding, "growth": growth}
    measures |= {"sums": sums, "balanced": balanced}
    chosen = [options.only] if options.only else list(measures)
    write(
        options.json,
        {"turns": options.turns, **{name: measures[name](options.turns) for name in chosen}},
    )


if __name__ == "__main__":
    main(OPTIONS)
