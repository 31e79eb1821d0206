"""The CUDA path, emulated: layouts and families give one process's losses, selections and gradient norms."""

from typing import Any

import pytest

from tests.emulation.connections import connect_on_first_use
from tests.emulation.running import become_pretended, run_pretended
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import MIXTURES, make_model, make_samples, make_settings, make_store, run_training

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2-sequence": {"parallel.tensor": 2, "parallel.sequence": True},
    "pp2": {"parallel.pipeline": 2},
    "pp2-vpp2": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2},
    "cp2": {"parallel.context": 2},
    "pp2-recompute": {"parallel.pipeline": 2, "training.recompute": "full"},
}
FAMILIES = ("llama", "qwen2", "mixtral")  # plain; tied embeddings and biases; experts


@pytest.fixture(
    scope="module",
    params=[name if name == "llama" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def settings_of(request, tmp_path_factory):
    """Changed settings → settings of two steps of a miniature of one family, masses from the first and the last layer."""
    folder = tmp_path_factory.mktemp(request.param)
    model, history = (make_model(folder / str(seed), request.param, seed=seed) for seed in range(2))
    data = make_store(folder / "data", make_samples(24, longest=60))

    def make(**changes: Any):
        base = {
            "data.packing": True,
            "data.sequence_length": 64,
            "training.micro_batch_size": 2,
            "training.steps": 3,
            "history.hf_path": history,
            "selection.layer": [0, -1],
        }
        return make_settings(model, data, **{k.replace(".", "__"): v for k, v in (base | changes).items()})

    make.family = request.param
    return make


def test_every_layout_trains_as_one_process_does(settings_of):
    ((expected,),) = run_distributed(run_training, 1, [settings_of()])
    layouts = {
        name: settings
        for name, settings in LAYOUTS.items()
        if not (settings_of.family in MIXTURES and "tensor" in str(settings) and "sequence" not in str(settings))
    }
    ranks = run_pretended(run_training, 2, [settings_of(**changes) for changes in layouts.values()])
    for rank, results in enumerate(ranks):
        for name, steps in zip(layouts, results, strict=True):
            for step, reference in zip(steps, expected, strict=True):
                assert step["num_selected"] == reference["num_selected"], (name, rank)
                assert step["loss"] == pytest.approx(reference["loss"], rel=2e-5), (name, rank)
                assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2e-4), (name, rank)


def _strict() -> None:
    become_pretended()
    connect_on_first_use()


@pytest.mark.parametrize("virtual", [1, 2])
def test_first_messages_never_wait_for_a_process_that_waits(settings_of, virtual):
    """Masses of the first stage's layer among them: they must not need a connection that the last stage makes later."""
    if settings_of.family != "llama":
        pytest.skip("one family is enough")
    settings = settings_of(**{"parallel.pipeline": 2, "parallel.virtual_pipeline": virtual, "training.steps": 1})
    for (steps,) in run_distributed(run_training, 2, [settings], timeout=180, before=_strict):
        assert steps[0]["num_selected"] > 0


def weights_after_a_step(rank, settings):
    """On each rank: all weights after one step and `gather_weights`, and whether they were all there before it."""
    import torch

    from megatron_sstoken.training.loop import training_step
    from tests.helpers.workbench import make_trainer

    trainer = make_trainer(settings)
    training_step(trainer, 0)
    before = [weight.detach().clone() for weight in trainer.model.unwrapped[0].parameters()]
    trainer.model.gather_weights()
    after = [weight.detach().clone() for weight in trainer.model.unwrapped[0].parameters()]
    return [weight.tolist() for weight in after], all(map(torch.equal, before, after))


def test_weights_are_whole_before_they_are_saved(settings_of):
    """Each data-parallel rank updates a part; the others' parts come with the next forward pass, or when they are asked for."""
    if settings_of.family != "llama":
        pytest.skip("one family is enough")
    first, second = run_pretended(weights_after_a_step, 2, settings_of())
    assert first[0] == second[0]
    assert not first[1] and not second[1], "the emulation gathers late"
