"""Sections of benchmarks/gpu_all.py on a pretended GPU without Transformer Engine: what only a GPU makes them do runs, too."""

import gc
import importlib
from pathlib import Path
from typing import Any

import pytest
from megatron.core.models.gpt import GPTModel

from benchmarks.gpu.results import Results, read_lines
from benchmarks.gpu.runs import release_memory
from benchmarks.gpu.sections import SECTIONS
from tests.emulation.running import run_pretended

NAMES = ("tap", "speed_8b", "memory")


def run_sections(rank: int, folder: str) -> int:
    """In a process of its own: each section on toy sizes; returns how many models are left when the next one is made."""
    for section in SECTIONS:
        if section.name in NAMES:
            module, function = section.function.split(":")
            work = Path(folder) / section.name
            work.mkdir()
            results = Results(Path(folder) / "results.jsonl", section.name, True, work, 1000)
            getattr(importlib.import_module(module), function)(results)
    release_memory()
    return sum(isinstance(one, GPTModel) for one in gc.get_objects())


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What each section wrote."""
    folder = tmp_path_factory.mktemp("sections")
    (models,) = run_pretended(run_sections, 1, str(folder))
    assert models == 0, "memory of models is measured one after another"
    found: dict[str, list[dict]] = {name: [] for name in NAMES}
    for record in read_lines(folder / "results.jsonl"):
        found[record["section"]].append(record)
    return found


pytestmark = pytest.mark.slow  # whole sections


@pytest.mark.timeout(300)
def test_nothing_fails(records):
    for name, written in records.items():
        assert [record for record in written if record["kind"] == "failure"] == [], name
        assert all(record["ok"] for record in written if record["kind"] == "check"), name
        assert any(record["kind"] == "row" for record in written), name


def test_what_is_absent_wants_transformer_engine(records):
    absent = [record for written in records.values() for record in written if record["kind"] == "absent"]
    assert absent and all("transformer_engine is not installed" in record["why"] for record in absent)


def test_memory_stands_beside_the_plan(records):
    rows = [record["columns"] for record in records["speed_8b"] if record["kind"] == "row"]
    assert len(rows) == 4 and all(row["planned GiB"] > 0 for row in rows)
    parts = [record["columns"] for record in records["memory"] if record["kind"] == "row"]
    assert len(parts) == 3 * 7 and all(row["planned GiB"] > 0 for row in parts)
