"""The package imports no backend, leaves `KERAS_BACKEND` alone, and keeps private names apart."""

import ast
import re
from pathlib import Path

import pytest

import lossargs
from helpers import BACKEND, TESTS, run_python

PACKAGE = Path(lossargs.__file__).parent
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in PACKAGE.rglob("*.py")
}
# The parts of `_keras` are one module here.
TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
MODULES = {name.partition(".")[0] for name in TREES}
BACKENDS = ("jax", "tensorflow", "torch")

# Prints what modules whose name starts with "lossargs" import of the backends, even if loaded.
WATCHED = """
import builtins, os, sys
import keras
before, plain, found = dict(os.environ), builtins.__import__, []

def watching(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {{}}).get("__name__", "")
    if importer.startswith("lossargs") and name.split(".")[0] in {backends!r}:
        found.append((importer, name))
    return plain(name, globals, locals, fromlist, level)

builtins.__import__ = watching
sys.path[:0] = {paths!r}
import lossargs
assert dict(os.environ) == before
print(found)
import lossargs_cheat
print(found)
"""


@pytest.mark.skipif(BACKEND == "numpy", reason="nothing to import")
def test_no_backend_is_imported(tmp_path):
    (tmp_path / "lossargs_cheat.py").write_text(f"import {BACKEND}\n")
    paths = [str(tmp_path), str(PACKAGE.parent)]
    found = run_python(WATCHED.format(backends=BACKENDS, paths=paths)).splitlines()
    assert found == ["[]", f"[('lossargs_cheat', '{BACKEND}')]"]  # and so the test can fail


def imported():
    """The name of each module, and of each that it imports."""
    for name, tree in TREES.items():
        module = name.partition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                yield module, node.module or ""


def test_one_module_names_backends_and_one_what_is_private_in_keras():
    assert {f for f, name in imported() if name.split(".")[0] in BACKENDS} == {"_autodiff"}
    assert {f for f, name in imported() if name.startswith("keras.src")} == {"_keras"}


def test_private_attributes_of_others_are_used_in_one_module():
    own, others = set(), set()
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            if isinstance(node, ast.AnnAssign):
                own.add(getattr(node.target, "id", ""))
            if isinstance(node, ast.Attribute):
                is_own = getattr(node.value, "id", "") in ("self", "cls")
                own |= {node.attr} if is_own else set()
                others |= set() if is_own else {(file.partition(".")[0], node.attr)}
    private = {
        (file, name)
        for file, name in others
        if name.startswith("_") and not name.endswith("__") and name not in own
    }
    assert {file for file, _ in private} == {"_keras"}, private


def test_imports_go_in_the_order_that_contributing_tells():
    text = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("| module | holds |")[2].partition("\n\n")[0]
    order = [*re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE), "__init__"]
    assert sorted(order) == sorted(MODULES)
    for module, name in imported():
        if name.startswith("lossargs."):
            other = name.removeprefix("lossargs.").partition(".")[0]
            assert order.index(other) < order.index(module) or other == module == "_keras"
