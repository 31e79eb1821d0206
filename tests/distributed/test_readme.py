"""Every command of the README, in its order and as it stands, after the quickstart."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from megatron_sstoken.training.records import read_records
from tests.helpers.cli import ROOT
from tests.helpers.documented_shell import Shell, bash_blocks

PROGRAMS = {"train", "score", "chat"}
TOOLS = {"make_toy", "prepare_data", "convert_checkpoint", "evaluate", "quickstart_report", "report_selection"}


def run_pages(shell: Shell, timeout: float, *pages: str) -> str:
    """What all commands of these pages print."""
    blocks = [block for page in pages for block in bash_blocks((ROOT / page).read_text("utf-8"))]
    result = shell.run("\n".join(blocks), timeout)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def check_what_it_leaves(root: Path, said: str) -> None:
    """Files and figures that the README promises."""
    assert "\nverified\n" in said and "NOT THE SAME" not in said
    runs = root / "runs"
    records = read_records(runs / "first" / "tokens.parquet")
    validation = (root / "quickstart" / "toy" / "validation.jsonl").read_text("utf-8").splitlines()
    assert len(set(records["sample"].tolist())) == len((root / "quickstart/toy/chat.jsonl").read_text().splitlines())
    moved = np.abs(records["loss"] - records["history_loss"])[records["role"] == 1]
    assert np.nanmax(moved) > 1e-3, "the losses are the trained model's, the history is not"
    assert len((runs / "answers.jsonl").read_text("utf-8").splitlines()) == min(8, len(validation))
    assert (runs / "adapters" / "adapter_config.json").is_file() and (runs / "merged" / "config.json").is_file()
    assert (root / "quickstart" / "report.html").is_file() and (runs / "first" / "report.html").is_file()
    assert (runs / "first" / "dropped.jsonl").is_file()
    for name in ("runs/first-hf", "runs/smollm2-hf"):
        assert re.search(rf"^{name}: \d+ of \d+ right", said, re.MULTILINE), name


def next_commands(said: str, exported: str) -> list[str]:
    """The commands that a run ends with, as printed."""
    (block,) = (
        block for block in re.findall(r"^next:\n((?:  .*\n)+)", said, re.MULTILINE) if f"--output {exported}\n" in block
    )
    return [line.split(maxsplit=1)[1] for line in block.splitlines()]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Shell, str]:
    """All commands have run; what they printed."""
    shell = Shell(tmp_path_factory.mktemp("readme"))
    try:
        return shell, run_pages(shell, 280, "README.md")
    finally:
        for one in shell.ran:
            print(f"{one.seconds:6.2f} s  {shlex.join(one.words)[:120]}")


@pytest.mark.timeout(300)
def test_every_command_of_the_readme_runs_as_it_stands(done):
    shell, said = done
    words = " ".join(word for one in shell.ran for word in one.words)
    named = {name.rpartition(".")[2] for name in re.findall(r"-m (megatron_sstoken\.\w+)", words)}
    named |= set(re.findall(r"/(\w+)\.py\b", words))
    assert named >= PROGRAMS | TOOLS
    check_what_it_leaves(shell.root, said)


@pytest.mark.timeout(300)
def test_the_commands_that_a_run_ends_with_run_as_well(done):
    """Those of README's first run; it has exported already."""
    shell, said = done
    export, *others = next_commands(said, "runs/first-hf")
    assert export in (ROOT / "README.md").read_text("utf-8")
    assert len(others) == 5 and any("--data quickstart/toy/validation.jsonl" in one for one in others)
    script = "\n".join(["source .venv/bin/activate", *others])
    result = shell.run(script.replace("--limit 100", "--limit 4 --max_new_tokens 8"), timeout=60)
    assert result.returncode == 0, result.stderr


def test_a_command_that_fails_ends_it(tmp_path):
    script = "source .venv/bin/activate\npython tools/evaluate.py --model nowhere --data rows.jsonl\ntouch reached"
    result = Shell(tmp_path).run(script, timeout=60)
    assert result.returncode == 2 and not (tmp_path / "reached").exists()
    assert (
        "error: --model nowhere is no folder" in result.stderr and "failed: python tools/evaluate.py" in result.stderr
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_readme_runs_as_it_stands_in_full(tmp_path):
    """Each in an interpreter of its own, at the quickstart's size; then those of docs/conversion.md, which go on from there."""
    said = run_pages(Shell(tmp_path, forked=False), 1700, "README.md", "docs/conversion.md")
    check_what_it_leaves(tmp_path, said)
    *_, merged, adapted = said.split("> A pen costs 3 dollars")
    assert merged.split() == adapted.split(), "the merged model and PEFT on the base say the same"
