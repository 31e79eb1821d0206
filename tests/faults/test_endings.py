"""What befalls one process ends all of them soon, with one line that says what it was, on the process and on process 0."""

import errno
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path

import pytest

from megatron_sstoken.checkpoint.manifest import checkpoint_steps
from megatron_sstoken.ending import run_to_exit_code
from megatron_sstoken.files import describe_os_error, write_failure
from tests.helpers import cli, programs
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

TRAIN = "megatron_sstoken.train"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endings")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(8, seed=3))
    return folder


def arguments_of(folder, directory, **changes):
    values = {"checkpoint__directory": str(directory), "training__steps": 3, "selection__method": "attention"}
    settings = make_settings(
        str(folder / "model"), str(folder / "data"), **(values | {"training__global_batch_size": 2} | changes)
    )
    return cli.settings_arguments(settings)


def errors_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def small_files_on_the_second(rank):
    """As on a disk that is full for one node: megatron's writer may write no more than 8 KiB into a file."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, 1 << 13))


def test_a_failed_save_is_told_on_both_processes_with_its_path(folder, tmp_path):
    directory = tmp_path / "run"
    started = programs.start(
        TRAIN, arguments_of(folder, directory), 2, tmp_path / "out", before=small_files_on_the_second
    )
    (first, told0), (second, told1) = started.wait()
    assert (first, second) == (1, 1)
    for output in (told0, told1):
        assert any(str(directory / "step_0000003.partial") in line for line in errors_in(output)), output
        assert "Traceback" not in output
    assert not list(directory.glob("step_*")), "nothing half-written stays"


def fail_on_the_second(rank):
    """The second process meets a file that it may not read, in the middle of a step."""
    if rank == 1:
        from megatron_sstoken.data.batches import BatchLoader

        def load(self, batch):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/tokens.bin")

        BatchLoader.load = load


def test_process_zero_repeats_what_another_one_died_of(folder, tmp_path):
    begun = time.monotonic()
    started = programs.start(
        TRAIN, arguments_of(folder, tmp_path / "run"), 2, tmp_path / "out", before=fail_on_the_second
    )
    (first, told0), (second, told1) = started.wait()
    assert (first, second) == (1, 1) and time.monotonic() - begun < 60
    expected = "/data/tokens.bin: Permission denied: let this user read and write there, or name another place"
    assert errors_in(told1) == errors_in(told0) and len(errors_in(told0)) == 1
    assert errors_in(told0)[0].startswith("error: process 1 on ") and errors_in(told0)[0].endswith(expected)
    assert "Traceback" not in told0 + told1


def test_debug_adds_the_traceback(folder, tmp_path):
    arguments = [*arguments_of(folder, tmp_path / "run"), "--debug"]
    (_, (code, told)) = programs.start(TRAIN, arguments, 2, tmp_path / "out", before=fail_on_the_second).wait()
    assert code == 1 and "Traceback" in told and "Permission denied" in told


def stand_still_on_the_second(rank):
    if rank == 1:
        from megatron_sstoken.data.batches import BatchLoader

        load = BatchLoader.load

        def load_slowly(self, batch):
            if batch == 1:
                time.sleep(1000)
            return load(self, batch)

        BatchLoader.load = load_slowly


def test_a_process_that_stands_still_is_named_with_its_place(folder, tmp_path):
    arguments = arguments_of(folder, tmp_path / "run", training__timeout_minutes=0.1)
    ended = programs.start(TRAIN, arguments, 2, tmp_path / "out", before=stand_still_on_the_second).wait()
    assert [code for code, _ in ended] == [1, 1]
    told = "".join(output for _, output in ended)
    assert "error: no process got further for 0.1 minutes (training.timeout_minutes):" in told
    assert re.search(r"process 1 is at: step 2, works in wait .*\(called at prefetch.py:", told), told
    assert "process 0 is at: step 2, waits for others in " in told
    assert "process 1 stands here:" in ended[1][1] and "load_slowly" in ended[1][1]


def test_a_stopped_process_gives_no_sign_of_life(folder, tmp_path):
    arguments = arguments_of(folder, tmp_path / "run", training__timeout_minutes=0.1, training__steps=2000)
    started = programs.start(TRAIN, arguments, 2, tmp_path / "out")
    deadline = time.monotonic() + 60
    while "step 3/" not in started.output():
        assert time.monotonic() < deadline, started.output()
        time.sleep(0.02)
    os.kill(started.processes[1].pid, signal.SIGSTOP)
    started.processes[0].join(60)
    assert started.processes[0].exitcode == 1
    os.kill(started.processes[1].pid, signal.SIGKILL)
    assert "process 1 gives no sign of life, was last at: " in started.output(), started.output()


def log_to_a_full_disk(rank):
    """Standard output and TensorBoard meet a device without room."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    def fail(self, *event):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    EventFileWriter.add_event = fail


def test_a_full_log_disk_does_not_end_the_run(folder, tmp_path):
    directory = tmp_path / "run"
    arguments = arguments_of(folder, directory)
    ((code, told),) = programs.start(TRAIN, arguments, 1, tmp_path / "out", before=log_to_a_full_disk).wait()
    assert code == 0 and max(checkpoint_steps(str(directory))) == 3
    assert "warning: standard output: No space left on device: going on without it" in told
    assert told.count("warning: ") == 2 and "/logs: No space left on device" in told


def test_what_a_full_disk_holds_back_troubles_nobody_later(monkeypatch, capfd):
    """Whoever ends the process flushes once more, and would make a failure of it."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_to_exit_code(lambda: print("x")) == 0
        assert sys.stdout is full
        full.flush()
    assert "warning: standard output: No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            "/x: No space left on device: make room, then start the",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
            "/x: No such file or directory: name another",
        ),
        (
            OSError(errno.EIO, "Input/output error", "/x", None, "/y"),
            "/x → /y: Input/output error: see whether the disk",
        ),
        (OSError("odd"), "odd: start the same command again"),
    ],
)
def test_messages_have_path_reason_and_remedy(error, expected):
    assert describe_os_error(error).startswith(expected)


def test_the_cause_is_found_however_deep(tmp_path):
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as cause:
            raise RuntimeError("unexpected pos 704 vs 598") from cause
    except RuntimeError as error:
        assert write_failure(error, tmp_path / "a").errno == errno.ENOSPC
    failure = RuntimeError("ranks: [1]")
    failure.failures = {1: (OSError(errno.EDQUOT, "quota"), "a traceback")}
    found = write_failure(failure, tmp_path / "not" / "there")
    assert (found.errno, Path(found.filename)) == (errno.EDQUOT, tmp_path / "not" / "there")
    assert write_failure(ValueError("odd\nlines"), tmp_path).strerror == "ValueError: odd"
