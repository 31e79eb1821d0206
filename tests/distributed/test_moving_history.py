"""Histories that move: what their weights are, on every layout; that the model's come back; that a resumed run finds them."""

import numpy as np
import pytest
import torch

from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference, run_cases
from tests.helpers.moving_history import begin_elsewhere, follow, train_to
from tests.helpers.workbench import LAYOUTS, load_model, make_model, make_samples, make_settings, make_store
from tests.reference.hf_reference import Objective, train_full

NUM_STEPS, GLOBAL_BATCH, DECAY, EVERY = 5, 8, 0.7, 2
ALL_LAYOUTS = LAYOUTS | {"cp2": (2, {"parallel.context": 2})}
SLOW = ("tp2", "tp2-sequence", "pp2")  # nothing that the other layouts do not show


def layouts(*left_out):
    return [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in ALL_LAYOUTS
        if name not in left_out
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    for seed, name in enumerate(("model", "model-history")):
        make_model(folder / name, seed=seed)
    make_store(folder / "data", make_samples(NUM_STEPS * GLOBAL_BATCH, seed=5))
    return folder


def settings_of(folder, source="ema", **changes):
    moving = {"history__source": source, "history__decay": DECAY, "history__every": EVERY}
    return make_settings(
        f"{folder}/model",
        f"{folder}/data",
        data__shuffle=False,
        training__global_batch_size=GLOBAL_BATCH,
        training__micro_batch_size=2,
        **(moving | changes),
    )


def averages(weights, moved=lambda number: True):
    """The moving averages of weights before each step and after the last, in float64, from a plain loop."""
    average = {name: value.double() for name, value in weights[0].items()}
    yield average
    for number, now in enumerate(weights[1:]):
        if moved(number):
            average = {name: DECAY * old + (1 - DECAY) * now[name].double() for name, old in average.items()}
        yield average


def furthest(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


@pytest.mark.parametrize("layout", layouts())
def test_the_copy_is_what_a_plain_loop_makes_of_the_weights(folder, layout):
    """And the pass under it leaves every parameter as it was, in fp32 and bf16 (`whole_copy`)."""
    num_ranks, parallel = ALL_LAYOUTS[layout]
    settings = [
        settings_of(folder, **parallel),
        settings_of(folder, "snapshot", **parallel),
        settings_of(folder, training__precision="bf16", model__backend="torch", training__steps=2, **parallel),
    ]
    ema, snapshot, half = run_distributed(follow, num_ranks, settings)[0]
    for _, passes, *_ in (ema, snapshot):
        assert passes == ["forward", "training"] * NUM_STEPS
    losses, _, weights, copies = ema
    for found, wanted in zip(copies, averages(weights), strict=True):
        assert furthest(found, wanted) < 1e-6
    assert furthest(copies[-1], weights[-1]) > 1e-4, "the weights have moved on"
    for number, found in enumerate(snapshot[3]):
        assert furthest(found, snapshot[2][number // EVERY * EVERY]) == 0
    for found, wanted in zip(half[3], averages(half[2]), strict=True):
        assert all(value.dtype == torch.bfloat16 for value in found.values())
        assert furthest(found, wanted) < 2e-2
    model, history = (load_model(folder / "model") for _ in range(2))
    samples = make_samples(NUM_STEPS * GLOBAL_BATCH, seed=5)
    batches = [samples[start : start + GLOBAL_BATCH] for start in range(0, len(samples), GLOBAL_BATCH)]
    wanted = train_full(
        model, batches, lr=1e-3, clip_grad=1.0, objective=Objective("sstoken", history), history_decay=DECAY
    )
    assert losses == pytest.approx([one["loss"] for one in wanted], abs=1e-4)


@pytest.mark.parametrize("layout", layouts())
def test_the_selected_set_and_gradients_are_those_of_the_same_history_in_a_store(folder, layout):
    num_ranks, parallel = ALL_LAYOUTS[layout]
    frozen = settings_of(folder, "frozen", history__hf_path=f"{folder}/model-history", training__steps=1)
    [(loss, columns, gradients)] = run_distributed(run_cases, 1, [frozen])[0]
    moving = settings_of(folder, training__steps=1, **parallel)
    [(found, told, others)] = run_distributed(run_cases, num_ranks, [moving], begin_elsewhere)[0]
    for name in ("sample", "position", "selected"):
        np.testing.assert_array_equal(told[name], columns[name])
    np.testing.assert_allclose(told["history_loss"], columns["history_loss"], atol=1e-5)
    assert np.nanmax(np.abs(told["history_loss"] - told["loss"])) > 1
    assert found == pytest.approx(loss, abs=1e-5)
    assert largest_difference(others, gradients) < 1e-4


def test_a_step_that_is_skipped_moves_no_average(folder):
    settings = [settings_of(folder, source, training__on_nonfinite="skip") for source in ("ema", "snapshot")]
    ema, snapshot = run_distributed(follow, 1, settings, (1, 2))[0]
    assert furthest(ema[2][1], ema[2][3]) == 0 and furthest(ema[2][3], ema[2][4]) > 0
    for found, wanted in zip(ema[3], averages(ema[2], lambda number: number not in (1, 2)), strict=True):
        assert furthest(found, wanted) < 1e-6
    for number, found in enumerate(snapshot[3]):
        assert furthest(found, snapshot[2][number // EVERY * EVERY]) == 0
