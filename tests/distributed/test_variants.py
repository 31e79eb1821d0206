"""What invariance must also survive: activation recompute, a chosen ρ, warm-up, and steps with nothing to train on."""

import pytest

from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference, run_cases
from tests.helpers.workbench import make_model, make_samples, make_settings, make_store, run_training

BASE = {"selection__layer": [0, 2, -1], "training__global_batch_size": 8, "training__steps": 1, "data__packing": True}
VARIANTS = {
    "full recompute": {"training__recompute": "full"},
    "selective recompute": {"training__recompute": "selective"},
    "auto rho": {"selection__rho": "auto", "selection__scope": "sample"},
    "auto rho, batch": {"selection__rho": "auto", "selection__scope": "batch"},
    "random": {"selection__method": "random"},
    "rho1": {"selection__method": "rho1"},
}
LAYOUTS = {
    "pp2-vpp2": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"parallel__context": 2}),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    make_model(folder / "model", seed=1)
    make_model(folder / "history", seed=2)
    make_store(folder / "data", make_samples(24, seed=6))
    plain = settings_of(folder)
    results = run_distributed(
        run_cases, 1, [plain, *(settings_of(folder, **v) for v in VARIANTS.values())], timeout=200
    )
    return folder, results[0][0], dict(zip(VARIANTS, results[0][1:], strict=True))


def settings_of(folder, **changes):
    return make_settings(
        f"{folder}/model",
        f"{folder}/data",
        history__hf_path=f"{folder}/history",
        history__store=f"{folder}/losses",
        **(BASE | changes),
    )


@pytest.mark.parametrize("variant", ["full recompute", "selective recompute"])
def test_recompute_changes_nothing(bench, variant):
    _, plain, results = bench
    loss, columns, gradients = results[variant]
    assert loss == plain[0] and (columns["selected"] == plain[1]["selected"]).all()
    assert (columns["attention"][columns["selected"]] == plain[1]["attention"][plain[1]["selected"]]).all()
    assert largest_difference(gradients, plain[2]) < 1e-6


def test_auto_rho_stays_within_its_bounds_and_differs_from_the_default(bench):
    results = bench[2]
    for variant in ("auto rho", "auto rho, batch"):
        columns = results[variant][1]
        share = columns["selected"].sum() / (columns["score"] == columns["score"]).sum()
        assert 0.3 <= share <= 0.95 and abs(share - 0.6) > 0.02


@pytest.mark.timeout(200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_do_not_depend_on_the_layout(bench, layout):
    folder, _, expected = bench
    num_ranks, parallel = LAYOUTS[layout]
    settings = [settings_of(folder, **changes, **parallel) for changes in VARIANTS.values()]
    results = run_distributed(run_cases, num_ranks, settings, timeout=180)[0]
    for variant, (loss, columns, gradients) in zip(VARIANTS, results, strict=True):
        assert (columns["selected"] == expected[variant][1]["selected"]).all(), variant
        assert loss == pytest.approx(expected[variant][0], abs=1e-5), variant
        assert largest_difference(gradients, expected[variant][2]) < 1e-4, variant


def test_warm_up_ignores_the_excess_loss(bench, tmp_path):
    """With every sample in warm-up γ is 0: the history model cannot matter."""
    folder = bench[0]
    runs = [
        settings_of(folder, selection__warmup_samples=10**6, selection__gamma=gamma, training__steps=2)
        for gamma in (0.5, 0.0)
    ]
    runs.append(settings_of(folder, selection__gamma=0.5, training__steps=2))
    warming, attention_only, usual = run_distributed(run_training, 1, runs, timeout=100)[0]
    assert warming == attention_only != usual
