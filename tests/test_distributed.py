"""Two devices give the numbers of one: `MirroredStrategy`, and `DataParallel` on JAX."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from helpers import BACKEND, TESTS

pytestmark = [
    pytest.mark.fit,
    pytest.mark.skipif(BACKEND == "torch", reason="Keras's `fit` runs on one device on torch"),
]


def run_on(devices):
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "on_devices.py", str(devices)],
        capture_output=True, text=True, cwd=TESTS, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


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
