"""Names of models on the hub that are in this machine's cache."""

import pytest
from huggingface_hub import constants

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.commands.convert_checkpoint import parse_arguments
from megatron_sstoken.folders import hub_name, local_model


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A model in a cache as the hub's library lays it out."""
    repository = tmp_path / "hub" / "models--meta--Llama-1B"
    folder = repository / "snapshots" / "a1b2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a1b2")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_name_in_the_cache_is_its_folder(snapshot):
    assert local_model("meta/Llama-1B") == str(snapshot)
    assert hub_name(str(snapshot)) == "meta/Llama-1B"
    for path in ("meta/Llama-2B", "models/Llama-1B", "Llama-1B", str(snapshot), "./meta/Llama-1B"):
        assert local_model(path) == path
    assert hub_name("models/Llama-1B") is None


def test_what_exists_here_goes_before_the_cache(snapshot, tmp_path):
    (tmp_path / "meta" / "Llama-1B").mkdir(parents=True)
    assert local_model("meta/Llama-1B") == "meta/Llama-1B"


def test_settings_take_such_names(snapshot):
    names = ("model.hf_path", "history.hf_path", "history.reference_hf_path")
    settings, _ = parse_settings([f"--{name}=meta/Llama-1B" for name in names], program="", description="")
    assert {settings.model.hf_path, settings.history.hf_path, settings.history.reference_hf_path} == {str(snapshot)}


def test_conversions_take_such_names(snapshot):
    named = parse_arguments("from-peft --adapter meta/Llama-1B --hf meta/Llama-1B --output out".split())
    assert (named.adapter, named.hf) == (str(snapshot), str(snapshot))
