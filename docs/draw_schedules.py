"""Draw `schedules.png`: the schedules that `schedules.md` defines.

python docs/draw_schedules.py
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
PANELS = {
    "Warm up": "rate",
    "Repeat a cycle": "cycle",
    "Join schedules": "both",
    "Count epochs": "halved",
}
STEPS = np.arange(401)


def defined_on_page() -> dict[str, Any]:
    """Run the code of the page, and return its names."""
    keras.utils.set_random_seed(0)
    page = (HERE / "schedules.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "schedules_page"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the page saves a model
        for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
            exec(code, names)  # noqa: S102
            if "HalveOnPlateau" in code:
                names["followed"] = names["history"]["weight"]
        os.chdir(HERE)
    return names


def main() -> None:
    """Draw one panel for each schedule."""
    names = defined_on_page()
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    panels = figure.subplots(1, 5)
    for panel, (title, name) in zip(panels, PANELS.items(), strict=False):
        steps = STEPS[:25] if name == "halved" else STEPS
        values = [float(names[name](int(step))) for step in steps]
        panel.plot(steps, values, linewidth=2, drawstyle="steps-post")
        panel.set_title(title)
        panel.set_xlabel("step")
    panels[-1].step(range(len(names["followed"])), names["followed"], where="post", linewidth=2)
    panels[-1].set_title("Follow a metric")
    panels[-1].set_xlabel("epoch")
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "schedules.png", dpi=100)


if __name__ == "__main__":
    main()
