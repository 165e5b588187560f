"""The package imports no backend and leaves `KERAS_BACKEND` alone."""

import ast
from pathlib import Path

import pytest

import lossargs
from helpers import BACKEND, run_python

PACKAGE = Path(lossargs.__file__).parent

# Prints what modules whose name starts with "lossargs" import of the backends, even if loaded.
WATCHED = """
import builtins, os, sys
import keras
before, plain, found = dict(os.environ), builtins.__import__, []

def watching(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {{}}).get("__name__", "")
    if importer.startswith("lossargs") and name.split(".")[0] in ("jax", "tensorflow", "torch"):
        found.append((importer, name))
    return plain(name, globals, locals, fromlist, level)

builtins.__import__ = watching
sys.path.insert(0, {path!r})
import lossargs
{extra}
assert dict(os.environ) == before
print(found)
"""


def test_no_backend_is_imported():
    assert run_python(WATCHED.format(path=str(PACKAGE.parent), extra="")).strip() == "[]"


@pytest.mark.skipif(BACKEND == "numpy", reason="nothing to import")
def test_that_test_can_fail(tmp_path):
    (tmp_path / "lossargs_cheat.py").write_text(f"import {BACKEND}\n")
    extra = f"sys.path.insert(0, {str(tmp_path)!r}); import lossargs_cheat"
    output = run_python(WATCHED.format(path=str(PACKAGE.parent), extra=extra)).strip()
    assert output == f"[('lossargs_cheat', '{BACKEND}')]"


def test_private_names_of_keras_live_in_one_module():
    users = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras.src"):
                users.add(path.name)
    assert users == {"_keras.py"}


def private_attributes(*, of_others):
    """Those that the package uses, of objects other than `self` and `cls`; or those it makes."""
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not of_others:
                yield path.name, node.name
            if isinstance(node, ast.AnnAssign) and not of_others:
                yield path.name, getattr(node.target, "id", "")
            if isinstance(node, ast.Attribute):
                is_own = getattr(node.value, "id", "") in ("self", "cls")
                if of_others != is_own:
                    yield path.name, node.attr


def test_private_attributes_of_others_are_used_in_one_module():
    own = {name for _, name in private_attributes(of_others=False)}
    others = {
        (file, name)
        for file, name in private_attributes(of_others=True)
        if name.startswith("_") and not name.endswith("__") and name not in own
    }
    assert {file for file, _ in others} == {"_keras.py"}, others


def test_one_module_names_backends():
    users = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] in ("jax", "tensorflow", "torch") for name in names):
                users.add(path.name)
    assert users == {"_autodiff.py"}


def test_imports_go_in_one_direction():
    order = [
        *("_errors", "_backends", "_keras", "_autodiff", "_values", "_serialization", "_function"),
        *("_live", "_objects", "_call", "_loss", "_factory", "_layer", "_derivatives", "_attach"),
        *("__init__", "__main__"),
    ]
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(order)
    for place, module in enumerate(order):
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lossargs."):
                assert order.index(node.module.removeprefix("lossargs.")) < place
