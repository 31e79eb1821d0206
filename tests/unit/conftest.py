"""A tiny model with its data, for tests of run plans."""

from pathlib import Path

import pytest

# Imported where they are used: they bring megatron-core along, which tests of data need not wait for.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`model` (4 layers, 4 heads, 2 groups, feed-forward 48, vocabulary 99, 512 positions) and `data`."""
    from tests.helpers.plans import NUM_SAMPLES
    from tests.helpers.workbench import make_model, make_samples, make_store

    folder = tmp_path_factory.mktemp("plan")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(NUM_SAMPLES))
    return folder


@pytest.fixture
def settings(folder):
    """Makes settings of a tiny run on that folder."""
    from tests.helpers.workbench import make_settings

    return lambda **changes: make_settings(str(folder / "model"), str(folder / "data"), **changes)
