"""The site tells of all that is public, and errors lead to their sections in it."""

import ast
import copy
import pickle
import re
import tomllib
from pathlib import Path

import pytest

import lossargs
from lossargs import LossArgsError
from lossargs._errors import DOCUMENTATION

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src/lossargs").glob("*.py"))
PUBLIC = {name: getattr(lossargs, name) for name in lossargs.__all__}
ERRORS = {
    name: cls
    for name, cls in PUBLIC.items()
    if isinstance(cls, type) and issubclass(cls, LossArgsError)
}


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def is_message(term, text):
    """Whether the page means this message: … stands for names and values, and for what is left."""
    parts = [re.escape(part.strip()) for part in term.split("…")]
    return re.search(".*".join(parts), text) is not None


def messages():
    """Each message in the source, with … for names and values, and the error it is raised for."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            if node.func.id in ERRORS:
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                said = "".join(p.value if isinstance(p, ast.Constant) else "…" for p in parts)
                yield node.func.id, " ".join(said.split())


def sections():
    """The messages of each error on the page of errors."""
    _, *parts = re.split(r"^## ", page("errors.md"), flags=re.MULTILINE)
    return {
        part.partition("\n")[0]: re.findall(r"^`(.+)`\n: ", part, flags=re.MULTILINE)
        for part in parts
    }


def test_errors_and_their_page_agree():
    known, found = sections(), list(messages())
    assert set(known) == {*ERRORS, "ModuleNotFoundError"}
    assert len(found) > 50
    for name, said in found:
        assert any(is_message(term, said) for term in known[name]), f"{name}: {said}"
    for name in ERRORS:
        for term in known[name]:
            said = (text for error, text in found if error == name)
            assert any(is_message(term, text) for text in said), f"{name}: {term}"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leads_to_its_section(name):
    class OwnError(ERRORS[name]):
        pass

    for cls in (ERRORS[name], OwnError):
        error = cls("what is wrong")
        for one in (error, copy.copy(error)):
            assert str(one) == "what is wrong"
            assert one.__notes__ == [f"More: {DOCUMENTATION}errors/#{name.lower()}"]
    assert pickle.loads(pickle.dumps(ERRORS[name]("wrong"))).__notes__ == error.__notes__


def test_the_site_has_one_address_and_reaches_all():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"^site_url: (.*)$", config, flags=re.MULTILINE) == [DOCUMENTATION]
    assert project["urls"]["Documentation"] == DOCUMENTATION
    documented = re.findall(r"^::: lossargs\.(\w+)$", page("reference.md"), flags=re.MULTILINE)
    assert sorted(documented) == sorted(PUBLIC)
    docs = ROOT / "docs"
    reached = re.findall(r"\S+\.md$", config.partition("\nnav:\n")[2], flags=re.MULTILINE)
    assert sorted(reached) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))
    text = "".join(path.read_text(encoding="utf-8") for path in docs.rglob("*.md"))
    assert [one for one in docs.glob("*.png") if f"({one.name})" not in text] == []
