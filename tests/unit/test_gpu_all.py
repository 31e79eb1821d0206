"""benchmarks/gpu_all.py: no section takes the others with it, and every one runs on toy sizes."""

import json
import math
import sys

import pytest
import torch

from benchmarks import gpu_all
from benchmarks.gpu import runs, tap, trace
from benchmarks.gpu.report import write_report
from benchmarks.gpu.results import Results, append_line, read_lines
from benchmarks.gpu.sections import SECTIONS, SSTOKEN_8B, Section
from tests.helpers import cli

SOURCE = """
import time

def good(results):
    results.row("rates", what="a", rate=2000.0)
    results.check("error", 0.5, 1.0)

def crash(results):
    results.row("rates", what="before the crash", rate=1.0)
    raise RuntimeError("the crash of this test")

def endless(results):
    results.row("rates", what="before the end of time", rate=1.0)
    time.sleep(600)

def silent(results):
    print("nothing to say")

def wrong(results):
    results.check("error", float("nan"), 1.0)

def half(results):
    with results.attempt("first half"):
        raise ValueError("broken half")
    results.row("rates", what="second half", rate=1.0)
"""
LIGHT_TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)

class version:
    cuda = None
"""


@pytest.fixture
def section(tmp_path, monkeypatch):
    """Makes sections of the functions of `SOURCE`. Their processes find a torch that loads at once: they compute nothing."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "sections_of_a_test.py").write_text(SOURCE)
    (code / "torch.py").write_text(LIGHT_TORCH)
    monkeypatch.setenv("PYTHONPATH", str(code))
    monkeypatch.setattr(gpu_all, "SECTIONS", ())

    def make(name: str, limit: float = 60) -> Section:
        return Section(name, f"sections_of_a_test:{name}", limit, f"what {name} shows")

    return make


def outcomes(folder) -> dict[str, str]:
    """Section → its status."""
    records = read_lines(folder / "results.jsonl")
    return {record["section"]: record["status"] for record in records if record["kind"] == "status"}


@pytest.mark.parametrize(
    "name, limit, outcome, told",
    [
        ("crash", 60, "failed with exit code 1", "RuntimeError: the crash of this test"),
        ("endless", 5, "timed out after 5 s", "before the end of time"),
        ("silent", 60, "no result", "nothing to say"),
        ("wrong", 60, "a check failed", "**failed**"),
        ("half", 60, "a part failed", "first half: **failed**: ValueError: broken half"),
    ],
)
def test_a_section_that_fails_does_not_take_the_others_with_it(section, tmp_path, name, limit, outcome, told):
    sections = [section(name, limit), section("good")]
    code = gpu_all.run(sections, tmp_path / "out", tiny=False, minutes=5, commit="abc")
    assert code == 1
    assert outcomes(tmp_path / "out") == {name: outcome, "good": "ok"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert told in report and f"| {name} | {outcome} |" in report
    assert "| a | 2,000 |" in report and "at commit abc" in report


def test_what_time_does_not_suffice_for_is_named(section, tmp_path):
    code = gpu_all.run([section("good")], tmp_path, tiny=False, minutes=0.1, commit="abc")
    assert code == 0 and outcomes(tmp_path) == {"good": "left out, no time"}
    assert gpu_all.run([section("good")], tmp_path, tiny=False, minutes=5, commit="abc") == 0
    gpu_all.run([section("good")], tmp_path, tiny=False, minutes=0.1, commit="abc")
    assert "| good | ok |" in (tmp_path / "report.md").read_text(), "an earlier result stays"


def test_the_last_run_of_a_section_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    for measured in (1.2, 0.98):
        append_line(
            path, {"section": "speed_8b", "kind": "start", "time": "2026-01-01", "commit": "abc", "tiny": False}
        )
        results = Results(path, "speed_8b", False, tmp_path, 60)
        results.row("steps", ratio=measured)
        results.target(SSTOKEN_8B, measured)
    with open(path, "a") as file:
        file.write('{"section": "speed_8b", "kind": "r')  # killed while it wrote
    write_report(tmp_path / "report.md", path, SECTIONS)
    report = (tmp_path / "report.md").read_text()
    assert f"| {SSTOKEN_8B} | ≤ 1 (selection costs nothing) | 0.98 | yes |" in report
    assert "1.2" not in report and report.count("not measured") == 3


def test_toy_sizes_meet_no_target(tmp_path):
    results = Results(tmp_path / "results.jsonl", "speed_8b", True, tmp_path, 60)
    results.target(SSTOKEN_8B, 0.5)
    assert read_lines(results.path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "nothing"],
        ["--only", "tap", "--skip", "tap"],
        ["--minutes", "0"],
        ["--minutes", "nan"],
        ["--out", __file__],
    ],
)
def test_mistakes_in_the_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_all.main(arguments)
    assert ended.value.code == 2 and "error" in capsys.readouterr().err


def tiny_run(folder, *arguments: str) -> str:
    """The program as users start it, on a CPU; returns the report."""
    result = cli.run(
        [sys.executable, "benchmarks/gpu_all.py", "--tiny", "--out", str(folder), *arguments], timeout=1000
    )
    assert result.returncode == 0, result.stdout + (folder / "sections.log").read_text()[-3000:]
    return (folder / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_tap_on_a_cpu(tmp_path):
    report = tiny_run(tmp_path, "--only", "tap", "engine")
    assert "| tap | ok |" in report and "| engine | not on this machine |" in report and "| fp8 | not run |" in report
    assert "bf16 transformer_engine: not on this machine" in report and "has no CUDA device" in report


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_every_section_on_a_cpu(tmp_path):
    tiny_run(tmp_path)
    absent = {"engine", "fp8", "memory"}
    wanted = {one.name: "not on this machine" if one.name in absent else "ok" for one in SECTIONS}
    assert outcomes(tmp_path) == wanted
    assert len(list(tmp_path.iterdir())) <= 8, "some machines send no more files back"


def test_the_dense_reference():
    """Against sums over single keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(9, heads, 4, generator=generator) for heads in (4, 2, 2))
    context = torch.arange(9) % 3 == 0
    for window in (None, 2):
        mass, output = tap.dense_reference(query, key, value, context, [5, 4], window)
        for i in range(9):
            first = 0 if i < 5 else 5
            seen = range(max(first, i - window + 1) if window else first, i + 1)
            for head in range(4):
                weight = [math.exp(float(query[i, head].double() @ key[j, head // 2].double()) / 2) for j in seen]
                wanted = sum(w * value[j, head // 2].double() for w, j in zip(weight, seen, strict=True)) / sum(weight)
                torch.testing.assert_close(output[i].view(4, 4)[head], wanted)
            shares = []
            for head in range(4):
                weight = [math.exp(float(query[i, head].double() @ key[j, head // 2].double()) / 2) for j in seen]
                shares.append(sum(w for w, j in zip(weight, seen, strict=True) if context[j]) / sum(weight))
            assert float(mass[i]) == pytest.approx(sum(shares) / 4)


def test_the_gpu_is_busy_while_any_kernel_runs():
    kernels = [{"name": name, "ts": start, "dur": length} for name, start, length in
               (("b", 40, 10), ("a", 0, 20), ("a", 10, 20), ("c", 12, 1))]  # fmt: skip
    assert trace.busy_seconds(kernels) == pytest.approx(40e-6)
    assert trace.longest(kernels)[0] == {"kernel": "a", "calls": 2, "ms": 0.04, "share": pytest.approx(40 / 51)}


def test_layers_are_as_many_as_fit(tmp_path, monkeypatch):
    settings = runs.settings_for(tmp_path, "Llama-3.1-8B", tiny=False)
    whole = runs.architecture_of("Llama-3.1-8B", tiny=False)
    found = {}
    for gib in (10, 80, 8000):
        monkeypatch.setattr(runs, "device_bytes", lambda gib=gib: gib * 2**30)
        found[gib] = runs.layers_that_fit(settings, whole)
    assert found[10] == 0 and found[8000] == 32 and 4 <= found[80] < 16
    fits, too_many = (runs.planned_memory(settings, runs.with_layers(whole, found[80] + more)).total for more in (0, 1))
    assert fits <= runs.FULL * 80 * 2**30 < too_many


def test_an_epoch_is_one_global_batch(tmp_path):
    settings = runs.settings_for(tmp_path, "Llama-3.2-1B", tiny=True)
    store = runs.SampleStore(settings.data.train)
    assert settings.training.global_batch_size * 128 >= store.lengths.sum() > 200
    config = json.loads((tmp_path / "Llama-3.2-1B-2" / "config.json").read_text())
    assert config["hidden_size"] == 128
