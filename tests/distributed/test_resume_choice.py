"""Which checkpoint a run goes on from: a chosen step, the one before a damaged one, a shorter run's last; no diverged one."""

import json
import shutil

import pytest

from megatron_sstoken.checkpoint.manifest import checkpoint_steps, read_run_state
from megatron_sstoken.integrity import CHECKSUMS
from megatron_sstoken.training.records import read_records
from tests.helpers import cli
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.flip import flip_bit
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

NUM_SAMPLES, BATCH = 10, 4


def train_all(rank, runs):
    """Run each settings to its end as `megatron_sstoken.train` does; what it raised, or None."""
    from megatron_sstoken import train
    from megatron_sstoken.config import SettingsError
    from megatron_sstoken.parallel import reset_layout

    told = []
    for settings in runs:
        try:
            train.run(settings)
            told.append(None)
        except SettingsError as error:
            told.append(str(error))
        reset_layout()
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 4 steps with a checkpoint of each, `run`."""
    folder = tmp_path_factory.mktemp("choice")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(NUM_SAMPLES, seed=3))
    assert run_distributed(train_all, 1, [settings_in(folder, folder / "run")]) == [[None]]
    return folder


def settings_in(folder, directory, **changes):
    values = {
        "training__global_batch_size": BATCH,
        "training__steps": 4,
        "checkpoint__directory": str(directory),
        "checkpoint__save_every": 1,
        "checkpoint__keep": 0,
        "logging__records_every": 1,
        "optimizer__schedule": "constant",
    }
    return make_settings(str(folder / "model"), str(folder / "data"), **(values | changes))


@pytest.fixture
def run(folder, tmp_path):
    return shutil.copytree(folder / "run", tmp_path / "run")


def losses(directory):
    return cli.scalars(directory / "logs", "loss/selected")


def samples_of(directory, step):
    records = read_records(directory / "logs" / "records" / f"step_{step:07d}.parquet")
    return records["sample"][records["position"] == 0].tolist()


def test_a_chosen_step_moves_newer_ones_aside_and_is_gone_on_from(folder, run):
    chosen = settings_in(folder, run, checkpoint__resume=2, optimizer__learning_rate=2e-3, training__steps=3)
    assert run_distributed(train_all, 1, [chosen]) == [[None]]
    assert sorted(path.name for path in run.glob("step_*")) == [
        "step_0000001", "step_0000002", "step_0000003", "step_0000003.aside", "step_0000004.aside",
    ]  # fmt: skip
    assert read_run_state(run / "step_0000003").branch == 2
    before = losses(folder / "run")
    after = losses(run)
    assert set(after) == {1, 2, 3}, "TensorBoard shows no points of the steps that were given up"
    assert after[3] == before[3], "the step after the chosen one begins from the same weights"
    # Started again by the same command, with a step more, it goes on from what it has saved itself.
    longer = settings_in(folder, run, checkpoint__resume=2, optimizer__learning_rate=2e-3)
    assert run_distributed(train_all, 1, [longer]) == [[None]]
    assert not (run / "step_0000003.aside-2").exists() and read_run_state(run / "step_0000004").branch == 2
    assert losses(run)[4] != before[4], "another learning rate made step 3"


def test_a_step_that_is_not_there_is_refused(folder, run):
    ((told,),) = run_distributed(train_all, 1, [settings_in(folder, run, checkpoint__resume=9)])
    assert told == (f"checkpoint.resume=9 is not in checkpoint.directory={run}, which has 1, 2, 3, 4: use one of these")


@pytest.mark.parametrize("name", ["__0_0.distcp", "sstoken.json"])
def test_a_damaged_newest_checkpoint_stops_the_run_or_is_passed_over(folder, run, name):
    flip_bit(run / "step_0000004" / name)
    five = {"training__steps": 5}
    stop = settings_in(folder, run, **five, training__verify="before")
    previous = settings_in(folder, run, **five, checkpoint__on_damaged="previous")
    ((stopped, passed_over),) = run_distributed(train_all, 1, [stop, previous])
    assert str(run / "step_0000004") in stopped and "checkpoint.on_damaged=previous" in stopped
    assert passed_over is None
    names = {path.name for path in run.iterdir()}
    assert {"step_0000004", "step_0000004.damaged", "step_0000005"} <= names
    assert {step: loss for step, loss in losses(run).items() if step < 5} == losses(folder / "run")


def test_damage_that_is_found_beside_the_run_ends_it_before_it_saves(folder, run):
    flip_bit(run / "step_0000004" / "__0_0.distcp")
    ((told,),) = run_distributed(train_all, 1, [settings_in(folder, run, training__steps=6)])
    assert told is None or "__0_0.distcp is damaged" in told or "damaged or not to be trusted" in told
    assert told is not None and max(checkpoint_steps(str(run))) == 4


def test_damaged_data_ends_the_run_on_all_processes(folder, tmp_path):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    flip_bit(data / "tokens.bin")
    settings = settings_in(folder, tmp_path / "run")
    settings.data.train = str(data)
    for told in run_distributed(train_all, 2, [settings]):
        assert f"data.train: {data / 'tokens.bin'} is damaged" in told[0] and "prepare the data again" in told[0]
    assert checkpoint_steps(str(tmp_path / "run")) == {}


def test_a_lost_description_does_not_start_anew_silently(folder, run):
    for step in (1, 2, 3):
        shutil.rmtree(run / f"step_000000{step}")
    (run / "step_0000004" / "sstoken.json").unlink()
    ((told,),) = run_distributed(train_all, 1, [settings_in(folder, run)])
    assert "step_0000004 has lost its sstoken.json" in told


@pytest.mark.slow
def test_more_epochs_after_a_last_batch_that_was_not_full_lose_no_pack(folder, tmp_path):
    """10 packs an epoch, batches of 4: the first run's third batch holds 2. The second run's begin 2 packs earlier."""
    directory = tmp_path / "run"
    once = {"training__steps": None, "checkpoint__save_every": 0}
    runs = [settings_in(folder, directory, **once, training__epochs=epochs) for epochs in (1, 2, 3)]
    assert run_distributed(train_all, 1, runs) == [[None, None, None]]
    sizes = [len(samples_of(directory, step)) for step in range(1, 10)]
    assert sizes == [4, 4, 2, 4, 4, 2, 4, 4, 2]
    for epoch in range(3):
        seen = [sample for step in range(1, 4) for sample in samples_of(directory, 3 * epoch + step)]
        assert sorted(seen) == list(range(NUM_SAMPLES)), epoch
    assert read_run_state(directory / "step_0000009").lag == 4


def test_a_diverged_checkpoint_is_not_gone_on_from_unless_it_is_named(folder, run):
    path = run / "step_0000004" / "sstoken.json"
    content = json.loads(path.read_text()) | {"diverged": "loss 1e5"}
    path.write_text(json.dumps(content))
    (run / "step_0000004" / CHECKSUMS).unlink()
    runs = [
        settings_in(folder, run, training__steps=5),
        settings_in(folder, run, training__steps=5, checkpoint__resume=4),
    ]
    ((refused, taken),) = run_distributed(train_all, 1, runs)
    assert "step_0000004 is of a run that had diverged (loss 1e5)" in refused and "checkpoint.resume=3" in refused
    assert taken is None


def resume_and_count(rank, settings):
    """How often a resuming process reads `.metadata` itself, besides megatron."""
    from megatron_sstoken.checkpoint import harmless
    from tests.helpers.workbench import make_trainer

    opened, careful = [], harmless._Careful
    harmless._Careful = lambda file: opened.append(file.name) or careful(file)
    return make_trainer(settings).step, len(opened)


def test_what_a_checkpoint_stores_is_read_once(folder, run):
    settings = settings_in(folder, run, training__steps=6)
    assert run_distributed(resume_and_count, 1, settings) == [(4, 1)]
