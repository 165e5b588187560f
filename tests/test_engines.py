"""Each engine of `examples/distributed.py` gives the numbers of one device, also after a crash."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from helpers import BACKEND, TESTS

pytestmark = [pytest.mark.fit, pytest.mark.distributed]
EXAMPLE = TESTS.parent / "examples" / "distributed.py"
ENGINES = {
    "jax": [
        *(("data-parallel", "--devices", count) for count in ("2", "4", "8")),
        *(("model-parallel", "--devices", count) for count in ("2", "4", "8")),
        ("data-parallel", "--devices", "2", "--processes", "2"),
        ("model-parallel", "--devices", "2", "--processes", "2"),
    ],
    "tensorflow": [
        ("mirrored", "--devices", "2"),
        ("mirrored", "--devices", "4"),
        ("multi-worker", "--processes", "2"),
    ],
    "torch": [("ddp", "--processes", "2")],
    "numpy": [],
}[BACKEND]
IN_PROCESSES = [engine for engine in ENGINES if "--processes" in engine]


def run(tmp_path, *options, check=True):
    result = tmp_path / "result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--engine", *options, "--json", result],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if not check:
        return done.returncode
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), "single")


def assert_same(result, expected):
    for name, values in result["history"].items():
        last = expected["history"][name][-len(values) :]
        np.testing.assert_allclose(values, last, rtol=1e-4, err_msg=name)
    for path, values in expected["weights"].items():
        if "optimizer" not in path:
            np.testing.assert_allclose(
                result["weights"][path], values, rtol=1e-4, atol=1e-5, err_msg=path
            )


@pytest.mark.parametrize("engine", ENGINES, ids=" ".join)
def test_engine_comes_to_the_numbers_of_one_device(tmp_path, one_device, engine):
    assert len(one_device["history"]["loss"]) == 3
    assert_same(run(tmp_path, *engine), one_device)


@pytest.mark.parametrize("engine", [("single",), *IN_PROCESSES], ids=" ".join)
def test_killed_run_goes_on_where_it_was(tmp_path, one_device, engine):
    backup = tmp_path / "backup"
    backup.mkdir()
    options = (*engine, "--backup", str(backup))
    killed = run(tmp_path, *options, "--kill-in-epoch", "1", check=False)
    assert abs(killed) == signal.SIGKILL
    result = run(tmp_path, *options)
    assert len(result["history"]["loss"]) == 2  # the first epoch was done, and is not done again
    assert_same(result, one_device)


@pytest.mark.skipif(BACKEND == "torch", reason="DistributedDataParallel does not look at the loss")
def test_no_collective_beyond_those_of_the_hand_written_step():
    paths = [str(TESTS.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "collectives.py"], capture_output=True, text=True, cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    by_hand, ours = json.loads(done.stdout.splitlines()[-1])
    assert sum(by_hand.values()) > 0
    for kind, count in ours.items():
        assert count <= by_hand[kind]
