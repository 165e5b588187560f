"""Two devices give the numbers of one: `MirroredStrategy`, and `DataParallel` on JAX.

More engines, in minutes: `test_engines.py`.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from helpers import BACKEND, KERAS, TESTS

pytestmark = pytest.mark.fit


def run_on(devices):
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "on_devices.py", str(devices)],
        capture_output=True, text=True, cwd=TESTS, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(BACKEND == "torch", reason="Keras's `fit` runs on one device on torch")
@pytest.mark.skipif(
    BACKEND == "tensorflow" and KERAS < (3, 15), reason="Keras trains otherwise on two, any loss"
)
def test_two_devices_give_the_numbers_of_one():
    history, variables = run_on(2)
    expected_history, expected_variables = run_on(1)
    assert set(history) == {
        f"{prefix}{name}"
        for prefix in ("", "val_")
        for name in ("loss", "live", "schedule", "trained", "code_size")
    }
    for name, values in expected_history.items():
        np.testing.assert_allclose(history[name], values, rtol=2e-5, err_msg=name)
    assert history["live"] == [1, 2, 3]
    assert history["val_schedule"] == pytest.approx([0.5, 1, 1])
    assert sorted(variables) == sorted(expected_variables)
    for path, values in expected_variables.items():
        np.testing.assert_allclose(variables[path], values, rtol=2e-5, atol=1e-6, err_msg=path)


@pytest.mark.skipif(BACKEND != "torch", reason="processes of torch.distributed")
def test_fit_in_several_processes_of_torch_is_refused(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "fit_in_processes.py", str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=TESTS,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "torch.distributed runs 2 processes" in output
        assert "DistributedDataParallel" in output
