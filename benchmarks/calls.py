"""Python and C calls of one step on eager PyTorch: counts, which no other process disturbs.

    python calls.py --json results/calls-torch.json

The other backends run Python code only in traces. Each way is counted beside the hand-written one,
and the hand-written one beside itself.
"""

import argparse
import gc
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from cases import CASES, Case, WithKerasLoss, closure, compute_loss, constant, live
from measuring import write

from lossargs import detach

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there")
Action = Callable[[], Any]


def count(action: Action) -> dict[str, int]:
    """Return the Python and C calls of an action; of `predict` a few runs differ by some calls."""
    for _ in range(3):  # what happens only in the first steps
        action()
    python, c = statistics.mode([once(action) for _ in range(7)])
    return {"Python": python, "C": c}


def once(action: Action) -> tuple[int, int]:
    events: Counter[str] = Counter()
    gc.collect()
    gc.disable()
    sys.setprofile(lambda _frame, event, _argument: events.update([event]))
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return events["call"], events["c_call"]


def training(way: Callable[[Case], keras.Model]) -> Action:
    model, data = way(CASES["tiny"]), CASES["tiny"].data(CASES["tiny"].batch)
    model.train_on_batch(*data)
    tensors = keras.tree.map_structure(torch.as_tensor, data)
    return lambda: model.train_step(tensors)


def prediction(*, attached: bool) -> Action:
    model = live(CASES["tiny"])
    model = model if attached else detach(model)
    x, _ = CASES["tiny"].data(CASES["tiny"].batch)
    return lambda: model.predict(x, verbose=0)


# The first of each is by hand, the second the same once more.
WAYS: dict[str, dict[str, Callable[[], Action]]] = {
    "a step with a constant": {
        "closure": lambda: training(closure),
        "the same again": lambda: training(closure),
        "lossargs": lambda: training(constant),
    },
    "a step with live arguments": {
        "compute_loss": lambda: training(compute_loss),
        "the same again": lambda: training(compute_loss),
        "with a Keras loss": lambda: training(partial(compute_loss, cls=WithKerasLoss)),
        "lossargs": lambda: training(live),
    },
    "predict": {
        "detached": lambda: prediction(attached=False),
        "the same again": lambda: prediction(attached=False),
        "attached": lambda: prediction(attached=True),
    },
}


def main(options: argparse.Namespace) -> None:
    counts = {
        name: {way: count(make()) for way, make in ways.items()} for name, ways in WAYS.items()
    }
    print(counts)
    write(options.json, {"calls": counts})


if __name__ == "__main__":
    main(PARSER.parse_args())
