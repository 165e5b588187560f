"""The notebook, run cell by cell as in a hosted notebook."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "lossargs.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.mark.fit
def test_each_cell_runs(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": tmp_path.name}
    printed = []
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            printed.append(capsys.readouterr().out)
    names["plt"].close("all")
    assert printed[1] == "huber(delta=0.1)\n"
    logs = names["history"]
    assert set(logs) == {"loss", "huber", "activity", "activity_weight", "delta"}
    assert logs["activity_weight"][0] < logs["activity_weight"][-1]
    assert logs["activity_weight"][-1] == pytest.approx(0.1 * 799 / 800)
    assert logs["activity"][-1] < logs["activity"][0]
    assert printed[-1] == "True\n0.2\n"


def test_there_are_ten_cells_with_their_outputs():
    assert len(CELLS) == 10
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert [output["output_type"] for output in outputs].count("display_data") == 1
    assert all(cell["source"][-1].strip() for cell in CELLS)
