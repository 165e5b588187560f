"""A training killed at any step continues as if it had not been, by Keras's own callbacks."""

import json
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

import killed
from helpers import TESTS

pytestmark = pytest.mark.fit
ALL = range(killed.EPOCHS * killed.STEPS)
QUICK = 2 * killed.STEPS + 3
RANDOM = sorted(map(int, np.random.default_rng(6).choice(ALL, 10, replace=False)))
EACH = [QUICK, *(pytest.param(step, marks=pytest.mark.nightly) for step in RANDOM)]


def kill(folder, option, ways=killed.WAYS):
    done = subprocess.run(
        [sys.executable, "killed.py", folder, *ways, option],
        capture_output=True, text=True, timeout=300, cwd=TESTS,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "result.json").exists()


def resume(folder, way):
    """Continue in this process, which has the state of no run."""
    model, epoch, damaged = killed.found(way, folder / way)
    killed.train(model, epoch, folder, [killed.saving(way, folder / way)])
    return result_of(folder), damaged


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def assert_same(result, expected, *, first_epoch):
    """The epochs and steps that were made, and all there is at the end."""
    assert list(map(int, result["steps"])) == list(ALL[first_epoch * killed.STEPS :])
    for step, logs in result["steps"].items():
        assert logs == pytest.approx(expected["steps"][step], rel=1e-6), step
    for name, values in expected["history"].items():
        assert result["history"][name] == pytest.approx(values[first_epoch:], rel=1e-6), name
    assert result["live"] == pytest.approx(expected["live"], rel=1e-6)
    for values, others in zip(result["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(values, others, rtol=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Its folder, with a file of each epoch."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "model").mkdir()
    model = killed.make_model()
    killed.train(model, 0, folder, [killed.saving("model", folder / "model")])
    return folder


@pytest.fixture(scope="module")
def killed_after(tmp_path_factory):
    """The folder of a run killed after a step, which saved in each way; one run for each step."""
    folders = {}

    def folder_of(step):
        if step not in folders:
            folders[step] = tmp_path_factory.mktemp("killed")
            kill(folders[step], f"--kill-after={step}")
        return folders[step]

    return folder_of


def test_uninterrupted_run_moves_every_value(uninterrupted):
    history = result_of(uninterrupted)["history"]
    assert set(history) == {"loss", "by_step", "by_epoch", "schedule", "log_var"}
    for values in history.values():
        assert len(set(values)) == killed.EPOCHS
    ends = killed.STEPS * np.arange(1, killed.EPOCHS + 1)
    np.testing.assert_allclose(history["schedule"], (ends - 1) / len(ALL), rtol=1e-6)
    np.testing.assert_allclose(history["by_step"], 1 - 0.75 ** (ends - 1.0), rtol=1e-6)


@pytest.mark.parametrize("way", killed.WAYS)
@pytest.mark.parametrize("step", EACH)
def test_killed_after_a_step(uninterrupted, killed_after, tmp_path, step, way):
    folder = shutil.copytree(killed_after(step), tmp_path / "again")
    before = dict(map(json.loads, (folder / "steps.jsonl").read_text().splitlines()))
    assert list(before) == list(ALL[: step + 1])
    result, _ = resume(folder, way)
    assert_same(result, result_of(uninterrupted), first_epoch=step // killed.STEPS)


@pytest.mark.nightly
@pytest.mark.parametrize("way", killed.WAYS)
def test_killed_while_a_file_is_written(uninterrupted, tmp_path, way):
    kill(tmp_path, "--kill-in-file=2", ways=[way])
    newest = max((tmp_path / way).glob("*[!p]"), key=lambda file: file.stat().st_mtime)
    with pytest.raises((OSError, ValueError)):
        (keras.saving.load_model if way == "model" else killed.make_model().load_weights)(newest)
    result, damaged = resume(tmp_path, way)
    assert bool(damaged) == (way != "backup")
    assert_same(result, result_of(uninterrupted), first_epoch=2)


@pytest.mark.nightly
@pytest.mark.xfail(strict=True, reason="BackupAndRestore writes weights and epoch to two files")
def test_killed_between_the_two_files_of_a_backup(uninterrupted, tmp_path):
    kill(tmp_path, "--kill-between-files=2", ways=["backup"])
    result, _ = resume(tmp_path, "backup")
    assert_same(result, result_of(uninterrupted), first_epoch=2)
