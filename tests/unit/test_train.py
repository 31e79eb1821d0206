"""The dry run: the plan or all problems, once, and nothing made."""

import json
import pickle
from dataclasses import asdict

import pytest
import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties, TensorStorageMetadata

from megatron_sstoken.train import main
from megatron_sstoken.training.resume import identity_of, objective_of
from megatron_sstoken.validate.describe import describe
from megatron_sstoken.validate.run import plan_run
from tests.helpers.cli import settings_arguments
from tests.helpers.plans import problems_of
from tests.helpers.workbench import make_samples, make_store

# `main` reads the settings with what jsonargparse 4.49 renamed; the old name goes with its version 5.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def dry_run(settings, *options: str) -> int:
    return main([*settings_arguments(settings), "--dry_run", *options])


def test_dry_run_prints_the_plan_and_makes_nothing(settings, tmp_path, capsys):
    run = settings(checkpoint__directory=str(tmp_path / "run"), parallel__tensor=2)
    assert dry_run(run, "--world_size=8") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == describe(plan_run(run, 8)) and "data 4" in printed.out
    assert printed.err == "" and not (tmp_path / "run").exists()


def test_dry_run_counts_the_processes_of_torchrun(settings, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert dry_run(settings()) == 0
    assert "4 = tensor 1 × pipeline 1 × context 1 × data 4" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "3")
    assert dry_run(settings()) == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_tells_all_problems_once(settings, monkeypatch, capsys):
    run = settings(data__sequence_length=1000, selection__layer=9)
    assert dry_run(run, "--world_size=1") == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert printed.out == "" and lines == [f"error: {problem}" for problem in problems_of(run)] and len(lines) == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dry_run(run, "--world_size=1") == 2
    assert capsys.readouterr() == ("", "")


def test_dry_run_of_a_resumable_run(settings, tmp_path, capsys):
    run = settings(checkpoint__directory=str(tmp_path))
    state = {"step": 3, "identity": asdict(identity_of(plan_run(run, 1))), "hf_path": "model", "num_rows": 80}
    newest = tmp_path / "step_0000003"
    for name, content in (
        (newest.name, state),
        ("step_0000002", state | {"step": 2}),
        ("step_0000004", None),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_bytes(pickle.dumps(Metadata({})))
        if content is not None:
            (tmp_path / name / "sstoken.json").write_text(json.dumps(content))
    assert dry_run(run, "--world_size=1") == 0
    assert capsys.readouterr().out.endswith(f"would resume from {newest}\n")
    run.training.seed = 5
    assert dry_run(run, "--world_size=1") == 2
    assert f"error: cannot resume from {newest}: it was made with training.seed=1234, now 5" in capsys.readouterr().err
    run.checkpoint.resume = False
    assert dry_run(run, "--world_size=1") == 2
    assert "holds checkpoints of another run (step 3)" in capsys.readouterr().err


def write_checkpoint(folder, run, metadata=None, **changes):
    """What describes a checkpoint of step 3 of a run, and nothing else."""
    state = {"step": 3, "identity": asdict(identity_of(plan_run(run, 1))), "hf_path": "model", "num_rows": 80}
    newest = folder / "step_0000003"
    newest.mkdir()
    (newest / "sstoken.json").write_text(json.dumps(state | changes))
    (newest / ".metadata").write_bytes(pickle.dumps(metadata or Metadata({})))
    return newest


def test_a_directory_of_a_run_on_other_data_names_both(settings, folder, tmp_path, capsys):
    make_store(folder / "others", make_samples(30, seed=9))
    run = settings(checkpoint__directory=str(tmp_path))
    newest = write_checkpoint(tmp_path, run, train="/data/first")
    run.data.train = str(folder / "others")
    assert dry_run(run) == 2
    assert capsys.readouterr().err == (
        f"error: cannot resume from {newest}: it was trained on the data of /data/first, and data.train={run.data.train} holds "
        "other data: name another checkpoint.directory for it, or that data to go on\n"
    )


def test_a_directory_of_a_run_with_another_method_is_told_in_the_dry_run(settings, tmp_path, capsys):
    run = settings(checkpoint__directory=str(tmp_path))
    newest = write_checkpoint(tmp_path, run, objective=objective_of(plan_run(run, 1), {}))
    run.selection.method = "full"
    assert dry_run(run) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-2:] == [
        f"would resume from {newest}",
        f"note: the run would go on with other settings: selection.method: {settings().selection.method} → full; another "
        "checkpoint.directory begins anew",
    ]


@pytest.mark.parametrize("use", ["checkpoint.directory", "model.checkpoint"])
def test_a_checkpoint_of_another_model_names_both(settings, tmp_path, capsys, use):
    name = "decoder.layers.self_attention.linear_qkv.weight"
    sizes = {name: TensorStorageMetadata(TensorProperties(), torch.Size([30, 960, 576]), [])}
    plain, key = settings(), use.replace(".", "__")
    newest = write_checkpoint(tmp_path, plain, Metadata(sizes), hf_path="/models/SmolLM2-135M")
    assert dry_run(settings(**{key: str(tmp_path)})) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {f'cannot resume from {newest}' if 'directory' in use else f'{use}={tmp_path}'}: ")
    assert f"of another model (/models/SmolLM2-135M): {name} is 30 × 960 × 576 there, and 4 × " in told
    assert f" in model.hf_path={plain.model.hf_path}: " in told and len(told.splitlines()) == 1


@pytest.mark.parametrize("content", ['{"step": 3', '{"step": 3, "of_a_later_version": 1}'])
def test_a_damaged_checkpoint_is_told_as_a_mistake(settings, tmp_path, capsys, content):
    (tmp_path / "step_0000003").mkdir()
    (tmp_path / "step_0000003" / "sstoken.json").write_text(content)
    assert dry_run(settings(checkpoint__directory=str(tmp_path)), "--world_size=1") == 2
    told = capsys.readouterr().err
    assert (
        told.startswith(f"error: checkpoint.directory={tmp_path}: ")
        and "(or remove that folder) to resume from" in told
    )


def test_a_newest_checkpoint_without_all_its_files(settings, tmp_path, capsys):
    run = settings(checkpoint__directory=str(tmp_path))
    state = {"step": 3, "identity": asdict(identity_of(plan_run(run, 1))), "hf_path": "model", "num_rows": 80}
    newest = tmp_path / "step_0000003"
    newest.mkdir()
    (newest / "sstoken.json").write_text(json.dumps(state))
    place = _StorageInfo("__0_0.distcp", 100, 20)
    (newest / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data={MetadataIndex("weight"): place})))
    for content, code in ((None, 2), (bytes(119), 2), (bytes(120), 0)):
        if content is not None:
            (newest / "__0_0.distcp").write_bytes(content)
        assert dry_run(run, "--world_size=1") == code
        told = capsys.readouterr()
        assert code == 0 or "lacks __0_0.distcp" in told.err and "remove that folder) to resume" in told.err


def test_dry_run_without_processes(settings, capsys):
    assert dry_run(settings(), "--world_size=0") == 2
    assert "world_size=0 is too small" in capsys.readouterr().err
