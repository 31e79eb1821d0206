"""The program: from folders to a page and a list, and what it says of mistakes."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sstoken.report import gather as gathering
from megatron_sstoken.report.gather import gather
from megatron_sstoken.report.program import main
from megatron_sstoken.report.record_files import data_fingerprint, find_records
from megatron_sstoken.report.runs import open_runs
from megatron_sstoken.report.texts import Texts, texts_in_records
from tests.helpers.report_example import example
from tests.helpers.token_records import Token, write_file

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = ("</script><img src=x onerror=alert(1)>", "\u202e", "{{7*7}}", "a" * 20_000, "\x00", "\\xe2\\x80")


def make_run(folder, steps=(10, 20), samples=6, length=12):
    """A run whose tokens are hostile; at each step other samples, and the watched ones 100 and 101."""
    context = [Token(9, role=0, text=" ")] * 4
    response = [
        Token(place % 6, 1, 1 + place / 10, 1.0, place / length, place > 3, text=HOSTILE[place % 6])
        for place in range(length)
    ]
    tokens = context + response
    for step in steps:
        name = f"step_{step:07d}.parquet"
        write_file(folder / "logs" / "records" / name, [(step * 100 + one, tokens) for one in range(samples)])
        write_file(folder / "logs" / "watched" / name, [(100, tokens), (101, tokens)])
    lines = [json.dumps({"step": step, "loss/validation": 1.0}) for step in steps]
    (folder / "logs" / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def gathered(folder, **options):
    runs = open_runs([folder])
    files = runs[0].records()
    return gather(runs, files, texts_in_records(files), **options)


def test_hostile_texts_pass_unharmed_and_the_form_is_the_page_s(tmp_path):
    report = gathered(make_run(tmp_path / "run"))
    by_sample = {one["sample"]: one for one in report["samples"]}
    assert len(by_sample) == 14
    assert by_sample[100]["tokens"]["text"] == [" "] * 4 + [*HOSTILE] * 2
    assert list(by_sample[100]["at"]) == ["10", "20"] and list(by_sample[1001]["at"]) == ["10"]
    assert {kind["text"] for kind in report["types"]} == set(HOSTILE)
    assert report["samples"][0]["sample"] == 100 and report["samples"][0]["step"] == 20
    assert report["notes"][0].startswith(
        "Scores and kinds of tokens are of what was recorded: 12 samples in the batches of 2 steps (a sample that is in "
        "several counts in each)."
    )
    assert report["notes"][1].startswith("Losses are of every step's whole batch, recorded or not; ")
    assert report["notes"][2] == "14 samples can be looked at, 2 of them watched."
    at = by_sample[100]["at"]["20"]
    assert at["loss"][:5] == [None] * 4 + [1.0] and at["rel"][6] == -0.2 and at["weight"] is None
    assert sum(report["scores"]["10"]["selected"]) == 6 * 8 and report["scores"]["10"]["threshold"] == pytest.approx(
        4 / 12, 1e-3
    )
    model = example()
    assert report.keys() == model.keys()
    assert report["selection"].keys() == model["selection"].keys()
    for name in ("samples", "types", "groups", "facts", "runs"):
        assert model[name][0].keys() <= report[name][0].keys()
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(("token_bytes", "step_bytes"), [(18, 42), (0, 1)])
def test_a_page_has_room_for_what_it_shows(tmp_path, monkeypatch, token_bytes, step_bytes):
    """Also where what tokens take was estimated too low."""
    folder = make_run(tmp_path / "run", samples=20, length=600)
    monkeypatch.setattr(gathering, "ROOM", 400_000)
    monkeypatch.setattr(gathering, "_TOKEN_BYTES", token_bytes)
    monkeypatch.setattr(gathering, "_STEP_BYTES", step_bytes)
    runs = open_runs([folder])
    report = gather(runs, runs[0].records(), Texts(None), num_samples=20)
    assert len(report["samples"]) == 20
    assert 100_000 < len(json.dumps(report["samples"], separators=(",", ":"))) <= 400_000
    assert any("long samples are cut to" in note for note in report["notes"])
    assert all(one["is_cut"] and one["num_response"] == 600 for one in report["samples"])


def test_groups_of_tokens_are_of_all_that_was_recorded(tmp_path, monkeypatch):
    texts = {0: "12", 1: " =", 2: " pears", 3: ".\n", 4: "<|im_end|>", 5: "\\xe2\\x80", 6: "7"}
    tokens = [Token(9, role=0, text="?"), *(Token(n, loss=n, selected=n > 1, text=text) for n, text in texts.items())]
    file = write_file(tmp_path / "step_0000001.parquet", [(0, tokens), (1, tokens[:6])])
    files = find_records(file)
    found = {one["name"]: one for one in gather([], files, texts_in_records(files))["groups"]}
    assert {name: (one["count"], one["dropped"], one["loss"]) for name, one in found.items()} == {
        "digits": (3, 2, 2.0),
        "operators": (2, 2, 1.0),
        "words": (2, 0, 2.0),
        "other": (5, 0, 3.8),
    }
    assert found["digits"]["share"] == 0.25 and found["digits"]["dropped_share"] == 0.6667
    assert gather([], files, Texts(None))["groups"] == []
    monkeypatch.setattr(gathering, "GROUPED", 3)
    found = {one["name"]: one["count"] for one in gather([], files, texts_in_records(files))["groups"]}
    assert found == {"digits": 2, "operators": 2, "words": 2, "too rare to tell": 6}


def test_the_facts_of_a_run_need_no_torch_either(tmp_path):
    folder = make_run(tmp_path / "run", steps=(10,))
    settings = {"selection": {"method": "sstoken"}, "model": {"hf_path": "none"}, "data": {"validation": "none"}}
    (folder / "run.json").write_text(json.dumps({"starts": [{"settings": settings}]}))
    assert_no_torch(folder, tmp_path)


def test_without_texts_ids_are_shown_and_that_is_told(tmp_path):
    folder = make_run(tmp_path / "run")
    files = open_runs([folder])[0].records()
    report = gather(open_runs([folder]), files, Texts(None))
    assert report["samples"][0]["tokens"]["text"][:5] == ["#9"] * 4 + ["#0"]
    assert any("--tokenizer" in note for note in report["notes"])


def test_page_and_list_of_a_run(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    page, ranked = tmp_path / "out" / "page.html", tmp_path / "out" / "dropped.jsonl"
    assert main(["--run", str(folder), "--output", str(page), "--export", str(ranked)]) == 0
    said = capsys.readouterr().out
    assert "no run to compare with was given (--compare)" in said and f"page: {page}" in said
    assert "<img src=x" not in page.read_text(encoding="utf-8")
    assert [json.loads(line)["dropped_share"] for line in ranked.read_text().splitlines()] == [0.3333] * 14


def test_records_alone_make_a_page(tmp_path, capsys):
    file = write_file(tmp_path / "scored.parquet", [(0, [Token(role=0), Token(1, text="a")])])
    assert main(["--records", str(file), "--output", str(tmp_path / "page.html")]) == 0
    assert "token records alone hold no validation loss" in capsys.readouterr().out
    assert "are shown as step 0" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_run_without_records_makes_a_page(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text('{"step": 1, "loss/validation": 2.0}\n')
    assert main(["--run", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "{}/none", "--output", "{}/p.html"], "--run: {}/none is not there"),
        (["--run", "{}/run", "--output", "{}"], "--output: {} is a folder"),
        (["--run", "{}/run", "--output", "{}/p.html", "--data", "{}/none"], "prepared data: {}/none does not exist"),
        (["--records", "{}/none.parquet", "--export", "{}/d.jsonl"], "token records: {}/none.parquet is not there"),
        (["--records", "{}/page.parquet", "--export", "{}/d.jsonl"], "cannot be read as Parquet"),
        (["--records", "{}/other.parquet", "--export", "{}/d.jsonl"], "has no column sample"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_run(tmp_path / "run", steps=(10,))
    (tmp_path / "page.parquet").write_text("no")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    assert main([one.replace("{}", str(tmp_path)) for one in arguments]) == 2
    assert message.replace("{}", str(tmp_path)) in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--output", "p.html"], ["--run", "r"], ["--records", "r", "--compare", "c", "--output", "p"]]
)
def test_what_is_missing_on_the_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def test_records_of_different_data_are_refused(tmp_path):
    for number in (1, 2):
        write_file(tmp_path / f"step_{number}.parquet", [(0, [Token()] * 2)], fingerprint=str(number))
    with pytest.raises(ValueError, match="are of different data"):
        data_fingerprint(find_records(tmp_path))


def test_the_tool_is_the_same_program(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", steps=(10,))
    monkeypatch.setattr(
        sys, "argv", ["report_selection.py", "--run", str(folder), "--export", str(tmp_path / "d.jsonl")]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "report_selection.py"), run_name="__main__")
    assert ended.value.code == 0 and (tmp_path / "d.jsonl").is_file()


def test_records_with_texts_need_no_torch(tmp_path):
    """Whose import takes more time and memory than all else."""
    assert_no_torch(make_run(tmp_path / "run", steps=(10,)), tmp_path)


def assert_no_torch(folder, tmp_path):
    code = (
        "import sys; from megatron_sstoken.report.program import main; "
        f"code = main(['--run', {str(folder)!r}, '--output', {str(tmp_path / 'p.html')!r}]); "
        "sys.exit(code or ('torch' in sys.modules) * 3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
