"""What MkDocs does besides: parts of the repository's own files, shown where they are named.

`<!-- part README.md benchmarks -->` in a page becomes what stands in that file between
`<!-- benchmarks -->` and `<!-- /benchmarks -->`, so that nothing is written twice.
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parent.parent
PART = re.compile(r"^<!-- part (?P<file>\S+) (?P<name>\S+) -->$", re.MULTILINE)


def part_of(match: re.Match[str]) -> str:
    """The text between the marks of one name in one file."""
    file, name = match["file"], match["name"]
    text = (ROOT / file).read_text(encoding="utf-8")
    _, opened, rest = text.partition(f"<!-- {name} -->")
    part, closed, _ = rest.partition(f"<!-- /{name} -->")
    if not (opened and closed):
        raise PluginError(f"{file} has no part <!-- {name} --> ... <!-- /{name} -->.")
    return part.strip()


def on_page_markdown(markdown: str, **_: object) -> str:
    """Called by MkDocs for each page."""
    return PART.sub(part_of, markdown)
