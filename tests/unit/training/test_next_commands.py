"""megatron_sstoken/training/next_commands.py: real paths, and nothing that a run has not got."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_sstoken import evaluate
from megatron_sstoken.commands import convert_checkpoint
from megatron_sstoken.config import Settings
from megatron_sstoken.training.next_commands import describe_commands, next_commands
from tests.helpers.workbench import make_settings


def prepared(*paths: Path) -> Any:
    """What a plan says of a prepared folder."""
    sources = [{"path": str(path)} for path in paths]
    return SimpleNamespace(store=SimpleNamespace(manifest=SimpleNamespace(sources=sources)))


def commands(settings: Settings, train: Path, validation: Path | None) -> dict[str, str]:
    plan = SimpleNamespace(
        settings=settings,
        architecture=SimpleNamespace(tied_embeddings=True),
        train=prepared(train),
        validation=validation and prepared(validation),
    )
    return dict(next_commands(plan))


def settings_of(folder: Path, **changes: Any) -> Settings:
    return make_settings(str(folder / "model"), str(folder / "data"), **changes)


def test_paths_are_the_runs_own_and_the_programs_take_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / "a file.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.touch()
    found = commands(settings_of(tmp_path, checkpoint__directory="runs/it's one/"), files[1], files[0])
    assert list(found) == ["export", "report", "chat", "evaluate", "serve", "benchmarks"]
    words = {name: shlex.split(command) for name, command in found.items()}
    exporting = convert_checkpoint.parse_arguments(words["export"][2:])
    assert (exporting.checkpoint, exporting.output, exporting.merge) == ("runs/it's one", "runs/it's one-hf", False)
    asking = evaluate.parse_arguments(words["evaluate"][2:])
    assert (asking.model, asking.data, asking.compare) == ("runs/it's one-hf", "a file.jsonl", "model")
    assert words["chat"][-1] == words["serve"][-1] == "runs/it's one-hf"
    assert "pretrained=runs/it's one-hf" in words["benchmarks"]
    assert words["report"][-3:] == ["runs/it's one", "--output", "runs/it's one/report.html"]


def test_rows_that_were_trained_on_are_no_questions(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    for validation in (tmp_path / "rows.jsonl", tmp_path / "gone.jsonl", None):
        found = commands(settings_of(tmp_path, checkpoint__directory="/r"), tmp_path / "rows.jsonl", validation)
        assert "--data questions.jsonl" in found["evaluate"]


def test_adapters_are_merged_and_a_run_that_saves_nothing_has_its_logs_alone(tmp_path):
    found = commands(settings_of(tmp_path, checkpoint__directory="/r", lora__rank=4), tmp_path / "rows.jsonl", None)
    assert found["export"].endswith("--checkpoint /r --output /r-hf --merge")
    found = commands(settings_of(tmp_path, logging__directory="/logs"), tmp_path / "rows.jsonl", None)
    assert list(found) == ["report"] and "--run /logs " in found["report"]
    found = commands(settings_of(tmp_path), tmp_path / "rows.jsonl", None)
    assert found == {} and describe_commands([]) == ""
