"""tools/benchmark.py on a tiny model: its rows say where they come from, and what it counts is right."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from tests.helpers.distributed_runner import run_distributed

ROOT = Path(__file__).resolve().parents[2]
TINY = "--hidden 32 --layers 2 --vocabulary 512 --intermediate 64 --heads 2 --groups 1 --problems 12 --rounds 1".split()


def run_suites(rank, folder, suites):
    """On a process of its own: the tool leaves process groups and thread numbers behind."""
    from pathlib import Path

    from benchmarks import suites as suite_module
    from benchmarks import workload
    from benchmarks.measure import Rows
    from tools import benchmark

    original = Rows.append
    Rows.append = lambda rows: original(rows, Path(folder) / "results")
    assert suite_module.Rows is Rows
    workload.LENGTHS = (64, 1024)
    return benchmark.main(["--suite", *suites, "--gsm8k", folder, "--work", f"{folder}/work", *TINY])


@pytest.mark.slow
def test_rows(tmp_path):
    problems = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}. " * (n % 5 + 2)} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, problems)), encoding="utf-8")
    suites = ["step", "head", "scoring", "selection", "history", "huggingface", "prepare", "convert"]
    assert run_distributed(run_suites, 1, str(tmp_path), suites) == [0]
    rows = {}
    for suite in suites:
        with open(tmp_path / "results" / f"{suite}.csv", newline="", encoding="utf-8") as file:
            rows[suite] = list(csv.DictReader(file))
        for row in rows[suite]:
            assert row["commit"] and row["torch"] == torch.__version__ and json.loads(row["config"])["hidden"] == 32
            assert float(row["seconds_p20"]) <= float(row["seconds"]) <= float(row["seconds_p80"])
    standard, _, selective = rows["step"]
    assert float(standard["ratio"]) == 1 and int(selective["product_flops"]) < int(standard["product_flops"])
    kinds = {row["variant"]: [] for row in rows["head"]}
    for row in rows["head"]:
        kinds[row["variant"]].append(row)
    for standard, selective in zip(kinds["standard"], kinds["selective"], strict=True):
        counted = int(selective["product_flops"]) / int(standard["product_flops"])
        assert counted == pytest.approx(float(selective["formula"]), abs=0.08), "r(1 + 3ρ) ÷ 3, up to sampling"
    assert [row["case"] for row in rows["huggingface"][::3]] == ["GSM8K", "one sample of 64", "one sample of 1024"]
    assert len({row["tokens"] for row in rows["huggingface"][:3]}) == 1, "the same samples"


def test_programs_import_no_tests():
    """What programs and tests share lies with the programs: they run where the tests are not."""
    sources = [path for folder in ("megatron_sstoken", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    importing = re.compile(r"^\s*(from|import) tests\b|\"tests\.|'tests\.", re.MULTILINE)
    assert [path.name for path in sources if importing.search(path.read_text(encoding="utf-8"))] == []


def test_counts():
    """Two products of 64·64·64, one of them in place; 16 KiB a matrix, and never more than four new ones."""
    left = torch.randn(64, 64)

    def run():
        product = left @ left
        for _ in range(3):
            product = product + 1  # the old one goes
        product.addmm_(left, left)

    counts = measure.count(run)
    assert counts.product_flops == 2 * 2 * 64**3
    assert 2 * 4 * 64**2 <= counts.peak_bytes < 4 * 4 * 64**2


def test_a_mixture_of_columns_is_refused(tmp_path):
    rows = measure.Rows("some", {})
    rows.add("a", "b")
    rows.append(tmp_path)
    rows.rows[0]["new"] = 1
    with pytest.raises(ValueError, match="move it away"):
        rows.append(tmp_path)
