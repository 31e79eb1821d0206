"""What moving histories ask of the settings, when the copy moves, and what they cost."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.changes import apply
from megatron_sstoken.config import HistorySettings, Settings
from megatron_sstoken.gpus import GPUS
from megatron_sstoken.history.moving import MovingAverage, Snapshot
from megatron_sstoken.history.source import HistorySource, source_of
from megatron_sstoken.model.presets import find_architecture
from megatron_sstoken.planner.communication import traffic_of
from megatron_sstoken.planner.hardware import Assumptions
from megatron_sstoken.planner.memory import stage_memory
from megatron_sstoken.planner.step_time import stage_seconds
from megatron_sstoken.planner.workload import Workload
from megatron_sstoken.score import history_that_moves
from megatron_sstoken.validate.describe import describe
from megatron_sstoken.validate.run import plan_run
from megatron_sstoken.validate.settings import problems_of

MOVING = {"snapshot": Snapshot, "ema": MovingAverage}


def settings_with(**changes):
    settings = Settings()
    settings.model.hf_path, settings.data.train = "model", "data"
    return apply(settings, **changes)


@pytest.mark.parametrize("name", MOVING)
def test_both_are_found_by_name_where_the_method_needs_history(name):
    assert source_of(settings_with(history__source=name)) is MOVING[name]
    assert source_of(settings_with(history__source=name, selection__method="random")) is HistorySource
    assert problems_of(settings_with(history__source=name)) == []


PROBLEMS = {
    "every step": (
        {"history__source": "snapshot", "history__every": 1},
        "history.every=1 is too small: use 2 or more",
    ),
    "nothing stays": (
        {"history__source": "ema", "history__decay": 0.0},
        "history.decay=0.0 is outside (0, 1): use 0.99 to 0.9999, or history.source=frozen for weights that stay",
    ),
    "everything stays": (
        {"history__source": "ema", "history__decay": 1.0},
        "history.decay=1.0 is outside (0, 1): use 0.99 to 0.9999, or history.source=frozen for weights that stay",
    ),
    "the other's setting": (
        {"history__source": "ema", "history__every": 50},
        "history.every=50 is not used by history.source=ema: leave it out, or use source=snapshot",
    ),
    "nobody's setting": (
        {"history__decay": 0.9},
        "history.decay=0.9 is not used by history.source=frozen: leave it out, or use source=ema",
    ),
    "delayed scales": (
        {"history__source": "snapshot", "training__precision": "fp8", "training__fp8_recipe": "delayed"},
        "training.fp8_recipe=delayed takes its scales from earlier passes, some of which history.source=snapshot makes with "
        "other weights: use fp8_recipe=tensorwise",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_they_cannot_work_with(name):
    changes, message = PROBLEMS[name]
    assert problems_of(settings_with(**changes)) == [message]


def test_weights_of_its_own_and_a_store_are_not_for_them():
    problems = problems_of(settings_with(history__source="ema", history__hf_path="old", history__store="losses"))
    assert [one.split("=")[0] for one in problems] == ["history.hf_path", "history.store"]


def test_scoring_has_no_history_that_moves():
    assert "use history.source=frozen" in (history_that_moves(settings_with(history__source="ema")) or "")
    assert history_that_moves(settings_with(history__source="ema", selection__method="full")) is None
    assert history_that_moves(settings_with()) is None


def copy_after(source, weights, updated):
    """The copy before each step and after the last; before step i the weights are `weights[i]`."""
    held = SimpleNamespace(weights=torch.tensor([weights[0]]))
    source._copy = [(held, torch.tensor([weights[0]]))]
    copies = [weights[0]]
    for done, (now, has_updated) in enumerate(zip(weights[1:], updated, strict=True), start=1):
        held.weights = torch.tensor([now])
        source.after_step(done, updated=has_updated)
        copies.append(float(source.weights_copy()[0][1]))
    return copies


def test_a_snapshot_is_of_every_so_many_steps():
    weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    found = copy_after(Snapshot(HistorySettings(every=3)), weights, [True] * 7)
    assert found == [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 7.0, 7.0]


def test_a_skipped_step_takes_its_turn_but_moves_no_average():
    weights = [1.0, 2.0, 2.0, 2.0, 3.0]
    updated = [True, False, False, True]
    assert copy_after(Snapshot(HistorySettings(every=2)), weights, updated) == [1.0, 1.0, 2.0, 2.0, 3.0]
    average = copy_after(MovingAverage(HistorySettings(decay=0.75)), weights, updated)
    assert average == [1.0, 1.25, 1.25, 1.25, 1.6875]


def test_a_run_plan_says_what_they_cost(settings):
    """4 bytes of each of the model's parameters, the padding of its vocabulary among them."""
    plan = plan_run(settings(history__source="ema", checkpoint__directory="runs/1"), 1)
    rows = dict(line.split(maxsplit=1) for line in describe(plan).splitlines())
    assert rows["selection"].endswith("history ema (decay 0.999)")
    trained = plan.architecture.num_parameters() + 2 * 32 * (128 - 99)
    assert rows["history"] == (
        f"one forward pass a step under a copy of the trained weights, {4 * trained / 1e3:.3g} KB over all ranks"
    )
    assert f"{20 * trained / 1e3:.3g} KB" in rows["checkpoints"]


@pytest.mark.parametrize("lora", [0, 64])
def test_the_planner_counts_copy_pass_and_gathers(lora):
    plain = Workload(find_architecture("Llama-3.1-8B"), world_size=8, tensor=2, global_batch_size=64, lora_rank=lora)
    moving = replace(plain, history="ema")
    gpu, assumptions = GPUS["h100"], Assumptions()
    before, after = (stage_memory(w, 0, assumptions) for w in (plain, moving))
    assert after.selection - before.selection == 4 * -(-before.trainable // 4)
    assert after.update == before.update == 0, "activations make room for the weights that the copy takes the place of"
    gathers = [
        next(one for one in traffic_of(w, 0, gpu) if (one.kind, one.operation) == ("data", "all_gather"))
        for w in (plain, moving)
    ]
    assert gathers[1].size == (3 if lora else 2) * gathers[0].size
    # A pass more, as that which a selection over the whole batch takes.
    batch = replace(plain, scope="batch", head="standard")
    seconds = [stage_seconds(w, 0, gpu, assumptions) for w in (replace(moving, head="standard"), batch)]
    assert seconds[0] == pytest.approx(seconds[1])


def test_a_configuration_tells_the_planner():
    settings = settings_with(history__source="snapshot")
    w = Workload.of_settings(settings, find_architecture("Llama-3.1-8B"), 8)
    assert w.copies_weights and w.history_passes == 1 and w.settings().history.source == "snapshot"
    settings.selection.method = "full"
    assert not Workload.of_settings(settings, find_architecture("Llama-3.1-8B"), 8).copies_weights
