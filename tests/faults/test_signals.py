"""Signals to every process of a job, as torchrun and Slurm send them, in the middle of a save: it ends with a checkpoint."""

import signal
import time

import pytest

from megatron_sstoken.checkpoint.manifest import checkpoint_steps
from megatron_sstoken.files import read_json
from megatron_sstoken.folders import RUN_FILE
from tests.helpers import cli, programs
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

TRAIN, STEPS = "megatron_sstoken.train", 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(16, seed=3))
    return folder


def arguments_of(folder, directory, **changes):
    values = {
        "training__steps": STEPS,
        "training__global_batch_size": 4,
        "checkpoint__directory": str(directory),
        "checkpoint__save_every": 2,
        "selection__method": "attention",
    }
    return cli.settings_arguments(make_settings(str(folder / "model"), str(folder / "data"), **(values | changes)))


def wait_until(condition, program):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and program.processes[0].is_alive(), program.output()
        time.sleep(0.0005)


@pytest.mark.parametrize(
    ("number", "saves_before"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)], ids=["SIGTERM-first", "SIGUSR1-second"]
)
def test_a_signal_in_the_middle_of_a_save(folder, tmp_path, saves_before, number):
    directory = tmp_path / "run"
    program = programs.start(TRAIN, arguments_of(folder, directory), 2, tmp_path / "out", before=hear_signals)
    step = 2 + 2 * saves_before
    wait_until((directory / f"step_{step:07d}.partial").exists, program)
    for process in program.members():
        process.send_signal(number)
    ended = program.wait()
    assert [code for code, _ in ended] == [0, 0], ended
    stopped = max(checkpoint_steps(str(directory)))
    assert step <= stopped <= step + 1, "after the step it is in"
    assert f"asked to stop: ended after step {stopped} of {STEPS}" in ended[0][1]
    (start,) = read_json(directory / RUN_FILE)["starts"]
    assert (start["ended"], start["to_step"]) == ("stopped", stopped) and start["end"]
    assert not list(directory.glob("*.partial")) and not (directory / "run.lock").exists()
    assert not program.left()


def hear_signals(rank):
    """Whoever runs the tests may ignore them."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("during", ["history", "training"])
def test_no_process_outlives_a_run_whose_ranks_are_killed(folder, tmp_path, during):
    store = tmp_path / "history"
    changes = {"selection__method": "sstoken", "history__store": str(store)}
    program = programs.start(TRAIN, arguments_of(folder, tmp_path / "run", **changes), 2, tmp_path / "out")
    sign = store / "written.bin" if during == "history" else tmp_path / "run" / "step_0000002"
    wait_until(sign.exists, program)
    for process in program.processes:
        process.kill()
    left = program.left()
    assert not left, [process.cmdline() for process in left]
    for process in program.processes:
        process.join()
