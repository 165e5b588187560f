"""Every code block of README and site, and every example of a docstring, is a test (Sybil)."""

import os
import tempfile
from pathlib import Path
from typing import Any

import keras
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser


def enter_folder(namespace: dict[str, Any]) -> None:
    """Let the examples write their files to a folder that goes away."""
    namespace["_before"], namespace["_folder"] = os.getcwd(), tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)
    # Each page is a module of its own, as for its readers: two may define a loss of one name.
    namespace["__name__"] = Path(namespace["_folder"].name).name
    keras.utils.set_random_seed(0)


def leave_folder(namespace: dict[str, Any]) -> None:
    """Go back to where the tests were."""
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


pages = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md"],
    setup=enter_folder,
    teardown=leave_folder,
)
docstrings = Sybil(parsers=[DocTestParser()], patterns=["src/**/*.py"])
pytest_collect_file = (pages + docstrings).pytest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on Keras's NumPy backend what needs gradients: marked tests, pages, derivatives."""
    if keras.backend.backend() == "numpy":
        for item in items:
            is_page = item.path.suffix == ".md"
            if is_page or item.get_closest_marker("fit") or item.path.name == "_derivatives.py":
                item.add_marker(pytest.mark.skip(reason="Keras's NumPy backend has no gradients"))
