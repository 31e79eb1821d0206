"""A tiny model with its data, for tests of run plans."""

from pathlib import Path

import pytest

from tests.helpers.plans import NUM_SAMPLES
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`model` (4 layers, 4 heads, 2 groups, feed-forward 48, vocabulary 99, 512 positions) and `data`."""
    folder = tmp_path_factory.mktemp("plan")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(NUM_SAMPLES))
    return folder


@pytest.fixture
def settings(folder):
    """Makes settings of a tiny run on that folder."""
    return lambda **changes: make_settings(str(folder / "model"), str(folder / "data"), **changes)
