"""History from the visit before: every loss of an epoch is found again in the next one, whatever the layout, and after a kill.

21 samples in batches of 4: every epoch border lies inside a batch.
"""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

from megatron_sstoken.data.column import TokenColumn
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.integrity import damage
from megatron_sstoken.training.records import read_records
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

NUM_SAMPLES, GLOBAL_BATCH, NUM_STEPS = 21, 4, 14
LAYOUTS = {
    "dp2": (2, {}),
    "pp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "cp2": (2, {"parallel__context": 2}),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visits")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(NUM_SAMPLES, seed=9, longest=40))
    return folder


def settings_in(folder, directory, **changes):
    values = {
        "history__source": "previous_visit",
        "training__steps": NUM_STEPS,
        "training__global_batch_size": GLOBAL_BATCH,
        "optimizer__learning_rate": 1e-2,
        "checkpoint__directory": str(directory),
        "checkpoint__save_every": 3,
        "checkpoint__keep": 0,
        "logging__records_every": 1,
    }
    return make_settings(str(folder / "model"), str(folder / "data"), **(values | changes))


def train(rank, many, killed_at=None, skipped=()):
    """Train with several settings, one after another; per run and step how often the model was passed through, losses were
    gathered, and all ranks met for them.

    `killed_at`: number of the step in which SIGKILL comes; `skipped`: steps that are treated as not finite.
    """
    from megatron_sstoken.history import previous_visit
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.passes import step
    from megatron_sstoken.training import loop
    from tests.helpers.workbench import make_trainer

    counts = {"passes": 0, "published": 0, "gathered": 0}

    def counted(module, name, key):
        original = getattr(module, name)

        def call(*args, **options):
            counts[key] += 1
            return original(*args, **options)

        setattr(module, name, call)

    counted(step, "_run", "passes")
    counted(previous_visit.PreviousVisit, "_publish", "published")
    counted(previous_visit, "gather_losses", "gathered")
    original = loop.training_step

    def training_step(trainer, number):
        if number == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        observe, before = trainer.history.observe, dict(counts)
        if number in skipped:
            trainer.history.observe = lambda reports: None
        result = original(trainer, number)
        trainer.history.observe = observe
        found[-1].append({key: counts[key] - before[key] for key in counts})
        return result

    loop.training_step, found = training_step, []
    for settings in many:
        found.append([])
        loop.train(make_trainer(settings))
        reset_layout()
    return found


def records_of(directory) -> list[dict[str, np.ndarray]]:
    return [read_records(path) for path in sorted((directory / "logs" / "records").glob("*.parquet"))]


def visits_of(records) -> list[tuple[int, int, dict[str, np.ndarray]]]:
    """(step, sample, its response) of every visit, in order; two visits in one batch come one after the other."""
    found = []
    for number, batch in enumerate(records):
        for sample in dict.fromkeys(batch["sample"].tolist()):
            here = batch["sample"] == sample
            times = int((batch["position"][here] == 0).sum())
            for visit in range(times):  # rows are sorted by position, and stable
                one = {name: values[here][visit::times] for name, values in batch.items()}
                response = (one["role"] == 1) & (one["position"] > 0)
                found.append((number, sample, {name: values[response] for name, values in one.items()}))
    return found


def require_previous(records, *, first: str, skipped=()) -> int:
    """Every history loss is the loss recorded at the visit before; returns how many visits were compared.

    Where there is none in an earlier batch: frozen history, or selection of everything.
    """
    known: dict[int, list[tuple[int, np.ndarray]]] = {}
    compared = 0
    for number, sample, visit in visits_of(records):
        before = [losses for step, losses in known.get(sample, []) if step < number]
        if before:
            np.testing.assert_array_equal(visit["history_loss"], before[-1], f"step {number + 1}, sample {sample}")
            compared += 1
        elif first == "full":
            assert np.isnan(visit["history_loss"]).all() and np.isnan(visit["score"]).all() and visit["selected"].all()
        else:
            assert np.isfinite(visit["history_loss"]).all() and np.isfinite(visit["score"]).all()
        if number not in skipped:
            known.setdefault(sample, []).append((number, visit["loss"]))
    return compared


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name != "dp2" else name for name in ("dp2", "pp2", "cp2")]
)
def test_each_epoch_compares_with_the_one_before(bench, tmp_path, layout):
    num_ranks, parallel = LAYOUTS[layout]
    changes = {"training__epochs": 3, "training__steps": None, "data__packing": layout == "cp2", **parallel}
    full = {"history__first_visit": "full", "selection__scope": "microbatch"}
    many = {"full": settings_in(bench, tmp_path / "full", **full, **changes)}
    if layout == "dp2":
        store = {"history__store": str(tmp_path / "store")}
        many["frozen"] = settings_in(bench, tmp_path / "frozen", **store, **changes)
    counts = run_distributed(train, num_ranks, list(many.values()))
    for first in many:
        assert require_previous(records_of(tmp_path / first), first=first) >= 2 * NUM_SAMPLES - 2 * GLOBAL_BATCH
        for epoch in (1, 2, 3):
            assert damage(tmp_path / first / "history" / f"epoch_{epoch:04d}") == []
    for run in [run for rank in counts for run in rank]:
        assert all(step["passes"] == 1 and step["gathered"] <= 1 for step in run)
        assert sum(step["published"] for step in run) <= 4, "twice for every border between epochs"


def test_passes_through_the_model_a_step(bench, tmp_path):
    """Frozen history and that of the visit before take none besides training, adapters that are off take one."""
    common = {
        "training__steps": 3,
        "checkpoint__directory": None,
        "checkpoint__save_every": 0,
        "logging__records_every": 0,
    }
    many = [
        settings_in(bench, None, history__source="frozen", history__store=str(tmp_path / "store"), **common),
        settings_in(bench, None, history__source="adapters_off", lora__rank=2, **common),
        settings_in(bench, tmp_path / "visits", training__steps=7),
        settings_in(bench, tmp_path / "scope", selection__scope="batch", training__steps=7),
    ]
    (counts,) = run_distributed(train, 1, many)
    assert [[step["passes"] for step in run] for run in counts] == [[1] * 3, [2] * 3, [1] * 7, [2] * 7]
    for directory in ("visits", "scope"):
        assert require_previous(records_of(tmp_path / directory), first="frozen") > 0
    # and what is on disk: the losses of responses, of every sample
    store, column = SampleStore(bench / "data"), TokenColumn(tmp_path / "visits" / "history" / "epoch_0001")
    assert column.holds(store.offsets[:-1], store.offsets[1:]).all()
    for _, sample, visit in visits_of(records_of(tmp_path / "visits")[:5]):
        index = int(np.searchsorted(store.rows, sample))
        values = column.values(store.offsets[index], store.offsets[index + 1])
        assert values[visit["position"]].tolist() == visit["loss"].tolist()
        assert np.isnan(values).sum() == len(values) - len(visit["loss"])


@pytest.mark.parametrize("first", [pytest.param(one, marks=pytest.mark.slow) for one in ("full", "frozen")])
def test_a_killed_run_goes_on_bit_for_bit(bench, tmp_path, first):
    """Killed in epoch 3, with losses of epochs 2 and 3 that came after the checkpoint of step 9, in epoch 2."""
    whole, killed = (
        settings_in(
            bench, tmp_path / name, history__first_visit=first, checkpoint__save_every=9, checkpoint__asynchronous=False
        )
        for name in ("whole", "killed")
    )
    run_distributed(train, 2, [whole])
    with pytest.raises(AssertionError, match="exit code -9"):
        run_distributed(train, 2, [killed], 12)
    run_distributed(train, 2, [killed])
    expected, found = records_of(tmp_path / "whole"), records_of(tmp_path / "killed")
    assert len(expected) == len(found) == NUM_STEPS
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], f"{name} of step {number + 1}")
    for epoch in (1, 2, 3):
        paths = [tmp_path / name / "history" / f"epoch_{epoch:04d}" / "values.bin" for name in ("whole", "killed")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.slow
def test_another_layout_in_between_and_an_earlier_step(bench, tmp_path):
    """DP 2 to step 12, PP 2 from step 6 on to 12, then one process from there: what each reads is what was recorded."""
    run = tmp_path / "run"
    first = settings_in(bench, run, history__first_visit="full", training__steps=12)
    run_distributed(train, 2, [first])
    before = records_of(run)
    again = replace(first, parallel=replace(first.parallel, pipeline=2), checkpoint=replace(first.checkpoint, resume=6))
    run_distributed(train, 2, [again])
    last = settings_in(bench, run, history__first_visit="full", checkpoint__resume=6)
    run_distributed(train, 1, [last])
    records = records_of(run)
    assert len(records) == NUM_STEPS and require_previous(records, first="full") > 2 * NUM_SAMPLES - 2 * GLOBAL_BATCH
    for number in range(6):
        np.testing.assert_array_equal(records[number]["loss"], before[number]["loss"])
    assert [damage(folder) for folder in sorted((run / "history").iterdir())] == [[]] * 3
    # what was set aside saw other losses of the epoch, which are gone
    shutil.rmtree(run / "step_0000012")
    aside = next(run.glob("step_0000012*aside*"), None)
    assert aside is not None
    for newer in run.glob("step_00000??"):
        if newer.name > "step_0000012":
            shutil.rmtree(newer)
    aside.rename(run / "step_0000012")
    told = run_distributed(told_while_training, 2, settings_in(bench, run, history__first_visit="full"))
    assert told[0] == told[1] and "not as it was when the checkpoint was saved" in told[0][0]


def told_while_training(rank, settings):
    from megatron_sstoken.config import SettingsError

    try:
        train(rank, [settings])
    except SettingsError as error:
        return error.problems
    return []


def test_a_skipped_step_is_not_recorded(bench, tmp_path):
    """Its samples compare with the epoch before, or are trained in full again."""
    run = tmp_path / "run"
    run_distributed(train, 1, [settings_in(bench, run, history__first_visit="full")], None, (1, 7))
    records = records_of(run)
    require_previous(records, first="full", skipped=(1, 7))
