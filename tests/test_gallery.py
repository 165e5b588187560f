"""The gallery in `examples/`, run as a reader would run it, but shorter."""

import json

import pytest

from test_vae import BACKEND, SCRIPT, run

NAMES = [
    "distillation",
    "segmentation",
    "uncertainty_weighting",
]
LONGER = {"distributed.py", "mnist.py", "mnist_report.py"}
LONGER |= {"vae.py", "wgan_gp.py"}  # still to be brought under 150 lines


@pytest.mark.fit
@pytest.mark.nightly  # `nox -s examples` runs them whole
@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_records_and_draws(name, tmp_path):
    for package in ("matplotlib", "mlxtend"):
        pytest.importorskip(package)
    files = ["--json", tmp_path / "run.json", "--plot", tmp_path / "run.png"]
    script = SCRIPT.with_name(f"{name}.py")
    result = run("--backend", BACKEND, "--epochs", "1", "--seed", "3", *files, script=script)
    # After one epoch it may not have learned yet, and then says so.
    assert result.returncode == 0 or f"{name}.py: error: " in result.stderr, result.stderr
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (record["backend"], record["seed"]) == (BACKEND, 3)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert path.name in LONGER or len(path.read_text(encoding="utf-8").splitlines()) < 150
