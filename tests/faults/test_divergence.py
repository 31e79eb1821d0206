"""Steps that are not finite are skipped if asked; checkpoints of a diverged run say so, and no run takes them unasked."""

import math

import pytest

from megatron_sstoken.checkpoint.manifest import checkpoint_steps, open_checkpoint, read_run_state
from megatron_sstoken.conversion.hf import to_hf
from megatron_sstoken.files import read_json
from megatron_sstoken.folders import RUN_FILE
from megatron_sstoken.integrity import damage
from tests.helpers import cli
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divergence")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(16, seed=3))
    return folder


def settings_in(folder, directory, **changes):
    values = {"training__steps": 4, "training__global_batch_size": 4, "checkpoint__directory": str(directory)}
    return make_settings(str(folder / "model"), str(folder / "data"), **(values | changes))


def train_with_bad_steps(rank, settings, bad):
    """Train with values that are not finite in some steps: number → "loss" or "gradient". The weights' sums, and the error."""
    from megatron_sstoken import train
    from megatron_sstoken.training import loop
    from megatron_sstoken.training.metrics import PendingMetrics

    real_read, real_pass, sums, step = PendingMetrics.read, loop.train_on_selected, [], iter(range(100))

    def pass_on(model, batches, selector):
        reports = real_pass(model, batches, selector)
        pass_on.step = next(step)
        sums.append(sum(float(one.detach().double().sum()) for one in model.chunks[0].parameters()))
        if bad.get(pass_on.step) == "gradient":
            next(iter(model.chunks[0].parameters())).main_grad[0, 0] = math.inf
        return reports

    def read(pending):
        found = real_read(pending)
        if bad.get(pass_on.step) == "loss":
            object.__setattr__(found, "loss_selected", math.nan)
        return found

    loop.train_on_selected, PendingMetrics.read = pass_on, read
    try:
        train.run(settings)
    except FloatingPointError as error:
        return sums, str(error)
    return sums, None


@pytest.mark.parametrize("clip", [1.0, pytest.param(0.0, marks=pytest.mark.slow)], ids=["clipped", "unclipped"])
def test_bad_steps_are_skipped_and_counted(folder, tmp_path, clip):
    settings = settings_in(
        folder, tmp_path / "run", training__on_nonfinite="skip", training__steps=5, optimizer__clip_grad=clip
    )
    for sums, error in run_distributed(train_with_bad_steps, 2, settings, {1: "loss", 3: "gradient"}):
        assert error is None and all(map(math.isfinite, sums))
        assert sums[1] != sums[0] and sums[3] != sums[2], "good steps change the weights"
        assert sums[2] == sums[1] and sums[4] == sums[3], "bad ones leave them as they are"
    assert cli.scalars(tmp_path / "run" / "logs", "training/skipped_steps") == {2: 1.0, 4: 2.0}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_stops_the_run_on_all_processes(folder, tmp_path, kind):
    settings = settings_in(folder, tmp_path / "run", checkpoint__save_every=1, optimizer__clip_grad=0.0)
    for _, error in run_distributed(train_with_bad_steps, 2, settings, {2: kind}):
        assert error.startswith(f"the {kind}{' norm' * (kind == 'gradient')} of step 3 is ")
        assert "training.on_nonfinite=skip" in error
    (start,) = read_json(tmp_path / "run" / RUN_FILE)["starts"]
    assert start["ended"] == f"error: {error}" and start["to_step"] == 2
    steps = checkpoint_steps(str(tmp_path / "run"))
    assert list(steps) == [1, 2]
    assert read_run_state(steps[1]).diverged is None
    marked = read_run_state(steps[2]).diverged
    assert "the loss of step 3 is" in marked if kind == "loss" else marked is None, (
        "a gradient may be its batch's fault"
    )
    assert damage(steps[2]) == []


def test_nothing_but_bad_steps_ends_the_run(folder, tmp_path):
    settings = settings_in(folder, tmp_path / "run", training__on_nonfinite="skip", training__steps=40)
    ((sums, error),) = run_distributed(train_with_bad_steps, 1, settings, dict.fromkeys(range(100), "loss"))
    assert len(sums) == 21 and "and so were the 20 before" in error


def test_a_diverged_run_keeps_a_sound_checkpoint_and_none_goes_on_from_the_last(folder, tmp_path):
    """A learning rate of 100 ruins a model in one step; with keep=1 the last sound checkpoint must stay nevertheless."""
    directory = tmp_path / "run"
    sound = settings_in(folder, directory, checkpoint__save_every=1, checkpoint__keep=1, training__steps=2)
    ruined = settings_in(
        folder,
        directory,
        checkpoint__save_every=1,
        checkpoint__keep=1,
        training__steps=6,
        optimizer__learning_rate=100.0,
        optimizer__schedule="constant",
        optimizer__clip_grad=0.0,
    )
    assert run_distributed(train_with_bad_steps, 1, sound, {})[0][1] is None
    run_distributed(train_with_bad_steps, 1, ruined, {})
    steps = checkpoint_steps(str(directory))
    told = {step: read_run_state(path).diverged for step, path in steps.items()}
    assert len(told) == 2 and told[max(told)] is not None and told[min(told)] is None, told
    newest = steps[max(steps)]
    with pytest.raises(ValueError, match="is of a run that had diverged"):
        to_hf(str(directory), str(tmp_path / "hf"))
    assert open_checkpoint(str(newest)).folder == newest, "named itself, it is taken"
    assert to_hf(str(newest), str(tmp_path / "hf")).is_dir()
