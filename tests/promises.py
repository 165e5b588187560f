"""Write what is promised, which tests show it, and how many passed in the last runs, into the docs.

    python promises.py build/tests

The files there are what pytest's `--junitxml` writes, `RUN-BACKEND.xml`: `tests-jax.xml`. The table
goes between the marks of `docs/promises.md`.
"""

import argparse
import collections
import datetime as dt
import xml.etree.ElementTree as ET
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("results", type=Path, metavar="FOLDER")
PAGE = Path(__file__).parent.parent / "docs" / "promises.md"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
SOURCES = "https://github.com/lossargs/lossargs/blob/main/tests"
# Each with the files that show it; together they are all the tests there are.
PROMISES = {
    "A bound loss is what Keras makes of the plain function, in value and gradient": [
        "test_bound", "test_parity", "test_factory", "test_values", "test_oracle",
    ],
    "With any signature and any arguments it is the direct call, or an error that says why": [
        "test_properties",
    ],
    "Arguments come with the batch from all that Keras takes data from": ["test_batch"],
    "Live arguments have their values in each step, are trained, logged, and never retraced": [
        "test_live", "test_live_parity", "test_attach", "test_adapters", "test_vae",
    ],
    "Derivatives are those of mathematics, and train as by hand": [
        "test_derivatives", "test_derivatives_numpy", "test_derivative_examples",
    ],
    "The compiled step is the hand-written one": ["test_compiled"],
    "Saved models load in another process and on another backend": [
        "test_saving", "test_live_saving",
    ],
    "A file runs nothing and imports nothing; a damaged one is refused": ["test_hostile"],
    "After an error the next `fit` works; NaN shows": ["test_faults"],
    "A run that is killed goes on where it was": ["test_kill"],
    "Memory stays flat, and threads never meet": ["test_load"],
    "Several devices and processes give the numbers of one": ["test_distributed", "test_engines"],
    "It goes together with callbacks, tuners, quantization and the rest of Keras": ["test_company"],
    "What Keras has in no public form is still there": ["test_keras_private"],
    "A GPU gives the numbers of the CPU": ["test_gpu"],
    "No backend is imported, and importing goes in one direction": ["test_isolation", "test_main"],
    "Examples, README and this site say what is true": [
        "test_mnist", "test_gallery", "test_site", "documents",
    ],
}  # fmt: skip


def counted(path):
    """How many cases of each test file passed, and how many were generated for them."""
    passed, generated = collections.Counter(), collections.Counter()
    for case in ET.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            raise SystemExit(f"{path}: {case.get('name')} failed; the page tells of runs that pass")
        file = next((p for p in case.get("classname").split(".") if p.startswith("test_")), None)
        passed[file or "documents"] += 1
        for one in case.iter("property"):
            if one.get("name") == "generated":
                generated[file] += int(one.get("value"))
    return passed, generated


def cell(passed, generated):
    """A number of tests, and of the cases that they generated."""
    if not passed:
        return "none"
    return f"{passed}, on {generated:,} generated cases" if generated else str(passed)


def table(folder):
    totals = {}
    for path in sorted(folder.glob("*.xml")):
        backend = path.stem.rpartition("-")[2]
        if backend in BACKENDS:
            passed, generated = counted(path)
            known = totals.setdefault(backend, (collections.Counter(), collections.Counter()))
            known[0].update(passed)
            known[1].update(generated)
    shown = [backend for backend in BACKENDS if backend in totals]
    files = {file for some in PROMISES.values() for file in some}
    unknown = {file for passed, _ in totals.values() for file in passed} - files
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: say in PROMISES what these tests show")
    lines = [
        "| promise | tests | " + " | ".join(BACKENDS[backend] for backend in shown) + " |",
        "|---|---|" + "--:|" * len(shown),
    ]
    for promise, some in PROMISES.items():
        links = ", ".join(
            "code blocks" if one == "documents" else f"[{one}]({SOURCES}/{one}.py)" for one in some
        )
        cells = [cell(*(sum(one[file] for file in some) for one in totals[b])) for b in shown]
        lines.append(f"| {promise} | {links} | {' | '.join(cells)} |")
    sums = [cell(*(one.total() for one in totals[backend])) for backend in shown]
    lines.append(f"| all | | {' | '.join(sums)} |")
    return "\n".join(lines)


def main(options):
    start, end = "<!-- promises -->\n", "\n<!-- /promises -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    runs = sorted({path.stem.rpartition("-")[0] for path in options.results.glob("*.xml")})
    day = dt.datetime.now(tz=dt.UTC).date()
    text = f"{table(options.results)}\n\nTests passed in {', '.join(runs)}, written on {day}."
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(PARSER.parse_args())
