"""`examples/vae.py`, run as a reader would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import lossargs

pytestmark = pytest.mark.fit

SCRIPT = Path(__file__).parents[1] / "examples" / "vae.py"
BACKEND = keras.backend.backend()
STEPS = 40  # of an epoch


def run(*arguments: str | Path, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    source = Path(lossargs.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, [script, *arguments])],
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def test_it_learns_anneals_saves_loads_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("mlxtend")
    files = ["--json", tmp_path / "run.json", "--plot", tmp_path / "run.png"]
    result = run("--backend", BACKEND, "--epochs", "2", "--seed", "3", *files)
    assert result.returncode == 0, result.stderr

    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    history = record.pop("history")
    assert record == {"backend": BACKEND, "seed": 3, "annealing_steps": STEPS}
    names = {"loss", "beta", "kl_term", "reconstruction"}
    assert set(history) == names | {f"val_{name}" for name in names}
    # As the schedule says: in the last step of each epoch, and after it.
    assert history["beta"] == pytest.approx([(STEPS - 1) / STEPS, 1])
    assert history["val_beta"] == pytest.approx([1, 1])
    for epoch in range(2):
        loss, beta, kl, error = (
            history[f"val_{name}"][epoch] for name in ("loss", "beta", "kl_term", "reconstruction")
        )
        assert loss == pytest.approx(error + beta * kl, rel=1e-5)
        assert kl > 1
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

    trained, loaded, detached, mean = result.stdout.splitlines()[-4:]
    assert trained.startswith(" trained: test beta 1.0000, test kl_term ")
    assert loaded == trained.replace("trained", " loaded")
    assert float(detached.split()[4]) < 1e-5
    assert mean.startswith("The mean digit has a reconstruction error of ")
    loss = float(trained.split("test loss ")[1].split(",")[0])
    assert loss == pytest.approx(history["val_loss"][-1], rel=1e-5)
