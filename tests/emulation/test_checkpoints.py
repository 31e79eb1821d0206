"""The CUDA path, emulated: what is saved beside training is copied from the device, and a run goes on from it bit for bit."""

import pytest

from tests.emulation.running import run_pretended
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store, make_trainer


def save_and_go_on_twice(rank, settings):
    """Losses and norms of the last two of four steps: by whom saves in the middle, and by whom goes on from that."""
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.loop import save, training_step

    def steps(trainer, number):
        results = []
        for _ in range(number):
            metrics, norm, _ = training_step(trainer, trainer.step)
            trainer.step += 1
            results.append((metrics.loss_selected, norm))
        return results

    trainer = make_trainer(settings)
    steps(trainer, 2)
    save(trainer, wait=False)
    went_on = steps(trainer, 2)
    trainer.saver.finish()
    reset_layout()
    resumed = make_trainer(settings)
    assert resumed.step == 2
    return went_on, steps(resumed, 2)


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"parallel__tensor": 2}, marks=pytest.mark.slow)], ids=["dp2", "tp2"]
)
def test_a_run_goes_on_from_what_was_saved_beside_it(tmp_path, changes):
    settings = make_settings(
        make_model(tmp_path / "model"),
        make_store(tmp_path / "data", make_samples(16, seed=3)),
        training__steps=6,
        training__precision="bf16",
        selection__method="attention",
        checkpoint__directory=str(tmp_path / "run"),
        **changes,
    )
    for went_on, resumed in run_pretended(save_and_go_on_twice, 2, settings):
        assert went_on == resumed and len(resumed) == 2
