"""Training of every layout against a plain PyTorch loop over a Hugging Face model.

Rows have different lengths, so that every micro-batch counts differently: any mean of means would show.
"""

import pytest

from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import (
    LAYOUTS,
    load_model,
    make_model,
    make_samples,
    make_settings,
    make_store,
    run_training,
)
from tests.reference.hf_reference import Objective, train_full

NUM_STEPS, GLOBAL_BATCH = 5, 8
OPTIMIZER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "clip_grad": 1.0}
CASES = {"llama-full": ("llama", "full"), "qwen2-full": ("qwen2", "full"), "llama-sstoken": ("llama", "sstoken")}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Models, data, and what the reference loop measures for each case."""
    folder = tmp_path_factory.mktemp("training")
    samples = make_samples(NUM_STEPS * GLOBAL_BATCH, seed=5)
    data = make_store(folder / "data", samples)
    history = make_model(folder / "history", "llama", seed=9)
    models = {family: make_model(folder / family, family, seed=1) for family in ("llama", "qwen2")}
    batches = [samples[start : start + GLOBAL_BATCH] for start in range(0, len(samples), GLOBAL_BATCH)]
    expected = {}
    for name, (family, method) in CASES.items():
        objective = Objective(method=method, history=load_model(history) if method == "sstoken" else None)
        expected[name] = train_full(load_model(models[family]), batches, objective=objective, **OPTIMIZER)
    return models, history, data, expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_follow_the_reference_loop(case, layout, tmp_path):
    models, history, data, expected = case
    num_ranks, parallel = LAYOUTS[layout]
    settings = [
        make_settings(
            models[family],
            data,
            history__hf_path=history,
            history__store=str(tmp_path / "history"),
            selection__method=method,
            data__shuffle=False,
            training__global_batch_size=GLOBAL_BATCH,
            training__micro_batch_size=2,
            optimizer__weight_decay=OPTIMIZER["weight_decay"],
            **parallel,
        )
        for family, method in CASES.values()
    ]
    results = run_distributed(run_training, num_ranks, settings)
    for rank, found in enumerate(results):
        for name, steps in zip(CASES, found, strict=True):
            assert len(steps) == NUM_STEPS
            for number, (step, wanted) in enumerate(zip(steps, expected[name], strict=True)):
                for key in ("loss", "grad_norm"):
                    assert step[key] == pytest.approx(wanted[key], abs=1e-4), (layout, rank, name, number, key)
                kept = step["num_selected"] / step["num_response"]
                assert kept == 1.0 if CASES[name][1] == "full" else 0.6 <= kept < 0.75
