"""The site tells of all that is public, and errors lead to their sections in it."""

import ast
import copy
import pickle
import re
import tomllib
from pathlib import Path

import pytest

import lossargs
from helpers import message_of
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
    """Each message in the source, with … for names and values, and the errors it is raised for."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            # One function raises what its caller says: `error(...)`.
            names = {"error": ["ArgumentError", "BatchError"]}.get(node.func.id, [node.func.id])
            if any(name in ERRORS for name in names):
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                said = "".join(p.value if isinstance(p, ast.Constant) else "…" for p in parts)
                yield from ((name, " ".join(said.split())) for name in names)


def sections():
    """The messages of each error on the page of errors."""
    _, *parts = re.split(r"^## ", page("errors.md"), flags=re.MULTILINE)
    return {
        part.partition("\n")[0]: re.findall(r"^`(.+)`\n: ", part, flags=re.MULTILINE)
        for part in parts
    }


def test_there_is_a_section_for_each_error():
    assert set(sections()) == {*ERRORS, "ModuleNotFoundError"}


def test_each_message_of_the_library_is_on_the_page():
    found = list(messages())
    assert len(found) > 50
    known = sections()
    for name, said in found:
        assert any(is_message(term, said) for term in known[name]), f"{name}: {said}"


def test_each_message_on_the_page_is_one_of_the_library():
    found = list(messages())
    known = sections()
    for name in ERRORS:
        for term in known[name]:
            said = (text for error, text in found if error == name)
            assert any(is_message(term, text) for text in said), f"{name}: {term}"


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leads_to_its_section(name):
    error = ERRORS[name]("what is wrong")
    assert str(error) == "what is wrong"
    assert error.__notes__ == [f"More: {DOCUMENTATION}errors/#{name.lower()}"]


def test_the_link_of_a_subclass_leads_to_what_is_documented():
    class OwnError(lossargs.BatchError):
        pass

    assert OwnError("wrong").__notes__ == [f"More: {DOCUMENTATION}errors/#batcherror"]


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_copy_of_an_error_has_the_link_once(copied):
    error = copied(lossargs.SavingError("wrong"))
    assert message_of(error) == "wrong"
    assert len(error.__notes__) == 1


def test_one_address_is_said_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Documentation"] == DOCUMENTATION
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"^site_url: (.*)$", config, flags=re.MULTILINE) == [DOCUMENTATION]


def test_every_public_name_is_in_the_reference():
    documented = re.findall(r"^::: lossargs\.(\w+)$", page("reference.md"), flags=re.MULTILINE)
    assert sorted(documented) == sorted(PUBLIC)


def test_every_page_is_reached():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    _, _, navigation = config.partition("\nnav:\n")
    reached = re.findall(r"\S+\.md$", navigation, flags=re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(reached) == sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))


def test_every_picture_is_named():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    for picture in (ROOT / "docs").glob("*.png"):
        assert f"({picture.name})" in text, picture
