"""`examples/heat_equation.py` and `examples/wgan_gp.py`, run as a reader would run them."""

import json

import pytest

from test_examples import BACKEND, run

pytestmark = pytest.mark.fit


def finished(name, epochs, folder, *more):
    """What a short run writes, prints and exits with."""
    files = ["--json", folder / "run.json", "--plot", folder / "run.png"]
    options = ["--backend", BACKEND, "--epochs", str(epochs), "--seed", "3", *more]
    result = run(f"{name}.py", *options, *files)
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "run.json").read_text(encoding="utf-8")), result


def test_heat_equation(tmp_path):
    record, result = finished("heat_equation", 8, tmp_path, "--rules", "ReLoBRaLo")
    names = {"loss", "residual", "error"}
    fixed, balanced = (record["history"][way] for way in ("fixed", "ReLoBRaLo"))
    assert set(fixed) == names
    assert set(balanced) == names | {"residual_weight", "error_weight"}
    assert fixed["loss"][-1] < fixed["loss"][0] / 4
    assert set(record["rules"]) == {"fixed", "ReLoBRaLo"}
    errors = record["rules"]["fixed"]
    assert errors["relative_l2_error"] < 0.1
    solved = errors["max_error"] < 1e-2
    assert (result.returncode == 0) == solved
    assert ("it did not solve the equation" in result.stderr) != solved
    assert result.stdout.count("loaded: predictions differ by 0 at most") == 2


@pytest.mark.nightly
def test_heat_equation_by_each_rule(tmp_path):
    record, _ = finished("heat_equation", 1, tmp_path)
    ways = ["fixed", "equal", "Uncertainty", "SoftAdapt", "ReLoBRaLo"]
    assert list(record["rules"]) == list(record["history"]) == ways


def test_wgan_gp(tmp_path):
    pytest.importorskip("sklearn")
    record, result = finished("wgan_gp", 2, tmp_path)
    assert set(record["history"]) == {"loss", "distance", "penalty"}
    assert len(record["shares"]) == 10
    assert sum(record["shares"]) == pytest.approx(1)
    training, normal, generated = map(record["distances"].get, ("training", "normal", "generated"))
    names = "fidelity", "coverage"
    # The normal distribution blurs: a check that it passed would say nothing.
    assert all(normal[name] > 1.3 * training[name] for name in names)
    close = all(generated[name] < (training[name] + 2 * normal[name]) / 3 for name in names)
    learned = close and min(record["shares"]) >= 0.03
    assert (result.returncode == 0) == learned
    assert ("it did not learn" in result.stderr) != learned
    first = {name: values[0] for name, values in record["history"].items()}
    assert first["loss"] == pytest.approx(first["penalty"] - first["distance"], rel=1e-3)
