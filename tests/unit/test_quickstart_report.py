"""pretrain_scripts/quickstart_report.py: what it reads from a quickstart's folder, and how it compares the methods."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_sstoken.training.records import SCHEMA, RecordWriter
from megatron_sstoken.training.tags import tag_of
from pretrain_scripts.quickstart_report import RUNS, chosen_tokens, comparison, main, read_chats, response_loss
from tools.make_toy import make_toy

SMALL = {"rows": 10, "vocabulary": 300, "hidden": 64, "layers": 1, "start": "random"}


def write_scalars(folder: Path, points: dict[str, list[float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for name, values in points.items():
            for step, value in enumerate(values, 1):
                writer.add_scalar(tag_of(name), value, step)


def write_records(folder: Path, step: int, rows: list[tuple[int, int, int, bool]]) -> None:
    """Token records of (sample, position, token, selected)."""
    columns = {
        field.name: np.zeros(len(rows), field.type.to_pandas_dtype()) for field in SCHEMA if field.name != "text"
    }
    for name, values in zip(("sample", "position", "token", "selected"), zip(*rows, strict=True), strict=True):
        columns[name] = np.array(values, columns[name].dtype)
    with RecordWriter(folder / f"step_{step:07d}.parquet") as writer:
        writer.write(columns)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quickstart leaves, with the toy's own model as the exported one, and a run of two steps."""
    work = tmp_path_factory.mktemp("quickstart")
    make_toy(work / "toy", **SMALL)
    shutil.copytree(work / "toy" / "model", work / "exported")
    tokenizer = AutoTokenizer.from_pretrained(work / "exported")
    loss = response_loss(
        AutoModelForCausalLM.from_pretrained(work / "exported"), tokenizer, read_chats(work / "toy/validation.jsonl")
    )
    names = ("loss/all", "loss/selected", "loss/dropped", "loss/dropped_minus_history", "selection/share")
    for method, folder in RUNS.items():
        ending = {"full": 1.25, "random": 9.5, "sstoken": loss}[method]
        write_scalars(work / folder / "logs", {name: [2.0, 1.5] for name in names} | {"loss/validation": [ending]})
    tokens = tokenizer.encode("2+3=5")
    rows = [(4, position, token, position >= 3) for position, token in enumerate(tokens)]
    write_records(work / "run" / "logs" / "records", 1, [(0, 0, 1, True)])
    write_records(work / "run" / "logs" / "records", 2, [(8, 0, 1, True), *reversed(rows)])
    return work


def test_the_chosen_tokens_are_those_of_the_newest_step_in_their_order(work: Path):
    tokenizer = AutoTokenizer.from_pretrained(work / "exported")
    records = work / "run" / "logs" / "records"
    assert chosen_tokens(records, tokenizer, terminal=False) == (2, "2+3«=5»")
    assert chosen_tokens(records, tokenizer, terminal=True) == (2, "2+3\033[1;32m=5\033[0m")


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ({"before": 3.0, "full": 0.5, "random": 0.75, "sstoken": 0.75}, "is not above that of as many"),
        ({"before": 3.0, "full": 0.5, "random": 0.75, "sstoken": 0.8}, "IS ABOVE that of as many"),
    ],
)
def test_it_says_whether_ssToken_is_behind_random(losses: dict[str, float], says: str):
    rows = comparison(losses)
    assert [row for row in rows if row[0].strip() in losses] == [
        (f"  {name}", f"{x:.4f}") for name, x in losses.items()
    ]
    (verdict,) = [value for _, value in rows if "ssToken" in value]
    assert says in verdict and verdict.endswith("lowest: full")


def test_the_whole_report(work: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--work", str(work), "--seconds=200"]) == 0
    said, _, commands = capsys.readouterr().out.partition("\nnext:\n")
    assert f"--model {work / 'exported'} --data {work / 'toy' / 'validation.jsonl'} --limit 100" in commands
    lines = [line.split(maxsplit=1) for line in said.splitlines()]
    assert ["time,", "set-up included  3 min 20 s"] in lines
    found = {name: value for name, *rest in lines for value in rest}
    assert found["full"] == "1.2500" and found["random"] == "9.5000"
    assert found["before"] == found["sstoken"] and "lowest: full" in " ".join(map(" ".join, lines))
    assert ["2+3«=5»"] in lines
    assert "2.0000 (step 1) -> 1.5000 (step 2)" in found["dropped"]


def test_another_model_than_the_run_s_is_told(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(work, tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "run" / "logs")
    shutil.copytree(work / "full" / "logs", tmp_path / "work" / "run" / "logs")
    assert main(["--work", str(tmp_path / "work")]) == 1
    assert "in transformers, 1.2500 in the run" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "work" / "random")
    assert main(["--work", str(tmp_path / "work")]) == 2
    assert "random/logs does not exist: run pretrain_scripts/quickstart.sh first" in capsys.readouterr().err
