"""What is written while training goes on is the state of its step; a writer that fails is told on every process."""

import os
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_sstoken.checkpoint.manifest import checkpoint_steps, open_checkpoint
from megatron_sstoken.checkpoint.size import checkpoint_bytes
from megatron_sstoken.integrity import damage
from tests.helpers import cli, programs
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store, make_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asynchronous")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(16, seed=3))
    return folder


def settings_in(folder, directory, **changes):
    values = {
        "training__steps": 6,
        "training__global_batch_size": 4,
        "selection__method": "attention",
        "checkpoint__directory": str(directory),
    }
    return make_settings(str(folder / "model"), str(folder / "data"), **(values | changes))


def write_when_told(sign):
    """From now on writers wait for a file before they write a tensor."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    write = filesystem_async._write_item

    def wait_and_write(*arguments, serialization_format=None):
        deadline = time.monotonic() + 60
        while not os.path.exists(sign) and time.monotonic() < deadline:
            time.sleep(0.01)
        more = {"serialization_format": serialization_format} if serialization_format else {}
        return write(*arguments, **more)

    filesystem_async._write_item = wait_and_write


def state_of(trainer):
    """Copies of all weights, and of the optimizer's tensors."""
    weights = [value.detach().clone() for chunk in trainer.model.chunks for value in chunk.parameters()]
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    states = [entry for part in parts for entry in part.optimizer.state.values()]
    return weights + [value.clone() for entry in states for value in entry.values()]


def save_and_go_on(rank, settings, sign):
    """Begin to save after two steps, take two more, let it be written, and load it."""
    from megatron_sstoken.checkpoint.save_load import load_checkpoint
    from megatron_sstoken.training.loop import save, training_step

    write_when_told(sign)
    trainer = make_trainer(settings)

    def step():
        training_step(trainer, trainer.step)
        trainer.step += 1

    step()
    step()
    expected, draws = state_of(trainer), torch.get_rng_state()
    save(trainer, wait=False)
    torch.rand(3)
    step()
    step()
    later = state_of(trainer)
    assert trainer.saver.is_writing and not checkpoint_steps(settings.checkpoint.directory)
    Path(sign).touch()
    trainer.saver.finish()
    assert not trainer.saver.is_writing
    checkpoint = open_checkpoint(settings.checkpoint.directory)
    load_checkpoint(checkpoint, trainer.model, trainer.optimizer, trainer.scheduler)
    loaded = state_of(trainer)
    assert torch.equal(torch.get_rng_state(), draws) and damage(checkpoint.folder) == []
    assert not any(torch.equal(a, b) for a, b in zip(expected, later, strict=True)), "training went on"
    return checkpoint.state.step, [torch.equal(a, b) for a, b in zip(expected, loaded, strict=True)]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_state_of_the_step_is_saved_although_training_went_on(folder, tmp_path, precision):
    settings = settings_in(
        folder, tmp_path / "run", training__precision=precision, lora__rank=0, optimizer__schedule="constant"
    )
    for step, same in run_distributed(save_and_go_on, 2, settings, str(tmp_path / "go")):
        assert step == 2 and len(same) > 50 and all(same)


def hold_back_on_the_second(rank):
    if rank == 1:
        write_when_told("/nowhere/at/all")


@pytest.mark.parametrize("victim", ["writer", pytest.param("its own process", marks=pytest.mark.slow)])
def test_a_killed_writer_is_told_on_both_processes(folder, tmp_path, victim):
    """While the others are done, and train."""
    directory = tmp_path / "run"
    arguments = cli.settings_arguments(settings_in(folder, directory, checkpoint__save_every=2, training__steps=4000))
    program = programs.start("megatron_sstoken.train", arguments, 2, tmp_path / "out", before=hold_back_on_the_second)
    deadline = time.monotonic() + 60
    while "step 3/" not in program.output():
        assert time.monotonic() < deadline, program.output()
        time.sleep(0.02)
    children = psutil.Process(program.processes[1].pid).children()
    (writer,) = [child for child in children if "multiprocessing.spawn" not in " ".join(child.cmdline())]
    below = writer.children()
    (below[0] if victim == "its own process" and below else writer).kill()  # megatron-core 0.19 has none below it
    for code, told in program.wait():
        lines = [line for line in told.splitlines() if line.startswith("error: ")]
        assert code == 1 and lines and "Traceback" not in told, told
        for line in lines:  # process 0 also repeats what another one says
            assert f"{directory}/step_0000002.partial: process 1: its writer " in line, told
            assert "ended with signal 9: see whether its machine ran out of memory" in line
    assert not list(directory.glob("step_*")) and not program.left()


def test_a_run_saves_by_the_clock_and_waits_for_its_last_checkpoint(folder, tmp_path):
    settings = settings_in(folder, tmp_path / "run", checkpoint__save_minutes=1e-6, checkpoint__keep=0)
    result = programs.run("megatron_sstoken.train", cli.settings_arguments(settings), 2)
    assert result.returncode == 0, result.stderr
    steps = checkpoint_steps(str(tmp_path / "run"))
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert result.stdout.index("saved") > result.stdout.index("step 2/"), "training goes on meanwhile"
    assert not any(damage(path) for path in steps.values()) and not list((tmp_path / "run").glob("*.partial"))


CASES = {
    "fp32, tensor 2": {"parallel__tensor": 2, "model__vocabulary_multiple": 64},
    "bf16, pipeline 2": {"parallel__pipeline": 2, "training__precision": "bf16"},
    "adapters, data 2": {"lora__rank": 48},
}


def save_at_once(rank, settings):
    from megatron_sstoken.training.loop import save, training_step

    trainer = make_trainer(settings)
    training_step(trainer, 0)
    trainer.step += 1
    save(trainer)
    return checkpoint_bytes(trainer.plan.architecture, settings)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "case", ["fp32, tensor 2", *(pytest.param(case, marks=pytest.mark.slow) for case in [*CASES][1:])]
)
def test_a_checkpoint_is_as_large_as_was_said(folder, tmp_path, case, tied):
    make_model(tmp_path / "model", hidden_size=256, intermediate_size=512, tie_word_embeddings=tied)
    settings = settings_in(folder, tmp_path / "run", **CASES[case])
    settings.model.hf_path = str(tmp_path / "model")
    ((expected, _), (step,)) = (
        run_distributed(save_at_once, 2, settings),
        checkpoint_steps(str(tmp_path / "run")).values(),
    )
    written = sum(path.stat().st_size for path in step.iterdir())
    assert expected < written < 1.05 * expected, f"{written / expected:.3f}"
