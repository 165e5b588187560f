"""Sentences that users read are short, and use plain words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST = 25  # words in a sentence
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SOURCES = sorted((ROOT / "src/lossargs").glob("*.py"))
FORBIDDEN = (
    "in silence", "anew", "of late", "mend", "by itself", "company", "stands for", "goes on",
    "it is that", "whatever",
)  # fmt: skip
# Longer sentences that stay: the file, the first words, and the reason.
EXCEPTIONS: dict[tuple[str, str], str] = {}

FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2[^\n]*$", re.MULTILINE | re.DOTALL)
ASIDE = re.compile(r"\A---\n.*?\n---\n|<!--.*?-->|<svg.*?</svg>|</?\w[^>]*>", re.DOTALL)
BLOCK = re.compile(r"^\s*([-*] |\d+\. |:   |#+ |\||!!! |\?\?\? |>>> )|^\s*$")
END = re.compile(r"(?<=[.!?])[\"'*_)]*\s+")


def sentences(text: str) -> Iterator[str]:
    """The sentences of Markdown text without code, headings and tables' rules."""
    text = ASIDE.sub("", FENCE.sub("", text))
    blocks: list[str] = [""]
    for line in text.splitlines():
        if BLOCK.match(line):
            blocks.append("")
        if re.match(r"\s*(#|!!!|\?\?\?|--8<--)", line) or re.fullmatch(r"`[^\n]*`", line):
            continue  # headings, titles of boxes, messages
        blocks[-1] += f" {line.strip()}"
    for block in blocks:
        cells = block.split("|") if block.lstrip().startswith("|") else [block]
        for cell in cells:
            plain = re.sub(r"^\s*([-*]|\d+\.|:)\s+", "", cell)
            plain = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\{[^}]*\})", r"\1", plain)
            plain = re.sub(r"``?[^`]+``?", "`code`", plain)
            plain = plain.replace("e.g.", "such as").replace("et al.", "others")
            yield from (one for one in END.split(plain) if re.search(r"[a-z]", one))


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """The docstrings of a module, with the names of what they describe."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", path.name), text


def prose_of(docstring: str) -> str:
    """A docstring as Markdown: without examples and references, each argument as an item."""
    prose, section, indent = [], "", 0
    for line in docstring.splitlines():
        title = re.fullmatch(r"( *)(\w[\w ]*):", line)
        if title and not title[1]:
            section, indent = title[2], 0
            prose.append("")
        elif section == "References" or re.match(r"\s*(>>>|\.\.\. ?)", line):
            prose.append("")
        elif line.strip():
            depth = len(line) - len(line.lstrip())
            indent = indent or depth
            is_item = section in ("Args", "Attributes", "Raises") and depth == indent
            is_code = not section and depth >= 4
            item = f"- {line.strip().partition(': ')[2]}"
            prose.append("" if is_code else item if is_item else line)
        else:
            prose.append("")
    return "\n".join(prose)


def count(sentence: str) -> int:
    """The number of words, where code is one word."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def excused(path: Path, sentence: str) -> bool:
    return any(
        path.name == name and sentence.strip().startswith(start) for name, start in EXCEPTIONS
    )


def too_long(path: Path, text: str) -> list[str]:
    found = [one for one in sentences(text) if count(one) > LONGEST]
    return [f"{count(one)}: {one.strip()}" for one in found if not excused(path, one)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_sentences_of_pages_are_short(path):
    assert not too_long(path, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sentences_of_docstrings_are_short(path):
    found = {name: too_long(path, prose_of(text)) for name, text in docstrings(path)}
    assert not {name: long for name, long in found.items() if long}


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.name)
def test_words_are_plain(path):
    text = " ".join(path.read_text(encoding="utf-8").split())
    found = [word for word in FORBIDDEN if re.search(rf"\b{word}\b", text, re.IGNORECASE)]
    assert not found


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.name)
def test_no_clause_is_a_subject(path):
    text = path.read_text(encoding="utf-8")
    texts = [prose_of(one) for _, one in docstrings(path)] if path in SOURCES else [text]
    found = [one.strip() for text in texts for one in sentences(text)]
    assert not [one for one in found if re.match(r"What\b.*[^?]$", one)]


def test_exceptions_are_needed():
    for name, start in EXCEPTIONS:
        (path,) = [path for path in (*PAGES, *SOURCES) if path.name == name]
        whole = path.read_text(encoding="utf-8")
        texts = [prose_of(one) for _, one in docstrings(path)] if path in SOURCES else [whole]
        long = [s.strip() for t in texts for s in sentences(t) if count(s) > LONGEST]
        assert any(one.startswith(start) for one in long), f"{name}: {start}"


def test_the_measure_finds_what_it_should():
    long = " ".join(["word"] * LONGEST)
    text = f"# {long} title\n\nOne. {long} `two words` here.\n- {long} more.\n\n```\n{long} x\n```"
    assert [count(one) for one in sentences(text)] == [1, LONGEST + 2, LONGEST + 1]
    text = f"Return x.\n\nArgs:\n    x: {long} y.\n        {long}.\n\nExamples:\n    >>> {long}"
    assert [count(one) for one in sentences(prose_of(text))] == [2, LONGEST + 1, LONGEST]
