"""Write the tables and the picture of what was measured on all backends.

    python report.py benchmarks/results

The files there are named after the benchmark and the backend, `bench-jax.json`. Tables go between
the marks of `benchmarks/README.md` and `docs/speed.md`, the picture to `docs/benchmarks.png`.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("results", type=Path, metavar="FOLDER")
ROOT = Path(__file__).parent.parent
NAMES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
UNITS = {
    "temporary bytes": ("MB of temporary memory", 1e-6),
    "bytes made": ("MB made", 1e-6),
    "operators": ("operators run", 1),
}
COLOURS = {"constant": "#1b6ca8", "live": "#c8553d"}


def table(alignment, *rows):
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("--:" if one == "r" else "---" for one in alignment) + "|")
    return "\n".join(lines)


def program(numbers):
    """What a step is, in words: all that is neither a time nor a ratio."""
    rest = [name for name in numbers if name not in ("milliseconds", "ratio", "quartiles")]
    parts = []
    for name in rest:
        unit, factor = UNITS.get(name, (name, 1))
        parts.append(f"{numbers[name] * factor:,.{2 if factor < 1 else 0}f} {unit}")
    return ", ".join(parts)


def compared(numbers):
    """The cells of a time: ratio, quartiles, milliseconds."""
    lower, upper = numbers["quartiles"]
    is_base = lower == upper == 1
    spread = "" if is_base else f"{lower:.2f} to {upper:.2f}"
    slower = "slower: " if lower > 1 else ""  # in three turns of four
    return f"{slower}{numbers['ratio']:.2f}", spread, f"{numbers['milliseconds']:.2f}"


def derivatives(records):
    """A row for each backend, way to run, size and form."""
    rows = [("", "network", "derivatives", "step time", "quartiles", "ms", "the step")]
    for record in records:
        for case, forms in record["results"].items():
            size, mode = case.split(", ")
            depth, width, batch = record["sizes"][size]
            where = f"{NAMES[record['backend']]}, {mode}"
            rows += [
                (where, f"{depth} x {width}, batch {batch}", form, *compared(one), program(one))
                for form, one in forms.items()
            ]
    return table("lllrlrl", *rows)


def cases(records):
    """What was compared in steps: backend and mode, model, kind of argument, ways."""
    for record in records:
        for model, modes in record["steps"].items():
            for mode, kinds in modes.items():
                for kind, ways in kinds.items():
                    yield f"{NAMES[record['backend']]}, {mode}", model, kind, ways


def steps(records):
    """A row for each way to write a loss."""
    rows = [("", "model", "argument", "written as", "step time", "quartiles", "ms", "the step")]
    for where, model, kind, ways in cases(records):
        rows += [
            (where, model, kind, way, *compared(one), program(one)) for way, one in ways.items()
        ]
    return table("llllrlrl", *rows)


def in_short(records):
    """Lossargs alone: a row for each backend and mode, a column for each model and kind."""
    rows = {}
    for where, model, kind, ways in cases(records):
        rows.setdefault(where, {})[f"{model}, {kind}"] = compared(ways["lossargs"])[0]
    head = list(next(iter(rows.values())))
    body = [(where, *(row[one] for one in head)) for where, row in rows.items()]
    return table("l" + "r" * len(head), ("", *head), *body)


def counts(records, called):
    """What a step is, as counts that have no noise: a column for each model and kind."""
    rows = {}
    for where, model, kind, ways in cases(records):
        one, base = ways["lossargs"], next(iter(ways.values()))
        unit = next(name for name in base if name in ("instructions", "nodes", "operators"))
        cell = f"{one[unit]:,} / {base[unit]:,}"
        rows.setdefault(f"{where}: {unit}", {})[f"{model}, {kind}"] = cell
    head = list(next(iter(rows.values())))
    for kind, ways in list(called[0]["calls"].items())[:2]:
        base, *_, ours = (sum(one.values()) for one in ways.values())
        column = f"tiny, {'constant' if 'constant' in kind else 'live'}"
        rows.setdefault("PyTorch, eager: calls", {})[column] = f"{ours:,} / {base:,}"
    body = [(where, *(row.get(one, "") for one in head)) for where, row in rows.items()]
    return table("l" + "r" * len(head), ("", *head), *body)


def calls(records):
    """Python and C calls of a step on PyTorch, beside those of the first way."""
    rows = [("", "written as", "Python calls", "C calls", "beside by hand")]
    for name, ways in records[0]["calls"].items():
        base = sum(next(iter(ways.values())).values())
        rows += [
            (name, way, *(f"{n:,}" for n in one.values()), f"{sum(one.values()) / base:.3f}")
            for way, one in ways.items()
        ]
    return table("llrrr", *rows)


def changes(records):
    """A new value, in steps of training."""
    head = ("", "plain step, ms", "plain step again", "assign, and step")
    rows = [(*head, "compile again, and step", "traces for 100")]
    for record in records:
        one = record["changes"]
        traces = one.get("traces for 100 changes", "none to count: the loss runs in each step")
        rows.append((
            NAMES[record["backend"]], f"{one['step']['milliseconds']:.2f}",
            f"{one['step again']['ratio']:.2f} steps" if "step again" in one else "",
            f"{one['assign']['ratio']:.2f} steps", f"{one['compile again']['ratio']:.0f} steps",
            str(traces),
        ))  # fmt: skip
    return table("lrrrrr", *rows)


def binding(records):
    """Making losses, and the import."""
    kinds = [name for name, one in records[0]["binding"].items() if "microseconds" in str(one)]
    kept = "bytes kept after 100,000 binds"
    rows = [("", *(f"{kind}, µs" for kind in kinds), kept, "import beyond Keras's")]
    for record in records:
        one = record["binding"]
        theirs, ours = one["import"].values()
        rows.append((
            NAMES[record["backend"]],
            *(f"{one[kind]['microseconds']:.2f}" for kind in kinds),
            str(one[kept]), f"{ours:.0f} ms ({ours / theirs:.1%})",
        ))  # fmt: skip
    return table("l" + "r" * (len(kinds) + 2), *rows)


def growth(records):
    """Live arguments beside `compute_loss`."""
    head = ("", "growing", "to", "step time", "quartiles", "ms beyond", "by hand", "lossargs")
    rows = [(*head, "by hand again")]
    for record in records:
        for kind, sizes in record["growth"].items():
            for size, ways in sizes.items():
                ours, base = ways["lossargs"], ways["compute_loss"]
                ratio, spread, _ = compared(ours)
                beyond = f"{ours['milliseconds'] - base['milliseconds']:+.2f}"
                where = NAMES[record["backend"]]
                cells = where, kind, size, ratio, spread, beyond, program(base), program(ours)
                null = ways.get("compute_loss again")  # absent from older results
                rows.append((*cells, compared(null)[0] if null else ""))
    return table("lllrlrllr", *rows)


def sums(records):
    """Sums of terms beside one function."""
    rows = [("", "terms", "written as", "step time", "quartiles", "ms", "the step")]
    for record in records:
        for mode, counts in record["sums"].items():
            where = f"{NAMES[record['backend']]}, {mode}"
            rows += [
                (where, count, way, *compared(one), program(one))
                for count, ways in counts.items()
                for way, one in ways.items()
            ]
    return table("lrlrlrl", *rows)


def balanced(records):
    """Four terms with balanced weights beside fixed ones."""
    rows = [("", "model", "weights", "step time", "quartiles", "ms", "the step")]
    for record in records:
        for mode, cases_ in record["balanced"].items():
            where = f"{NAMES[record['backend']]}, {mode}"
            rows += [
                (where, case, way, *compared(one), program(one))
                for case, ways in cases_.items()
                for way, one in ways.items()
            ]
    return table("lllrlrl", *rows)


def measured_with(records):
    """The machine and the versions, in a sentence."""
    versions = {}
    for record in records:
        versions |= record["versions"]
    known = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    first = records[0]
    accelerators = ", ".join(first.get("accelerators", [])) or "no GPU"
    turns = min(record["turns"] for record in records)
    return (
        f"Measured on {first['machine']}, {accelerators}, Python {first['python']}, with {known}. "
        f"Each has {turns} turns or more."
    )


def picture(records, path):
    """Step times of lossargs as ratios to those by hand, with quartiles."""
    mpl.use("Agg")
    shown = list(cases(records))
    groups = list(dict.fromkeys((where, model) for where, model, _, _ in shown))
    fig, ax = plt.subplots(figsize=(8, 0.34 * len(groups) + 1.4), layout="constrained")
    for kind, offset in (("constant", -0.15), ("live", 0.15)):
        found = [
            (groups.index((where, model)) + offset, ways["lossargs"])
            for where, model, one, ways in shown
            if one == kind
        ]
        places = [place for place, _ in found]
        ratios = [one["ratio"] for _, one in found]
        spread = [
            [max(0, one["ratio"] - one["quartiles"][0]) for _, one in found],
            [max(0, one["quartiles"][1] - one["ratio"]) for _, one in found],
        ]
        base = {"constant": "a constant, beside the closure"}.get(
            kind, "live arguments, beside compute_loss"
        )
        ax.errorbar(
            ratios, places, xerr=spread, fmt="o", ms=5, capsize=2, color=COLOURS[kind], label=base
        )
    ax.axvline(1, color="0.4", lw=1)
    ax.set_yticks(range(len(groups)), [f"{where}: {model}" for where, model in groups])
    ax.invert_yaxis()
    ax.set_xlabel("step time, lossargs / by hand (median and quartiles of paired turns)")
    ax.grid(axis="x", color="0.9")
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    fig.legend(loc="outside upper center", ncols=2, frameon=False)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def put(path, mark, text):
    """Write a text between the marks of a file."""
    start, end = f"<!-- {mark} -->\n", f"\n<!-- /{mark} -->"
    before, rest = path.read_text(encoding="utf-8").split(start)
    after = rest.split(end)[1]
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def read(folder, benchmark):
    paths = [folder / f"{benchmark}-{backend}.json" for backend in NAMES]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def main(options):
    here = ROOT / "benchmarks" / "README.md"
    put(here, "calls", calls(read(options.results, "calls")))
    found = read(options.results, "derivatives")
    put(here, "derivatives", f"{derivatives(found)}\n\n{measured_with(found)}")
    found = read(options.results, "bench")
    for one in (steps, changes, binding, growth, sums, balanced):
        put(here, one.__name__, f"{one(found)}\n\n{measured_with(found)}")
    put(ROOT / "docs" / "speed.md", "counts", counts(found, read(options.results, "calls")))
    put(ROOT / "docs" / "speed.md", "benchmarks", f"{in_short(found)}\n\n{measured_with(found)}")
    picture(found, ROOT / "docs" / "benchmarks.png")


if __name__ == "__main__":
    main(PARSER.parse_args())
