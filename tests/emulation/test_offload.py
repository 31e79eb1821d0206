"""Optimizer state in the host's memory: the same steps as with state on the device; checkpoints that either goes on from."""

import pytest

from tests.emulation.running import run_pretended
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    make_model(folder / "model", seed=1)
    make_store(folder / "data", make_samples(32, seed=5))
    return folder


def settings_of(folder, fraction, directory, steps=STEPS):
    return make_settings(
        f"{folder}/model",
        f"{folder}/data",
        model__backend="torch",
        selection__method="full",
        training__precision="bf16",
        training__steps=steps,
        optimizer__learning_rate=3e-3,
        optimizer__weight_decay=0.1,
        optimizer__offload_fraction=fraction,
        checkpoint__directory=str(directory),
    )


def train(rank, settings, saves=False):
    """The remaining steps of a run, losses and norms, and the share of the first moment that lies in the host's memory."""
    from megatron.core.optimizer import distrib_optimizer, optimizer_config

    from megatron_sstoken.model import backend
    from megatron_sstoken.training.loop import save, training_step
    from tests.emulation.pretended_device import is_on_gpu
    from tests.helpers.workbench import make_trainer

    backend.transformer_engine_problem = lambda: None  # type: ignore[assignment]  # megatron asks for its version, no more
    optimizer_config.is_te_min_version = lambda *version: True
    distrib_optimizer.HAVE_APEX_OR_TE = settings.optimizer.offload_fraction > 0  # it decides where `step` is looked for
    trainer = make_trainer(settings)
    steps = []
    for number in range(trainer.step, trainer.plan.num_steps):
        metrics, norm, _ = training_step(trainer, number)
        trainer.step = number + 1
        steps.append((metrics.loss_selected, norm))
    inner = trainer.optimizer.chained_optimizers[0].optimizer
    moments = [state["exp_avg"] for state in inner.state.values()]
    outside = sum(moment.numel() for moment in moments if not is_on_gpu(moment))
    if saves:
        save(trainer)
    return steps, outside / sum(moment.numel() for moment in moments)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_are_the_same_wherever_the_state_lies(folder, tmp_path, ranks):
    runs = [settings_of(folder, fraction, tmp_path / f"{fraction}") for fraction in (0.0, 0.5, 1.0)]
    (plain, none), (some_steps, some), (all_steps, everything) = (run_pretended(train, ranks, one)[0] for one in runs)
    assert none == 0 and 0.4 < some < 0.9 and everything == 1
    for steps in (some_steps, all_steps):
        for found, wanted in zip(steps, plain, strict=True):
            assert found == pytest.approx(wanted, rel=2e-3)


@pytest.mark.timeout(400)
@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0)])
def test_checkpoints_are_the_same_wherever_the_state_lies(folder, tmp_path, before, after):
    wanted, _ = run_pretended(train, 1, settings_of(folder, 0.0, tmp_path / "straight"))[0]
    run_pretended(train, 1, settings_of(folder, before, tmp_path / "changed", steps=2), True)
    found, outside = run_pretended(train, 1, settings_of(folder, after, tmp_path / "changed"))[0]
    assert len(found) == 2 and outside == after
    for one, other in zip(found, wanted[2:], strict=True):
        assert one == pytest.approx(other, rel=2e-3)
