"""Histories that move: what their weights are, on every layout; that the model's come back; that a resumed run finds them."""

import shutil

import numpy as np
import pytest
import torch

from megatron_sstoken.checkpoint.size import checkpoint_bytes
from megatron_sstoken.conversion.inspection import describe_checkpoint, format_description
from megatron_sstoken.model.families import read_architecture
from tests.helpers import distributed_runner
from tests.helpers.gradients import largest_difference, run_cases
from tests.helpers.moving_history import begin_elsewhere, follow, train_to
from tests.helpers.workbench import LAYOUTS, load_model, make_model, make_samples, make_settings, make_store
from tests.reference.hf_reference import Objective, train_full

pytestmark = pytest.mark.timeout(400)

NUM_STEPS, GLOBAL_BATCH, DECAY, EVERY = 5, 8, 0.7, 2
SAMPLES = make_samples(NUM_STEPS * GLOBAL_BATCH, seed=5)
ALL_LAYOUTS = LAYOUTS | {"cp2": (2, {"parallel.context": 2})}


def run_distributed(function, num_ranks, *args):
    """With time for a machine that is busy."""
    return distributed_runner.run_distributed(function, num_ranks, *args, timeout=350)


def layouts(*fast):
    """All of them; those that tell most are run always."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in ALL_LAYOUTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    for seed, name in enumerate(("model", "model-history")):
        make_model(folder / name, seed=seed)
    make_store(folder / "data", SAMPLES)
    return folder


def settings_of(folder, source="ema", **changes):
    own = {"ema": {"history__decay": DECAY}, "snapshot": {"history__every": EVERY}}.get(source, {})
    return make_settings(
        f"{folder}/model",
        f"{folder}/data",
        data__shuffle=False,
        training__global_batch_size=GLOBAL_BATCH,
        training__micro_batch_size=2,
        history__source=source,
        **(own | changes),
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
    return float(torch.stack([(found[name] - wanted[name]).abs().max() for name in wanted]).max())


def check_copies(run, moved=lambda number: True):
    """The history weights of a run with `ema`, before each step and after the last."""
    _, passes, weights, copies = run
    assert passes == ["forward", "training"] * NUM_STEPS
    for found, wanted in zip(copies, averages(weights, moved), strict=True):
        assert furthest(found, wanted) < 1e-6
    assert furthest(copies[-1], weights[-1]) > 1e-4, "the weights have moved on"


def check_snapshots(run):
    _, passes, weights, copies = run
    assert passes == ["forward", "training"] * NUM_STEPS
    for number, found in enumerate(copies):
        assert furthest(found, weights[number // EVERY * EVERY]) == 0


@pytest.fixture(scope="module")
def reference(folder):
    """Losses of a plain loop with a moving average."""
    model, history = (load_model(folder / "model") for _ in range(2))
    batches = [SAMPLES[start : start + GLOBAL_BATCH] for start in range(0, len(SAMPLES), GLOBAL_BATCH)]
    objective = Objective("sstoken", history)
    steps = train_full(model, batches, lr=1e-3, clip_grad=1.0, objective=objective, history_decay=DECAY)
    return [one["loss"] for one in steps]


@pytest.mark.parametrize("layout", layouts("dp2"))
def test_every_layout_makes_the_same_copy_as_a_plain_loop(folder, reference, layout):
    """And the pass under it leaves every parameter as it was, in fp32 and bf16 (`whole_copy`)."""
    num_ranks, parallel = ALL_LAYOUTS[layout]
    in_bf16 = {"training__precision": "bf16", "model__backend": "torch", "training__steps": 2}
    settings = [settings_of(folder, **parallel), settings_of(folder, **in_bf16, **parallel)]
    run, half = run_distributed(follow, num_ranks, settings)[0]
    check_copies(run)
    assert run[0] == pytest.approx(reference, abs=1e-4)
    _, _, weights, copies = half
    for found, wanted in zip(copies, averages(weights), strict=True):
        assert all(value.dtype == torch.bfloat16 for value in found.values())
        assert furthest(found, wanted) < 2e-2


@pytest.fixture(scope="module")
def unsharded(folder):
    """One step with the same history from a store: loss, records, gradients."""
    settings = settings_of(folder, "frozen", history__hf_path=f"{folder}/model-history", training__steps=1)
    return run_distributed(run_cases, 1, [settings])[0][0]


@pytest.mark.parametrize("layout", layouts("pp2-vpp2"))
def test_the_selected_set_and_gradients_are_those_of_the_same_history_in_a_store(folder, unsharded, layout):
    num_ranks, parallel = ALL_LAYOUTS[layout]
    settings = settings_of(folder, training__steps=1, **parallel)
    [(loss, columns, gradients)] = run_distributed(run_cases, num_ranks, [settings], begin_elsewhere)[0]
    wanted_loss, wanted, wanted_gradients = unsharded
    for name in ("sample", "position", "selected"):
        np.testing.assert_array_equal(columns[name], wanted[name])
    np.testing.assert_allclose(columns["history_loss"], wanted["history_loss"], atol=1e-5)
    assert np.nanmax(np.abs(columns["history_loss"] - columns["loss"])) > 1
    assert loss == pytest.approx(wanted_loss, abs=1e-5)
    assert largest_difference(gradients, wanted_gradients) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ema", "snapshot"])
def test_with_adapters_they_alone_are_copied(folder, source):
    settings = settings_of(folder, source, lora__rank=3, lora__dropout=0.1, optimizer__learning_rate=1e-2)
    run = run_distributed(follow, 2, [settings])[0][0]
    assert all("lora" in name for name in run[2][0])
    (check_copies if source == "ema" else check_snapshots)(run)


@pytest.mark.slow
def test_experts_have_their_part_of_the_copy(tmp_path):
    """On two ranks, which deal out the experts; a resumed run on one rank finds them."""
    make_model(tmp_path / "model", "qwen3_moe")
    make_store(tmp_path / "data", SAMPLES)
    dealt = {"parallel__expert": 2}
    check_copies(run_distributed(follow, 2, [settings_of(tmp_path, **dealt)])[0][0])
    run_distributed(train_to, 2, 3, [run_of(tmp_path, "ema", tmp_path / "run", **dealt)])
    [(found, *_)] = run_distributed(train_to, 1, NUM_STEPS, [run_of(tmp_path, "ema", tmp_path / "run")])[0]
    [(wanted, *_)] = run_distributed(train_to, 1, NUM_STEPS, [settings_of(tmp_path)])[0]
    assert found == pytest.approx(wanted[3:], abs=1e-5)


def test_snapshots_and_steps_that_are_skipped(folder):
    """These move no average. A snapshot is that of its step, skipped or not."""
    skipped = (1, 2)
    settings = [settings_of(folder, source, training__on_nonfinite="skip") for source in ("ema", "snapshot")]
    ema, snapshot = run_distributed(follow, 1, settings, skipped)[0]
    assert furthest(ema[2][1], ema[2][3]) == 0 and furthest(ema[2][3], ema[2][4]) > 0
    check_copies(ema, lambda number: number not in skipped)
    check_snapshots(snapshot)


@pytest.fixture(scope="module")
def stopped(folder):
    """Runs on two data-parallel ranks: whole, and saved in the middle of their way, between two snapshots."""
    sources = ("ema", "snapshot", "frozen")
    whole = [settings_of(folder, source) for source in sources[:2]]
    stopped = [run_of(folder, source, folder / f"stopped-{source}") for source in sources]
    return run_distributed(both, 2, whole, stopped)


def both(rank, whole, stopped):
    return train_to(rank, NUM_STEPS, whole), train_to(rank, 3, stopped)


def run_of(folder, source, directory, **changes):
    return settings_of(folder, source, checkpoint__directory=str(directory), **changes)


def copied(folder, source, target):
    shutil.copytree(folder / f"stopped-{source}", target, ignore=shutil.ignore_patterns("logs", "*.lock"))
    return target


def test_the_same_layout_goes_on_bit_for_bit(folder, stopped, tmp_path):
    """With the copy of the checkpoint; one that has none, of a run with a frozen history, is told of."""
    sources = ("ema", "snapshot")
    settings = [run_of(folder, source, copied(folder, source, tmp_path / source)) for source in sources]
    settings.append(run_of(folder, "ema", copied(folder, "frozen", tmp_path / "frozen")))
    for rank, found in enumerate(run_distributed(train_to, 2, NUM_STEPS, settings)):
        whole, before = stopped[rank]
        for run, wanted, half in zip(found[:2], whole, before[:2], strict=True):
            assert run[0] == wanted[0][3:]
            for one, other in zip(run[1], (half[1][1], wanted[1][1]), strict=True):
                assert one and all(map(torch.equal, one, other))
        losses, copies, told = found[2]
        assert all(map(torch.equal, copies[0], before[0][1][0])), "it begins at the starting weights"
        if rank == 0:
            assert "note: the run goes on with other settings: history.source: frozen → ema" in told
            assert f"note: {tmp_path}/frozen/step_0000003 holds no weights of the history" in "\n".join(told)
            assert "history" not in "\n".join(found[0][2])


def test_a_checkpoint_tells_of_the_copy_and_is_as_large_as_the_plan_says(folder, stopped):
    settings = run_of(folder, "ema", folder / "stopped-ema")
    described = describe_checkpoint(str(folder / "stopped-ema"))
    found = sum(described[name] for name in ("weights_bytes", "optimizer_bytes", "history_bytes"))
    assert found == checkpoint_bytes(read_architecture(settings.model.hf_path), settings, with_copy=True)
    assert described["history_bytes"] == 4 * described["parameters"] == described["weights_bytes"]
    assert "history      " in format_description(described)
    assert describe_checkpoint(str(folder / "stopped-frozen"))["history_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "tp2-sequence", "pp2"])
def test_another_layout_goes_on_closely(folder, stopped, tmp_path, layout):
    num_ranks, parallel = LAYOUTS[layout]
    sources = ("ema", "snapshot")
    settings = [run_of(folder, source, copied(folder, source, tmp_path / source), **parallel) for source in sources]
    found = run_distributed(train_to, num_ranks, NUM_STEPS, settings)[0]
    for run, wanted in zip(found, stopped[0][0], strict=True):
        assert run[0] == pytest.approx(wanted[0][3:], abs=1e-5)
