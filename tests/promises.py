"""Write what is promised, which tests show it, and how many passed in the last runs, into the docs.

    python promises.py build/tests

The files there are what pytest's `--junitxml` writes, `RUN-BACKEND.xml`: `tests-jax.xml`. The table
goes between the marks of `docs/promises.md`.
"""

import argparse
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


def passed_tests(path):
    """The tests that passed in a run: each one's file, and how many cases it generated."""
    for case in ET.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        if case.find("failure") is not None or case.find("error") is not None:
            raise SystemExit(f"{path}: {case.get('name')} failed; the page tells of runs that pass")
        parts = case.get("classname").split(".")
        file = next((part for part in parts if part.startswith("test_")), "documents")
        found = {one.get("name"): one.get("value") for one in case.iter("property")}
        yield (*parts, case.get("name")), file, int(found.get("generated", 0))


def cell(numbers):
    """How many tests passed, and how many cases they generated, by the cases of each."""
    cases = sum(numbers)
    return f"{len(numbers)}, on {cases:,} generated cases" if cases else str(len(numbers) or "none")


def table(paths):
    tests = {}  # of each backend; what several runs have in common counts once, with the most cases
    for path in paths:
        known = tests.setdefault(path.stem.rpartition("-")[2], {})
        for test, file, cases in passed_tests(path):
            known[test] = max(known.get(test, (file, 0)), (file, cases))
    shown = [backend for backend in BACKENDS if backend in tests]
    files = {file for some in PROMISES.values() for file in some}
    unknown = {file for known in tests.values() for file, _ in known.values()} - files
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: say in PROMISES what these tests show")
    lines = [
        "| promise | tests | " + " | ".join(BACKENDS[backend] for backend in shown) + " |",
        "|---|---|" + "--:|" * len(shown),
    ]
    for promise, some in {**PROMISES, "all": sorted(files)}.items():
        links = [
            "code blocks" if one == "documents" else f"[{one}]({SOURCES}/{one}.py)" for one in some
        ]
        cells = [cell([n for file, n in tests[b].values() if file in some]) for b in shown]
        lines.append(
            f"| {promise} | {', '.join(links) * (promise != 'all')} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main(options):
    start, end = "<!-- promises -->\n", "\n<!-- /promises -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    paths = [
        p for p in sorted(options.results.glob("*.xml")) if p.stem.rpartition("-")[2] in BACKENDS
    ]
    runs = sorted({path.stem.rpartition("-")[0] for path in paths})
    days = sorted(ET.parse(path).find("testsuite").get("timestamp")[:10] for path in paths)
    day = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    when = f"Tests that passed, of the runs {', '.join(runs)}, {day}."
    text = f"{table(paths)}\n\n{when}"
    PAGE.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(PARSER.parse_args())
