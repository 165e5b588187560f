"""Every code block of the README and every example of a docstring is a test (Sybil)."""

import keras
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

readme = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md"])
docstrings = Sybil(parsers=[DocTestParser()], patterns=["src/**/*.py"])

# The README trains, which Keras's NumPy backend cannot.
parts = [docstrings] if keras.backend.backend() == "numpy" else [readme, docstrings]
pytest_collect_file = sum(parts[1:], parts[0]).pytest()
