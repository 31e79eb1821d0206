"""Damaged files are found on demand, and nothing is converted from them."""

import json

import pytest

from megatron_sstoken.checkpoint.manifest import checkpoint_steps
from megatron_sstoken.commands.convert_checkpoint import main
from megatron_sstoken.conversion.check import check_folders
from megatron_sstoken.conversion.hf import from_hf, reshard, to_hf
from megatron_sstoken.conversion.work import ConversionOptions
from megatron_sstoken.integrity import CHECKSUMS, damage
from tests.helpers.flip import flip_bit
from tests.helpers.workbench import make_model, make_samples, make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(4, seed=3))
    return folder


@pytest.fixture
def checkpoint(folder, tmp_path):
    return from_hf(str(folder / "model"), str(tmp_path / "checkpoint"))


def test_everything_below_a_path_is_compared(folder, checkpoint, capsys):
    exported = to_hf(str(checkpoint), str(checkpoint.parent / "hf"))
    assert main(["check", str(checkpoint.parent), str(folder / "data")]) == 0
    assert "whole: " in capsys.readouterr().out
    flip_bit(exported / "model.safetensors")
    (folder / "data" / "rows.npy").rename(folder / "data" / "elsewhere")
    assert main(["check", str(checkpoint.parent), str(folder / "data")]) == 1
    told = capsys.readouterr().out
    (folder / "data" / "elsewhere").rename(folder / "data" / "rows.npy")
    assert (
        f"{exported / 'model.safetensors'} is damaged" in told and f"{folder / 'data' / 'rows.npy'} is missing" in told
    )
    assert "2 of " in told and " files are damaged" in told


def test_a_path_without_checksums_is_told(folder, capsys):
    assert main(["check", str(folder / "model")]) == 2
    assert "holds no checksums.json" in capsys.readouterr().err


@pytest.mark.parametrize("convert", [to_hf, reshard])
def test_nothing_is_published_of_a_damaged_checkpoint(checkpoint, convert):
    (step,) = checkpoint_steps(str(checkpoint)).values()
    data = max(step.glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip_bit(data)
    output = checkpoint.parent / "out"
    with pytest.raises(ValueError, match=f"{data.name} is damaged: .*--no-verify"):
        convert(str(checkpoint), str(output))
    assert not output.exists()
    convert(str(checkpoint), str(output), options=ConversionOptions(verify=False))
    assert check_folders([output]).problems == []


def test_a_damaged_folder_of_weights_is_not_converted(checkpoint):
    exported = to_hf(str(checkpoint), str(checkpoint.parent / "hf"))
    config = exported / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.5}))
    assert from_hf(str(exported), str(checkpoint.parent / "again")), "people edit a configuration"
    flip_bit(exported / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        from_hf(str(exported), str(checkpoint.parent / "never"))


def test_a_conversion_that_goes_on_keeps_its_checksums(checkpoint, monkeypatch):
    """Files that a stopped conversion has finished are not written, or read, again."""
    from megatron_sstoken.conversion import hf

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    output = checkpoint.parent / "hf"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hf, "copy_companions", stop)
        to_hf(str(checkpoint), str(output))
    assert not output.exists()
    to_hf(str(checkpoint), str(output))
    assert damage(output) == [] and (output / CHECKSUMS).is_file()
