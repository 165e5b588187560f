"""Several devices and processes give the numbers of one.

`fit` on two devices runs always, each engine of `examples/distributed.py` with `-m distributed`.
"""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import on_devices
from helpers import BACKEND, KERAS, TESTS

pytestmark = pytest.mark.fit
EXAMPLE = TESTS.parent / "examples" / "distributed.py"
DEVICES = ["--devices 2", "--devices 4", "--devices 8", "--devices 2 --processes 2"]
ENGINES = {
    "jax": [f"{name} {more}" for name in ("data-parallel", "model-parallel") for more in DEVICES],
    "tensorflow": ["mirrored --devices 2", "mirrored --devices 4", "multi-worker --processes 2"],
    "torch": ["ddp --processes 2"],
    "numpy": [],
}[BACKEND]
IN_PROCESSES = [engine for engine in ENGINES if "--processes" in engine]


def start(script, *options, **variables):
    return subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, cwd=TESTS, timeout=300,
        env={**os.environ, "KERAS_BACKEND": BACKEND, "TF_CPP_MIN_LOG_LEVEL": "3", **variables},
    )  # fmt: skip


def run(script, *options, **variables):
    """What a script prints last, as JSON."""
    done = start(script, *options, **variables)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(BACKEND == "torch", reason="Keras's `fit` runs on one device on torch")
@pytest.mark.skipif(
    BACKEND == "tensorflow" and KERAS < (3, 15), reason="Keras trains otherwise on two, any loss"
)
def test_two_devices_give_the_numbers_of_one():
    history, variables = run("on_devices.py")
    expected_history, expected_variables = on_devices.train()
    names = ["loss", "live", "schedule", "trained", "code_size"]
    names += ["everything", "codes", "codes_weight", "huber"]  # terms of a sum
    assert {f"{prefix}{name}" for prefix in ("", "val_") for name in names} <= set(history)
    if BACKEND == "tensorflow":  # whose replicas see their part of the batch only

        def apart(values):
            return {name: one for name, one in values.items() if not name.startswith("shared")}

        assert history["shared_loss"][-1] < history["shared_loss"][0]
        variables, expected_variables = apart(variables), apart(expected_variables)
        expected_history = apart(expected_history)
    for name, values in expected_history.items():
        np.testing.assert_allclose(history[name], values, rtol=2e-5, err_msg=name)
    assert history["live"] == [1, 2, 3]
    assert history["val_schedule"] == pytest.approx([0.5, 1, 1])
    assert sorted(variables) == sorted(expected_variables)
    for path, values in expected_variables.items():
        np.testing.assert_allclose(variables[path], values, rtol=2e-5, atol=1e-6, err_msg=path)


@pytest.mark.skipif(BACKEND != "torch", reason="processes of torch.distributed")
def test_fit_in_several_processes_of_torch_is_refused(tmp_path):
    errors = run("fit_in_processes.py", str(tmp_path / "store"))
    assert len(errors) == 2
    for error in errors:
        assert "torch.distributed" in error
        assert "DistributedDataParallel" in error


# ---- The engines of the example ----


def run_example(tmp_path, engine, *options, code=0):
    result = tmp_path / "result.json"
    done = start(EXAMPLE, "--engine", *engine.split(), *options, "--json", result)
    assert abs(done.returncode) == code, done.stderr[-5000:]
    return json.loads(result.read_text()) if result.exists() else None


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run_example(tmp_path_factory.mktemp("single"), "single")


def assert_same(result, expected):
    for name, values in result["history"].items():
        last = expected["history"][name][-len(values) :]
        np.testing.assert_allclose(values, last, rtol=1e-4, err_msg=name)
    for path, values in expected["weights"].items():
        if "optimizer" not in path:
            np.testing.assert_allclose(
                result["weights"][path], values, rtol=1e-4, atol=1e-5, err_msg=path
            )


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_comes_to_the_numbers_of_one_device(tmp_path, one_device, engine):
    assert len(one_device["history"]["loss"]) == 3
    assert_same(run_example(tmp_path, engine), one_device)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["single", *IN_PROCESSES])
def test_killed_run_continues_where_it_was(tmp_path, one_device, engine):
    backup = tmp_path / "backup"
    backup.mkdir()
    options = engine, "--backup", str(backup)
    assert run_example(tmp_path, *options, "--kill-in-epoch", "1", code=signal.SIGKILL) is None
    result = run_example(tmp_path, *options)
    assert len(result["history"]["loss"]) == 2  # the first epoch was done, and is not done again
    assert_same(result, one_device)


@pytest.mark.distributed
@pytest.mark.skipif(BACKEND == "torch", reason="DistributedDataParallel does not look at the loss")
def test_no_collective_beyond_those_of_the_hand_written_step():
    paths = [str(TESTS.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    by_hand, ours = run("collectives.py", PYTHONPATH=os.pathsep.join(paths))
    assert sum(by_hand.values()) > 0
    for kind, count in ours.items():
        assert count <= by_hand[kind]
