"""Write the table of `bench_derivatives.py` on all backends into a README, between its marks.

python report.py derivatives-*.json --readme README.md
"""

import argparse
import json
from pathlib import Path

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("results", nargs="+", type=Path, metavar="PATH.json")
PARSER.add_argument("--readme", type=Path, metavar="PATH.md", help="write the table there")
MARKS = "<!-- derivatives -->\n", "\n<!-- /derivatives -->"
NAMES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
UNITS = {"temporary bytes": ("MB of temporary memory", 1e-6), "operators": ("operators run", 1)}


def program(numbers):
    """What a step is, in words: all that is neither a time nor a ratio."""
    rest = [name for name in numbers if name not in ("milliseconds", "ratio", "quartiles")]
    parts = []
    for name in rest:
        unit, factor = UNITS.get(name, (name, 1))
        parts.append(f"{numbers[name] * factor:,.{2 if factor < 1 else 0}f} {unit}")
    return ", ".join(parts)


def table(records):
    """A row for each backend, way to run, size and form."""
    rows = [["", "network", "derivatives", "step time", "quartiles", "ms", "the step"]]
    for record in records:
        for case, forms in record["results"].items():
            size, mode = case.split(", ")
            depth, width, batch = record["sizes"][size]
            for form, numbers in forms.items():
                lower, upper = numbers["quartiles"]
                spread = "" if form == "by hand" else f"{lower:.2f} to {upper:.2f}"
                rows.append([
                    f"{NAMES[record['backend']]}, {mode}", f"{depth} x {width}, batch {batch}",
                    form, f"{numbers['ratio']:.2f}", spread, f"{numbers['milliseconds']:.2f}",
                    program(numbers),
                ])  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---|---|--:|---|--:|---|")
    return "\n".join(lines)


def measured_with(records):
    """The machine and the versions, in a sentence."""
    versions = {}
    for record in records:
        versions |= record["versions"]
    known = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    first = records[0]
    return (
        f"Measured on {first['machine']}, Python {first['python']}, with {known}; "
        f"{first['turns']} turns of each."
    )


def main(options):
    records = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    text = f"{table(records)}\n\n{measured_with(records)}"
    print(text)
    if options.readme:
        before, rest = options.readme.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        whole = f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"
        options.readme.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    main(PARSER.parse_args())
