"""What all tests share: the backend they run on, a seed, and small data."""

import os
from types import SimpleNamespace

import hypothesis
import keras
import numpy as np
import pytest

from helpers import BACKEND

hypothesis.settings.register_profile("default", max_examples=300, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_report_header() -> str:
    return f"keras {keras.__version__} on {BACKEND}"


def pytest_sessionstart() -> None:
    expected = os.environ.get("LOSSARGS_TEST_BACKEND", BACKEND)
    if expected != BACKEND:
        pytest.exit(f"these tests were to run on {expected}, Keras runs on {BACKEND}", returncode=3)


@pytest.fixture(autouse=True)
def seed() -> None:
    keras.utils.set_random_seed(0)


@pytest.fixture
def data() -> SimpleNamespace:
    """A regression problem with a mask and a weight for each sample."""
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        x=rng.normal(size=(12, 3)).astype("float32"),
        y=rng.normal(size=(12, 2)).astype("float32"),
        mask=rng.random((12, 2)) > 0.4,
        weight=rng.random(12).astype("float32"),
    )
