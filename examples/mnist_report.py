"""Show the results of `examples/mnist.py` on all backends: one table, and one picture.

    python examples/mnist_report.py build/mnist

Read the `*.json` of a folder, and write `mnist.png` there. With `--readme`, the table goes between
the marks in README.md, and the picture to docs/mnist.png.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
HEADINGS = ("backend", "shift", "loss", "loss - shift", "accuracy", "seconds per epoch")

Record = dict[str, Any]


def records_in(folder: Path) -> list[Record]:
    """Return the records of all runs, in the order of the backends, larger shifts first."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(records, key=lambda r: (list(NAMES).index(r["backend"]), -r["shift"]))


def rows_of(records: list[Record]) -> Iterator[list[str]]:
    for record in records:
        loss, accuracy = (record["history"][name][-1] for name in ("loss", "accuracy"))
        yield [
            NAMES[record["backend"]],
            f"+{record['shift']}",
            f"{loss:.4f}",
            f"{loss - record['shift']:.4f}",
            f"{accuracy:.4f}",
            f"{median(record['seconds_per_epoch']):.2f}",
        ]


def table_of(records: list[Record]) -> str:
    """Return a Markdown table with aligned columns, which is readable in a terminal too."""
    rows = [list(HEADINGS), *rows_of(records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def draw(records: list[Record], path: Path) -> None:
    """The curve of loss minus shift of each backend, dashed on held-out digits, and accuracy."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    largest = max(record["shift"] for record in records)
    for number, record in enumerate(r for r in records if r["shift"] == largest):
        history, style = record["history"], {"color": f"C{number}", "linewidth": 2}
        epochs = range(1, len(history["loss"]) + 1)
        label = NAMES[record["backend"]]
        for axes, name, offset in ((left, "loss", largest), (right, "accuracy", 0)):
            values = [[v - offset for v in history[prefix + name]] for prefix in ("", "val_")]
            axes.plot(epochs, values[0], label=label, marker="o", **style)
            axes.plot(epochs, values[1], linestyle="--", alpha=0.6, **style)
    for axes, title in ((left, f"loss - {largest}"), (right, "accuracy")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, title="training; dashed: held out")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the *.json files are")
    parser.add_argument("--readme", action="store_true", help="write table and picture for README")
    options = parser.parse_args()
    records = records_in(options.folder)
    if not records:
        parser.error(f"no results in {options.folder}; run `nox -s mnist` first")
    if len({(r["seed"], len(r["history"]["loss"])) for r in records}) > 1:
        parser.error("these results have different seeds or epochs; run `nox -s mnist` again")

    table, picture = table_of(records), options.folder / "mnist.png"
    draw(records, picture)
    print(f"\nMNIST after {len(records[0]['history']['loss'])} epochs, the numbers of the last\n")
    print(f"{table}\n\nCurves: {picture}")
    if options.readme:
        readme = ROOT / "README.md"
        before, mark, rest = readme.read_text().partition("<!-- mnist -->\n")
        after = rest.partition("<!-- /mnist -->")[2]
        readme.write_text(f"{before}{mark}\n{table}\n\n<!-- /mnist -->{after}")
        (ROOT / "docs").mkdir(exist_ok=True)
        shutil.copy(picture, ROOT / "docs" / "mnist.png")


if __name__ == "__main__":
    main()
