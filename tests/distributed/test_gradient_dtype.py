"""Gradients in bf16: the buffers are bf16, and the run learns as with gradients in fp32."""

import pytest

from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store

LAYOUTS = {
    "single": (1, {}),
    "tp2-sequence": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pp2 tied": (2, {"parallel__pipeline": 2}),
    "dp2": (2, {}),
}
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradient-dtype")
    make_model(folder / "model", seed=1)
    make_model(folder / "tied", seed=1, tie_word_embeddings=True)
    make_store(folder / "data", make_samples(32, seed=5))
    return folder


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name != "dp2" else name for name in LAYOUTS]
)
def test_losses_stay_near_those_of_fp32_gradients(folder, layout):
    num_ranks, parallel = LAYOUTS[layout]
    settings = [
        make_settings(
            f"{folder}/{'tied' if 'tied' in layout else 'model'}",
            f"{folder}/data",
            selection__method="full",  # the same tokens in both, whatever is rounded
            training__precision="bf16",
            training__steps=STEPS,
            training__global_batch_size=8,
            optimizer__learning_rate=3e-3,
            optimizer__gradient_dtype=dtype,
            **parallel,
        )
        for dtype in ("fp32", "bf16")
    ]
    exact, rounded = run_distributed(train, num_ranks, settings, timeout=180)[0]
    assert exact["dtypes"] == {"torch.float32"} and rounded["dtypes"] == {"torch.bfloat16"}
    print(layout, [f"{a:.4f}/{b:.4f}" for a, b in zip(exact["losses"], rounded["losses"], strict=True)])
    assert rounded["norms"][0] == pytest.approx(exact["norms"][0], rel=0.01) and rounded["norms"] != exact["norms"]
    assert exact["losses"][-1] < exact["losses"][0] - 0.3, "a run that learns nothing compares nothing"
    for found, wanted in zip(rounded["losses"], exact["losses"], strict=True):
        assert found == pytest.approx(wanted, abs=0.01)


def train(rank, settings):
    """Losses and norms of each step, and the types of the buffers of gradients."""
    from megatron_sstoken.parallel import reset_layout
    from megatron_sstoken.training.loop import training_step
    from tests.helpers.workbench import make_trainer

    results = []
    for one in settings:
        trainer = make_trainer(one)
        steps = [training_step(trainer, number)[:2] for number in range(trainer.plan.num_steps)]
        gradients = [p.main_grad for chunk in trainer.model.unwrapped for p in chunk.parameters()]
        results.append(
            {
                "losses": [metrics.loss_selected for metrics, _ in steps],
                "norms": [norm for _, norm in steps],
                "dtypes": {str(gradient.dtype) for gradient in gradients},
            }
        )
        reset_layout()
    return results
