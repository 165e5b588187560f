"""The gallery in `examples/`, run as a reader would run it, but shorter."""

import json

import pytest

from test_vae import BACKEND, SCRIPT, run

NAMES = [
    "distillation",
    "segmentation",
    "uncertainty_weighting",
    "focal",
    "ppo",
    "native_loops",
    "ewc",
    "centre_loss",
]
LONGER = {"distributed.py", "mnist.py", "mnist_report.py"}  # not of the gallery


def learned(name, record):
    """Whether the record tells of what the script is to reach."""
    if name == "distillation":
        wrong = {who: 1 - value for who, value in record["accuracies"].items()}
        return wrong["distilled"] < 0.75 * wrong["labels alone"]
    if name == "segmentation":
        plain, mapped = record["scores"].values()
        return all(mapped[key] < 0.8 * plain[key] for key in ("merged", "gap_filled"))
    if name == "uncertainty_weighting":
        errors = record["errors"]
        digit, slant = errors["learned"]
        return digit < 0.8 * errors["slant x 1"][0] and slant < 0.8 * errors["slant x 0.001"][1]
    if name == "focal":
        plain, focal = (result["average_precision"] for result in record["result"].values())
        return focal >= max(plain - 0.02, 0.8)
    if name == "ppo":
        return record["accuracy"]["clipped"] > 0.9 * record["accuracy"]["supervised"]
    if name == "ewc":
        runs = record["accuracies"].values()
        without, kept = (sum(1 - values[-1] for values in run.values()) for run in runs)
        return kept < 0.75 * without
    if name == "centre_loss":
        without, gathered = (result["spread"] for result in record["results"].values())
        return gathered < 0.7 * without
    return record["gap"] < 1e-4 and record["accuracy"] > record["nearest_mean"]


@pytest.mark.fit
@pytest.mark.nightly  # `nox -s examples` runs them whole
@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_records_and_draws(name, tmp_path):
    for package in ("matplotlib", "mlxtend"):
        pytest.importorskip(package)
    if (name, BACKEND) == ("native_loops", "jax"):
        pytest.importorskip("optax")
    files = ["--json", tmp_path / "run.json", "--plot", tmp_path / "run.png"]
    script = SCRIPT.with_name(f"{name}.py")
    result = run("--backend", BACKEND, "--epochs", "1", "--seed", "3", *files, script=script)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    # After one epoch it may not have learned yet, and then says so.
    assert (result.returncode == 0) == learned(name, record), result.stderr
    assert (f"{name}.py: error: " in result.stderr) == (result.returncode != 0), result.stderr
    assert (record["backend"], record["seed"]) == (BACKEND, 3)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert path.name in LONGER or len(path.read_text(encoding="utf-8").splitlines()) < 150
