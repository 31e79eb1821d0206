"""What one does with a finished run: commands with its own paths, for a shell in the root of the repository."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sstoken.run_plan import RunPlan

Named = tuple[str, str]
"""What a command is for, and the command."""


def next_commands(plan: "RunPlan") -> list[Named]:
    """After a run that saves checkpoints: export, and what comes after it; after any run with logs: the report."""
    settings = plan.settings
    directory, logs = settings.checkpoint.directory, settings.logging_directory
    if directory is None:
        return [_report(logs)] if logs is not None else []
    directory = directory.rstrip("/")
    exported = f"{directory}-hf"
    merge = ["--merge"] if settings.lora.rank else []
    training = {source["path"] for source in plan.train.store.manifest.sources}
    others = [source["path"] for source in plan.validation.store.manifest.sources] if plan.validation else []
    files = [path for path in others if path not in training and os.path.isfile(path)]
    return [
        (
            "export",
            _command(
                "tools/convert_checkpoint.py",
                "to-hf",
                "--checkpoint",
                _short(directory),
                "--output",
                _short(exported),
                *merge,
            ),
        ),
        *commands_of_export(exported, run=directory, data=files[0] if files else None, before=settings.model.hf_path),
    ]


def commands_of_export(
    exported: str, *, run: str, compare: Sequence[str] = (), data: str | None = None, before: str | None = None
) -> list[Named]:
    """What one does with an exported model. `data`: a file of questions; `before`: the model before training."""
    asked = ["--data", _short(data or "questions.jsonl"), "--limit", "100"]
    compared = ["--compare", _short(before)] if before else []
    exported = _short(exported)
    return [
        _report(run, compare),
        ("chat", _command("-m", "megatron_sstoken.chat", "--model", exported)),
        ("evaluate", _command("tools/evaluate.py", "--model", exported, *asked, *compared)),
        ("serve", shlex.join(["vllm", "serve", exported])),
        (
            "benchmarks",
            shlex.join(
                ["lm_eval", "--model", "hf", "--model_args", f"pretrained={exported}", "--tasks", "gsm8k"]
                + ["--apply_chat_template", "--batch_size", "8"]
            ),
        ),
    ]


def describe_commands(commands: Sequence[Named]) -> str:
    """One command a line, under what it is for; empty for none."""
    return "\n".join(["next:", *(f"  {name:<11} {command}" for name, command in commands)]) if commands else ""


def _report(run: str, compare: Sequence[str] = ()) -> Named:
    others = [part for one in compare for part in ("--compare", _short(one))]
    output = _short(str(Path(run) / "report.html"))
    return "report", _command("tools/report_selection.py", "--run", _short(run), *others, "--output", output)


def _command(*words: str) -> str:
    return shlex.join(["python", *words])


def _short(path: str) -> str:
    """A path below the working directory without it."""
    inside = os.path.relpath(path)
    return path if inside.startswith(os.pardir) else inside
