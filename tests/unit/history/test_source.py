"""What every history source says of itself."""

import pytest

from megatron_sstoken.config import SettingsError
from megatron_sstoken.history.source import history_sources
from megatron_sstoken.score import run
from tests.helpers.workbench import make_settings


def test_a_source_that_needs_training_is_refused_where_nothing_is_trained(tmp_path):
    """At once, whatever else the settings say, with the remedy."""
    moving = [name for name, source in history_sources().items() if source.needs_training]
    assert "previous_visit" in moving
    for name in moving:
        settings = make_settings("model", "data", history__source=name)
        with pytest.raises(SettingsError, match=f"history.source={name} compares with .*: use history.source=frozen"):
            run(settings, str(tmp_path / "records.parquet"))
