"""Histories that move, on the CUDA path: weights are gathered beside the pass that reads them, state may lie in the host's
memory."""

from itertools import pairwise

import pytest
import torch

from tests.emulation.running import run_pretended
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.moving_history import copy_of, follow
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store, make_trainer, run_training

pytestmark = pytest.mark.timeout(400)

STEPS, DECAY = 3, 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moving")
    make_model(folder / "model")
    make_store(folder / "data", make_samples(8 * STEPS, seed=5))
    return folder


def settings_of(folder, **changes):
    moving = {"history__source": "ema", "history__decay": DECAY, "training__steps": STEPS}
    return make_settings(f"{folder}/model", f"{folder}/data", **(moving | changes))


def both(rank, settings):
    """The steps of runs that nobody looks at, and one whose weights are looked at before each step, and so gathered."""
    return run_training(rank, settings), follow(rank, settings[:1])


@pytest.mark.slow
def test_each_pass_waits_for_its_own_weights(folder):
    settings = [settings_of(folder), settings_of(folder, selection__scope="batch")]
    wanted, [(*_, other_copies)] = run_distributed(both, 1, settings)[0]
    found, [(*_, copies)] = run_pretended(both, 2, settings)[0]
    for steps, others in zip(found, wanted, strict=True):
        for step, other in zip(steps, others, strict=True):
            assert step["num_selected"] == other["num_selected"]
            assert step["loss"] == pytest.approx(other["loss"], abs=1e-5)
    for copy, other in zip(copies, other_copies, strict=True):
        assert max(distance(copy[name], other[name]) for name in other) < 1e-5


def copies_of_a_run(rank, settings):
    """The copy before the first and after each step, where a part of the optimizer's state lies in the host's memory."""
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    from megatron_sstoken.model import backend
    from megatron_sstoken.training.loop import training_step

    backend.transformer_engine_problem = lambda: None  # megatron asks for its version, no more
    optimizer_config.is_te_min_version = lambda *version: True
    distrib_optimizer.HAVE_APEX_OR_TE = settings.optimizer.offload_fraction > 0
    trainer = make_trainer(settings)
    copies = [copy_of(trainer)]
    for number in range(STEPS):
        training_step(trainer, number)
        copies.append(copy_of(trainer))
    return copies


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ema", "snapshot"])
def test_the_copy_is_the_same_wherever_the_optimizers_state_lies(folder, source):
    half = {"training__precision": "bf16", "model__backend": "torch"}
    if source == "snapshot":
        half |= {"history__source": source, "history__decay": 0.999, "history__every": 2}
    plain, some, everything = (
        run_pretended(copies_of_a_run, 1, settings_of(folder, **half, optimizer__offload_fraction=fraction))[0]
        for fraction in (0.0, 0.5, 1.0)
    )
    moved = [max(map(distance, *both)) for both in pairwise(plain)]
    assert (moved[0] > 0) == (source == "ema") and max(moved) > 1e-4
    for copies in (some, everything):
        for found, wanted in zip(copies, plain, strict=True):
            assert max(map(distance, found, wanted)) < 0.1 * max(moved)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
