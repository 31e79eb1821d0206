"""However preparation ends, it says so in one line and leaves nothing behind."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_sstoken.commands import prepare_data
from megatron_sstoken.data import output as output_module
from megatron_sstoken.data import prepare as prepare_module
from megatron_sstoken.data import store
from megatron_sstoken.data import workers as workers_module
from megatron_sstoken.data.inputs import chunks
from megatron_sstoken.data.mixing import Plan
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.data.summary import summary
from megatron_sstoken.files import describe_os_error
from tests.helpers.preparation import run
from tests.helpers.toy import make_tokenizer, random_conversations, write_rows

ROWS = [{"messages": messages} for messages in random_conversations(40, seed=1)]
TOOL = Path(__file__).parents[3] / "tools" / "prepare_data.py"
NOISE = re.compile("prepare:|No CUDA runtime")  # the progress bar; what torch's builds for GPUs say without one


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start(tokenizer, tmp_path, count):
    """The tool at work, two processes tokenising."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS * count)
    command = [sys.executable, str(TOOL), "--input", str(path), "--tokenizer", str(tokenizer), "--workers", "2"]
    tool = subprocess.Popen(
        [*command, "--output", "out"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size for file in tmp_path.glob("out.partial/tokens.bin")):
        assert tool.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return tool


def ended(tool):
    """Exit code, and what the tool said besides its progress."""
    _, told = tool.communicate(timeout=60)
    return tool.returncode, [line for line in told.replace("\r", "\n").splitlines() if line and not NOISE.search(line)]


def test_a_killed_worker(tokenizer, tmp_path):
    tool = start(tokenizer, tmp_path, 600)
    worker = next(one for one in psutil.Process(tool.pid).children(recursive=True) if one.ppid() != tool.pid)
    worker.kill()
    code, (told,) = ended(tool)
    assert code == 2 and told.startswith("error: a worker was killed, probably out of memory: use fewer --workers")
    assert names(tmp_path) == ["rows.jsonl"]


@pytest.mark.slow
def test_the_end_of_a_job(tokenizer, tmp_path):
    tool = start(tokenizer, tmp_path, 600)
    tool.terminate()
    assert ended(tool) == (128 + signal.SIGTERM, []) and names(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("plan", [Plan(), Plan({"rows": 1}, split=0.3, deduplicate=True)], ids=["one", "mixed"])
@pytest.mark.parametrize("size", [300, 3000, 9000])
def test_a_limit_on_the_size_of_files(tokenizer, tmp_path, plan, size):
    path = write_rows(tmp_path / "rows.jsonl", ROWS * 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            run([path], tokenizer, tmp_path / "out", plan=plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = describe_os_error(caught.value)
    assert told.startswith(f"{tmp_path / 'out'}: File too large: raise the limit"), told
    assert names(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("place", ["save of an array", "checksums"])
def test_a_disk_that_is_full_at_the_end(tokenizer, tmp_path, monkeypatch, place, number):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)

    def full(*_):
        raise OSError(number, os.strerror(number))

    if place == "checksums":
        monkeypatch.setattr(store, "write_checksums", full)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError) as caught:
        run([path], tokenizer, tmp_path / "out")
    assert describe_os_error(caught.value).endswith(": make room, then start the same command again")
    assert str(tmp_path / "out") in describe_os_error(caught.value) and names(tmp_path) == ["rows.jsonl"]


def test_an_output_below_a_file(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    for out in (path / "out", path / "a" / "b" / "out"):
        with pytest.raises(ValueError, match=f"--output: .*out lies below {path}, which is a file"):
            run([path], tokenizer, out)


def test_a_folder_that_nobody_may_write_to(tokenizer, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    writable = os.access
    monkeypatch.setattr(output_module.os, "access", lambda path, mode: mode == os.R_OK and writable(path, mode))
    with pytest.raises(ValueError, match=f"--output: this user cannot write to {tmp_path}"):
        run([path], tokenizer, tmp_path / "a" / "out")
    assert names(tmp_path) == ["rows.jsonl"]


def test_folders_above_the_output_are_made_where_it_succeeds(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"wrong": 1}])
    with pytest.raises(ValueError, match="1 of 41 rows cannot"):
        run([path], tokenizer, tmp_path / "a" / "b" / "out")
    assert names(tmp_path) == ["rows.jsonl"]
    run([path], tokenizer, tmp_path / "a" / "b" / "out", on_bad_row="skip")
    assert names(tmp_path / "a" / "b") == ["out"]


def test_what_another_run_made_meanwhile(tokenizer, tmp_path, monkeypatch):
    """The second of two runs waits for nothing, and does no work for nothing."""
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    load = prepare_module.load_tokenizer

    def slowly(*arguments):
        monkeypatch.setattr(prepare_module, "load_tokenizer", load)
        run([path], tokenizer, tmp_path / "out")
        return load(*arguments)

    monkeypatch.setattr(prepare_module, "load_tokenizer", slowly)
    monkeypatch.setattr(prepare_module, "_place", _once(prepare_module._place))
    with pytest.raises(ValueError, match="out exists: choose another folder or pass --overwrite"):
        run([path], tokenizer, tmp_path / "out")
    assert names(tmp_path) == ["out", "rows.jsonl"]


def _once(function):
    calls = []

    def wrapped(*arguments):
        calls.append(1)
        assert len(calls) == 1, "the second run works"
        return function(*arguments)

    return wrapped


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_input_that_vanishes_or_grows(tokenizer, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    first, second = (write_rows(tmp_path / name, ROWS) for name in ("a.jsonl", "b.jsonl"))
    load = prepare_module.load_tokenizer

    def vanish(*arguments):
        second.unlink()
        return load(*arguments)

    monkeypatch.setattr(prepare_module, "load_tokenizer", vanish)
    with pytest.raises(OSError) as caught:
        run([first, second], tokenizer, tmp_path / "out", workers=workers)
    assert describe_os_error(caught.value) == f"{second}: No such file or directory: name another path"
    assert names(tmp_path) == ["a.jsonl"]


def test_all_rows_bad_although_they_are_skipped(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"wrong": number} for number in range(12)])
    with pytest.raises(ValueError) as caught:
        run([path], tokenizer, tmp_path / "out", on_bad_row="skip")
    first, *listed = str(caught.value).splitlines()
    assert first == "none of 12 rows can be prepared: correct them"
    assert listed[0].startswith(f"  {path}:1: no known form") and listed[-1] == "  … and 2 more"
    assert "partial" not in str(caught.value) and names(tmp_path) == ["rows.jsonl"]


def test_a_tokenizer_that_vanishes_before_the_workers_load_it(tmp_path, monkeypatch):
    make_tokenizer(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    load = prepare_module.load_tokenizer

    def vanish(*arguments):
        loaded = load(*arguments)
        (tmp_path / "tokenizer").rename(tmp_path / "moved")
        return loaded

    monkeypatch.setattr(prepare_module, "load_tokenizer", vanish)
    with pytest.raises(ValueError, match="tokenizer: .* does not exist: name a Hugging Face folder"):
        run([path], tmp_path / "tokenizer", tmp_path / "out", workers=2)
    assert names(tmp_path) == ["moved", "rows.jsonl"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--template_arguments", "[1]"], r"--template_arguments: '\[1\]' must be a JSON object"),
        (["--template_arguments", "{"], "--template_arguments: '{' is not JSON"),
        (["--mix", "a"], "--mix: 'a' must read name=share"),
        (["--thinking_weight", "-1"], "--thinking_weight: -1.0 must be at least 0"),
    ],
)
def test_mistakes_in_options(tmp_path, more, told):
    options = prepare_data.parse_arguments(["--input", "x", "--tokenizer", "x", "--output", str(tmp_path / "o"), *more])
    with pytest.raises(ValueError, match=told):
        prepare_data._prepare(options)


def test_options_reach_the_recipe(tmp_path):
    more = ["--train_turns", "last", "--thinking_weight", "0.5", "--allow_dropped", "tools", "system"]
    options = ["--input", "x", "--tokenizer", "x", "--output", "o", *more, "--template_arguments", '{"a": [1]}']
    assert prepare_data._recipe(prepare_data.parse_arguments(options)) == Recipe(
        None, "last", 0.5, frozenset(("tools", "system")), {"a": [1]}
    )


def test_notes_and_reasons_are_counted_once_a_row(tokenizer, tmp_path, monkeypatch):
    """Whatever the chunks: the summary groups rows by reason, numbers left out."""
    parse = workers_module.parse_row
    unused = ("id", "messages.id", "id")
    monkeypatch.setattr(workers_module, "parse_row", lambda *these: replace(parse(*these), unused=unused))
    bad = [{"messages": [{"role": "user", "content": number}]} for number in range(3)]
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 500)
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, *bad, {"messages": []}])
    run([path], tokenizer, tmp_path / "out", on_bad_row="skip")
    notes = SampleStore(tmp_path / "out").manifest.notes
    assert notes["column `id` is not used"] == notes["key `id` of `messages` is not used"] == 40
    assert notes["skipped: the conversation is empty"] == 1
    text = summary(tmp_path / "out")
    assert "40  column `id` is not used" in text and "3  `content` of message …" in text
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()[0])["line"] == 41
