"""A run stopped by SIGKILL goes on where it was: bit for bit on the same layout, closely on another."""

import shutil
import subprocess
import time

import psutil
import pytest
import torch

from megatron_sstoken.checkpoint.manifest import checkpoint_steps
from megatron_sstoken.training.records import read_records
from tests.helpers import cli, programs
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

NUM_SAMPLES, GLOBAL_BATCH, NUM_STEPS, SAVE_EVERY = 42, 4, 23, 4
LAYOUT = {"parallel__tensor": 2}
OTHERS = {"single": (1, {}), "pp2": (2, {"parallel__pipeline": 2}), "dp2": (2, {})}


def settings_in(folder, directory, **changes):
    """The run under test: its last global batch is not full, and its epochs end inside a batch."""
    values = {
        "training__global_batch_size": GLOBAL_BATCH,
        "training__steps": NUM_STEPS,
        "training__micro_batch_size": 2,
        "optimizer__schedule": "linear",
        "checkpoint__directory": str(directory),
        "checkpoint__save_every": SAVE_EVERY,
        "logging__records_every": 1,
    }
    return make_settings(str(folder / "model"), str(folder / "data"), **(values | changes))


def train_command(num_ranks, settings):
    return cli.launch_command(num_ranks, "megatron_sstoken.train", *cli.settings_arguments(settings))


def train(num_ranks, settings):
    return programs.run("megatron_sstoken.train", cli.settings_arguments(settings), num_ranks)


def losses(directory):
    return cli.scalars(directory / "logs", "loss/selected")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A whole run, and another one killed after its second checkpoint, both with tensor parallel 2."""
    folder = tmp_path_factory.mktemp("resume")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(NUM_SAMPLES, seed=7))
    whole = train(2, settings_in(folder, folder / "whole", **LAYOUT))
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        train_command(2, settings_in(folder, folder / "killed", **LAYOUT)),
        env=cli.environment(),
        cwd=cli.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while max(checkpoint_steps(folder / "killed"), default=0) < 2 * SAVE_EVERY:
        assert time.monotonic() < deadline and process.poll() is None, "the run should be saving checkpoints"
        time.sleep(0.005)
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        member.kill()  # SIGKILL to every worker, then to torchrun
    process.wait()
    assert not (folder / "killed" / f"step_{NUM_STEPS:07d}").exists(), "killed too late to show anything"
    return folder


def resume(folder, target, num_ranks, **layout):
    """Copy the killed run's checkpoints and go on from them."""
    shutil.copytree(folder / "killed", target, ignore=shutil.ignore_patterns("logs"))
    result = train(num_ranks, settings_in(folder, target, **layout))
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    return losses(target)


@pytest.fixture(scope="module")
def resumed(case):
    """The killed run, gone on with on the same layout: its folder and its losses."""
    return case / "resumed", resume(case, case / "resumed", 2, **LAYOUT)


def test_same_layout_continues_bit_for_bit(case, resumed):
    whole, rest = losses(case / "whole"), resumed[1]
    assert set(whole) == set(range(1, NUM_STEPS + 1))
    assert 2 * SAVE_EVERY < min(rest) <= NUM_STEPS == max(rest)
    assert rest == {step: loss for step, loss in whole.items() if step in rest}


def test_every_sample_is_seen_as_often_as_in_the_whole_run(case, resumed):
    seen = []
    for step in range(1, NUM_STEPS + 1):
        after = resumed[0] / "logs" / "records" / f"step_{step:07d}.parquet"
        before = case / "killed" / "logs" / "records" / f"step_{step:07d}.parquet"
        records = read_records(after if after.exists() else before)
        seen += records["sample"][records["position"] == 0].tolist()
    assert len(seen) == NUM_STEPS * GLOBAL_BATCH
    # Two epochs fill 21 batches exactly; the border between them lies inside a batch.
    two_epochs = seen[: 2 * NUM_SAMPLES]
    assert sorted(two_epochs) == sorted(2 * list(range(NUM_SAMPLES)))
    assert len(set(seen[2 * NUM_SAMPLES :])) == NUM_STEPS * GLOBAL_BATCH - 2 * NUM_SAMPLES


@pytest.mark.parametrize("layout", ["single", "pp2", pytest.param("dp2", marks=pytest.mark.slow)])
def test_another_layout_continues_closely(case, tmp_path, layout):
    num_ranks, parallel = OTHERS[layout]
    whole, rest = losses(case / "whole"), resume(case, tmp_path / "run", num_ranks, **parallel)
    assert max(rest) == NUM_STEPS
    for step, loss in rest.items():
        assert loss == pytest.approx(whole[step], abs=1e-5), (layout, step)


def test_a_resumed_run_follows_the_optimizer_settings_that_it_is_given(case, tmp_path):
    """megatron would take the learning rate's bounds, betas and epsilon from the checkpoint."""
    changes = {"optimizer__learning_rate": 2e-5, "optimizer__min_learning_rate": 1e-5, "optimizer__beta1": 0.8}
    shutil.copytree(case / "killed", tmp_path / "run", ignore=shutil.ignore_patterns("logs"))
    settings = settings_in(case, tmp_path / "run", **LAYOUT, **changes)
    result = train(2, settings)
    assert result.returncode == 0, result.stderr
    for change in ("learning_rate: 0.001 → 2e-05", "min_learning_rate: 0.0 → 1e-05", "beta1: 0.9 → 0.8"):
        assert f"note: the run goes on with other settings: optimizer.{change}" in result.stdout.splitlines()
    rates = cli.scalars(tmp_path / "run" / "logs", "optimizer/learning_rate")
    assert max(rates.values()) < 2e-5 and min(rates.values()) >= 1e-5, rates
    _, state = max(checkpoint_steps(tmp_path / "run").items())
    if (state / "common.pt").exists():  # the line of megatron-core that has this file
        groups = torch.load(state / "common.pt", weights_only=True)["optimizer"]["optimizer"]["param_groups"]
        assert {group["betas"] for group in groups} == {(0.8, 0.95)} and {group["max_lr"] for group in groups} == {2e-5}


def test_resuming_another_run_is_refused(case, tmp_path):
    settings = settings_in(case, case / "whole", training__seed=4, training__global_batch_size=6)
    result = train(1, settings)
    assert result.returncode != 0
    assert "training.seed=1234, now 4" in result.stderr and "training.global_batch_size=4, now 6" in result.stderr
