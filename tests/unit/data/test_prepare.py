"""Preparation from JSON lines to a folder: order, bad rows, interruption, overwriting."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_sstoken.commands.prepare_data import main
from megatron_sstoken.data.conversation import Conversation
from megatron_sstoken.data.inputs import chunks
from megatron_sstoken.data.recipe import FieldNames, Recipe
from megatron_sstoken.data.rows.formats import decode_line, parse_row
from megatron_sstoken.data.store import SampleStore, StoreWriter
from megatron_sstoken.data.summary import summary
from megatron_sstoken.data.text import limits
from megatron_sstoken.data.text.masks import tokenize_conversations
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.lock import Lock
from tests.helpers.preparation import run
from tests.helpers.toy import (
    CHAT_TEMPLATES,
    exchange,
    make_sentencepiece,
    random_conversations,
    write_rows,
)

ROWS = [{"messages": messages} for messages in random_conversations(40, seed=1)]
TOOL = Path(__file__).parents[3] / "tools" / "prepare_data.py"
GOOD = json.dumps(ROWS[0]).encode()


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def test_samples_are_those_of_the_rows(tokenizer, tmp_path, monkeypatch):
    """Several files, chunks of a few rows, blank lines, no newline at the end, a byte order mark."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    write_rows(tmp_path / "a.jsonl", ROWS[:25])
    text = "\n\n".join(json.dumps(row) for row in ROWS[25:])
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n \n{json.dumps(ROWS[0])}".encode())
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    manifest = run(inputs, tokenizer, tmp_path / "out")
    store = SampleStore(tmp_path / "out")
    rows = [*ROWS, ROWS[0]]
    samples = tokenize_conversations(load_tokenizer(tokenizer), [Conversation(row["messages"]) for row in rows])
    assert len(store) == len(rows) and store.rows.tolist() == list(range(len(rows)))
    for index, sample in enumerate(samples):
        assert store.tokens(index).tolist() == sample.tokens.tolist()
        assert store.roles(index).tolist() == sample.roles.tolist()
    for source, path in zip(manifest.sources, inputs, strict=True):
        data = path.read_bytes()
        assert source == {"path": str(path), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest.tokenizer_fingerprint == load_tokenizer(tokenizer).fingerprint
    assert manifest.template == CHAT_TEMPLATES["generation"]
    assert manifest.num_response_tokens == sum(int(sample.roles[1:].sum()) for sample in samples)


def test_workers_change_no_byte(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "bad"}, *ROWS])
    for workers in (1, 3):
        run([path], tokenizer, tmp_path / f"out{workers}", workers=workers, on_bad_row="skip")
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    assert SampleStore(tmp_path / "out3").rows.tolist() == [*range(40), *range(41, 81)]


BAD_LINES = [b'{"messages": []}', b"", GOOD, b"nonsense", b"   ", b'{"prompt": "\xff"}', GOOD, b"[]"]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_are_an_error_with_their_lines(tokenizer, tmp_path, workers):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(BAD_LINES))
    with pytest.raises(ValueError) as caught:
        run([path], tokenizer, tmp_path / "out", workers=workers)
    first, *listed = str(caught.value).splitlines()
    assert first.startswith("4 of 6 rows cannot be prepared") and "--on_bad_row skip" in first
    reasons = [
        "1: the conversation is empty",
        "4: invalid JSON",
        "6: byte 12 of the line is not UTF-8",
        "8: a row must be",
    ]
    assert len(listed) == len(reasons)
    assert all(shown.startswith(f"  {path}:{reason}") for shown, reason in zip(listed, reasons, strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_ten_bad_rows_are_listed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"nonsense\n" * 25)
    with pytest.raises(ValueError, match="none of 25 rows") as caught:
        run([path], tokenizer, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 12 and ":10: " in lines[10] and lines[11] == "  … and 15 more"


def test_bad_rows_are_skipped_and_kept(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(BAD_LINES))
    manifest = run([path], tokenizer, tmp_path / "out", on_bad_row="skip")
    assert (manifest.num_samples, manifest.num_skipped) == (2, 4)
    assert SampleStore(tmp_path / "out").rows.tolist() == [1, 4]
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(bad["file"], bad["line"]) for bad in skipped] == [(str(path), line) for line in (1, 4, 6, 8)]
    assert skipped[1]["text"] == "nonsense" and skipped[2]["text"] == '{"prompt": "\\xff"}'
    assert "invalid JSON" in skipped[1]["reason"]
    assert "skipped          4 (see" in summary(tmp_path / "out")


def test_rows_bad_for_the_template_are_in_line_order(tokenizer, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ raise_exception('no') if messages[0].content == 'x' }}" + CHAT_TEMPLATES["generation"])
    rows = [{"messages": exchange("x", "a")}, {"wrong": 1}, {"messages": exchange("x", "b")}, ROWS[0]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run([path], tokenizer, tmp_path / "out", chat_template=template, on_bad_row="skip")
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [bad["line"] for bad in skipped] == [1, 2, 3]
    assert skipped[2]["reason"] == "the chat template refuses the conversation: no"
    assert json.loads(skipped[2]["text"]) == rows[2]


def test_nothing_usable(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in (b"", b"\n \n", b"nonsense"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="there is no row|none of 1 rows can be"):
            run([path], tokenizer, tmp_path / "out", on_bad_row="skip")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("workers", [1, 2])
def test_interruption_leaves_nothing(tokenizer, tmp_path, monkeypatch, error, workers):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    extend = StoreWriter.extend

    def fail_in_the_middle(self, samples, rows, labels):
        extend(self, samples, rows, labels)
        if 20 in rows:
            raise error("stop")

    monkeypatch.setattr(StoreWriter, "extend", fail_in_the_middle)
    with pytest.raises(error, match="stop"):
        run([path], tokenizer, tmp_path / "out", workers=workers)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "number",
    [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGKILL)],
    ids=lambda number: number.name,
)
def test_signals_leave_no_process_and_nothing_complete(tokenizer, tmp_path, number):
    path = write_rows(tmp_path / "rows.jsonl", ROWS * 2000)  # seconds of work
    command = [
        sys.executable,
        str(TOOL),
        "--input",
        str(path),
        "--tokenizer",
        str(tokenizer),
        "--workers",
        "2",
    ]
    with subprocess.Popen(
        [*command, "--output", "out"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_hear_signals,
    ) as tool:
        deadline = time.monotonic() + 40
        # bytes in the file: workers are at work
        while not any(file.stat().st_size for file in tmp_path.glob("out.partial/tokens.bin")):
            assert tool.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        workers = psutil.Process(tool.pid).children(recursive=True)
        os.killpg(tool.pid, number) if number == signal.SIGINT else tool.send_signal(number)  # as a terminal does
        told = tool.stderr.read()
    assert "Traceback" not in told and (number != signal.SIGINT or told.rstrip().endswith("interrupted"))
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    left = sorted(file.name for file in tmp_path.iterdir() if file.name != "rows.jsonl")
    assert left == (["out.lock", "out.partial"] if number == signal.SIGKILL else [])
    if left:
        with pytest.raises(ValueError, match="is incomplete"):
            SampleStore(tmp_path / "out.partial")
        run([write_rows(path, ROWS)], tokenizer, tmp_path / "out")
        assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "rows.jsonl"], "the next run tidies"


def _hear_signals():
    """Whoever runs the tests may ignore them, as nohup and background jobs do."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def test_one_process_at_a_time_makes_a_folder(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with Lock(tmp_path / "out.lock") as lock:
        assert lock.take() is None
        with pytest.raises(ValueError, match=f"is being made by process {os.getpid()} on "):
            run([path], tokenizer, tmp_path / "out")
    assert len(run([path], tokenizer, tmp_path / "out").sources) == 1


def test_sources_and_what_others_use_or_made_are_not_overwritten(tokenizer, tmp_path):
    path, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    run([path], tokenizer, out)
    inside = write_rows(out / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="is, or holds, what is read"):
        inside.rename(out / "skipped.jsonl")
        run([out / "skipped.jsonl"], tokenizer, out, overwrite=True)
    (out / "skipped.jsonl").rename(out / "mine.jsonl")
    with pytest.raises(ValueError, match="mine.jsonl was not made by this tool"):
        run([path], tokenizer, out, overwrite=True)
    (out / "mine.jsonl").unlink()
    for folder in ("history", "external", "chosen"):
        with Lock(out / folder / "abc.lock") as lock:
            assert lock.take() is None
            with pytest.raises(ValueError, match=f"is filling .*{folder}"):
                run([path], tokenizer, out, overwrite=True)
    run([path], tokenizer, out, overwrite=True)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes longer than"),
        ("{{ messages|length ** (9 ** 9) ** 9 }}", "takes longer than"),
        ("{{ 'a' * 20000000000 }}", "takes more than 8 GiB"),
        ("{{ 'a' * 50000000 }}", "makes 50,000,000 characters of a conversation"),
    ],
    ids=["loops", "power", "memory", "size"],
)
def test_a_template_without_bounds_is_refused(tokenizer, tmp_path, monkeypatch, template, told):
    monkeypatch.setattr(limits, "SECONDS", 0.5 if "longer" in told else 10.0)
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    (tmp_path / "chat.jinja").write_text(template)
    with pytest.raises(ValueError, match=told):
        run([path], tokenizer, tmp_path / "out", chat_template=tmp_path / "chat.jinja", on_bad_row="skip")
    assert not (tmp_path / "out").exists()


def test_workers_are_limited_as_well(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    (tmp_path / "chat.jinja").write_text("{{ 'a' * 20000000000 }}")
    with pytest.raises(ValueError, match="takes more than 8 GiB"):
        run([path], tokenizer, tmp_path / "out", chat_template=tmp_path / "chat.jinja", workers=2)


def test_overwriting(tokenizer, tmp_path, monkeypatch):
    path, out = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    run([path], tokenizer, out)
    before = contents(out)
    write_rows(path, ROWS[:5])
    with pytest.raises(ValueError, match="exists: choose another folder or pass --overwrite"):
        run([path], tokenizer, out)
    write_rows(path, [{"wrong": 1}])
    with pytest.raises(ValueError, match="none of 1 rows can be prepared"):
        run([path], tokenizer, out, overwrite=True)
    assert contents(out) == before
    write_rows(path, ROWS[:5])
    run([path], tokenizer, out, overwrite=True)
    assert len(SampleStore(out)) == 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "rows.jsonl"]


@pytest.mark.parametrize("manifest", [None, "{}", "[]", "nonsense"])
def test_foreign_folders_are_not_overwritten(tokenizer, tmp_path, manifest):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    if manifest:
        (out / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="was not made by this tool"):
        run([write_rows(tmp_path / "rows.jsonl", ROWS)], tokenizer, out, overwrite=True)
    assert (out / "precious").read_text() == "x"


def test_bad_arguments(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="--input: .*absent is not there"):
        run([tmp_path / "absent"], tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="--workers: 0 must be at least 1"):
        run([path], tokenizer, tmp_path / "out", workers=0)
    with pytest.raises(ValueError, match="--chat_template: .*absent is neither a file nor"):
        run([path], tokenizer, tmp_path / "out", chat_template=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"does not read moood: correct .* that it reads: bos_token, mood\)"):
        template = tmp_path / "template.jinja"
        template.write_text("{{ bos_token }}{{ mood }}" + CHAT_TEMPLATES["generation"])
        recipe = Recipe(template_arguments={"moood": "calm", "mood": "calm"})
        run([path], tokenizer, tmp_path / "out", chat_template=template, recipe=recipe)
    run([path], tokenizer, tmp_path / "out")
    with pytest.raises(ValueError, match="out was prepared by this tool: name the files that it was made of"):
        run([tmp_path / "out"], tokenizer, tmp_path / "again")


def test_what_rows_lack_or_leave_empty_is_noted(tokenizer, tmp_path):
    turns = [*exchange("the quick fox", ""), *exchange("how many", "7")]
    rows = [{"m": turns, "chat_template_kwargs": {"mood": 1}}, {"m": turns, "rules": ""}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    notes = run([path], tokenizer, tmp_path / "out", recipe=Recipe(FieldNames.parse("messages=m,system=rules"))).notes
    assert notes["column `rules`, which --fields names, is not there"] == 1
    assert notes["key `mood` of `chat_template_kwargs` is not used"] == 1
    assert [count for text, count in notes.items() if text.startswith("an assistant message is empty")] == [2]


def test_plain_text_with_sentencepiece(tmp_path):
    model = make_sentencepiece(tmp_path / "toy.model")
    path = write_rows(tmp_path / "rows.jsonl", [{"q": "the fox", "a": "the dog"}])
    manifest = run([path], model, tmp_path / "out", recipe=Recipe(FieldNames("q", "a")))
    assert manifest.template == manifest.template_source == "none (plain text)"
    store = SampleStore(tmp_path / "out")
    assert store.tokens(0)[-1] == manifest.eos_token_id and store.roles(0)[-1] == 1
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the tokenizer has no chat template.*--chat_template"):
        run(
            [write_rows(path, ROWS[:1] if len(ROWS[0]["messages"]) > 2 else ROWS[1:2])],
            model,
            tmp_path / "multi",
        )


def test_command_line(tokenizer, tmp_path):
    """From another folder, with the package not installed."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    command = [
        sys.executable,
        str(TOOL),
        "--input",
        str(path),
        "--tokenizer",
        str(tokenizer),
        "--workers",
        "2",
    ]
    done = subprocess.run([*command, "--output", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if "tokens " not in line[:16])
    assert table["rows"] == table["samples"] == "40" and table["skipped"] == "0" and table["output"] == "out"
    assert table["template"] == "of the tokenizer, roles by generation marks"
    assert parse_row(decode_line(path.read_bytes().splitlines()[0])).messages == ROWS[0]["messages"]
    again = subprocess.run([*command, "--output", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.splitlines()[-1].startswith("error: --output: out exists")


def test_samples_are_shown(tokenizer, tmp_path, capsys):
    """After preparing, and of a finished folder."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = ["--output", str(tmp_path / "out"), "--show", "2"]
    assert main([*arguments, "--input", str(path), "--tokenizer", str(tokenizer), "--workers", "1"]) == 0
    made = capsys.readouterr().out
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown and made.endswith(shown) and shown.count("── sample") == 2
    first = next(message["content"] for message in ROWS[0]["messages"] if message["role"] == "assistant")
    assert f"<|im_start|>assistant\n«{first}<|im_end|>»" in shown
    assert main(["--output", str(tmp_path / "absent"), "--show", "1"]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "out")])
    assert "--input" in capsys.readouterr().err


def test_showing_ends_in_peace_where_nobody_reads_on(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    run([path], tokenizer, tmp_path / "out")
    command = f"{sys.executable} {TOOL} --output out --show 40 | head -1"
    cut = subprocess.run(command, cwd=tmp_path, shell=True, capture_output=True, text=True)
    told = [line for line in cut.stderr.splitlines() if "No CUDA runtime" not in line]  # torch's builds for GPUs
    assert told == [] and "sample 0" not in cut.stdout
