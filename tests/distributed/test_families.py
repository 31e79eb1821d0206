"""Every family against transformers, forward and backward, and on layouts that split what is particular to it.

Windows reach over context parallel chunks, q/k norms are shared by tensor ranks, experts are dealt out over ranks that
also split tensors, samples or the batch.
"""

from itertools import chain

import numpy as np
import pytest

from megatron_sstoken.model.families import family_of
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference, run_cases
from tests.helpers.workbench import (
    EVERYWHERE,
    MIXTURES,
    PARTICULAR,
    load_model,
    make_model,
    make_samples,
    make_settings,
    make_store,
    names_on_disk,
    run_training,
)
from tests.helpers.workbench import FAMILIES as ALL_FAMILIES
from tests.reference.hf_reference import RESPONSE, Objective, attention_mass, loss_and_gradients

FAMILIES = tuple(name for name in ALL_FAMILIES if name not in ("llama", "qwen2"))  # test_invariance has these two
LAYOUTS = {
    "tp2-sequence": (2, {"parallel__tensor": 2, "parallel__sequence": True}, {}),
    "cp2": (2, {"parallel__context": 2}, {"parallel__expert": 2}),
    "tp2-pp2": (
        4,
        {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence": True},
        {"parallel__expert": 2},
    ),
    "dp2": (2, {}, {"parallel__expert": 2}),
}
"""Name → processes, settings, and what is added for a mixture of experts."""
ROWS = 4
PACKED = {"data__packing": True, "training__global_batch_size": 2, "training__recompute": "selective"}
"""Two samples in each pack; in families with delta nets, whose states must not go from one to the next, and are computed again
in the backward pass."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Folder with models, data and histories, the samples, and the unsharded results of each family."""
    folder = tmp_path_factory.mktemp("families")
    samples = make_samples(ROWS, seed=3, shortest=20)
    make_store(folder / "data", samples)
    for number, family in enumerate(FAMILIES):
        make_model(folder / family, family, seed=10 + number)
        make_model(folder / f"{family}-history", family, seed=20 + number)
    results = run_distributed(run_cases, 1, [settings_of(folder, family) for family in FAMILIES], timeout=200)[0]
    return folder, samples, dict(zip(FAMILIES, results, strict=True))


def settings_of(folder, family, **changes):
    packed = PACKED if family_of(family).other_kind == "linear_attention" else {}
    common = {
        "history__hf_path": f"{folder}/{family}-history",
        "history__store": f"{folder}/{family}-losses",
        "training__global_batch_size": ROWS,
        "training__steps": 1,
        "data__shuffle": False,
        "selection__layer": [0, -1],  # with windows in the upper half, one of each kind
    }
    return make_settings(f"{folder}/{family}", f"{folder}/data", **(common | packed | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_transformers(bench, family):
    folder, samples, unsharded = bench
    model, history = load_model(folder / family), load_model(folder / f"{family}-history")
    objective = Objective("sstoken", history, layer=[0, -1])
    loss, gradients = loss_and_gradients(model, [[sample] for sample in samples], objective)
    assert unsharded[family][0] == pytest.approx(loss, abs=1e-5)
    masses = [attention_mass(model, sample.tokens, sample.roles, layer=[0, -1]) for sample in samples]
    roles = [role for sample in samples for role in sample.roles]
    wanted = [mass for mass, role in zip(chain(*masses), roles, strict=True) if role == RESPONSE]
    found = unsharded[family][1]["attention"]
    assert found[~np.isnan(found)] == pytest.approx(wanted, abs=1e-5)
    assert largest_difference(unsharded[family][2], names_on_disk(folder / family, gradients)) < 2e-4


@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_runs_equal_the_unsharded(bench, layout):
    further = {"tp2-pp2": PARTICULAR, "cp2": ("qwen3_5_text",)}.get(layout, ())
    check_sharded(bench, layout, [one for one in FAMILIES if one in EVERYWHERE + further])


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_runs_of_the_other_families(bench, layout):
    check_sharded(bench, layout, [one for one in FAMILIES if one not in EVERYWHERE])


def check_sharded(bench, layout, families):
    folder, _, unsharded = bench
    num_ranks, parallel, for_mixtures = LAYOUTS[layout]
    if layout == "dp2":  # tells nothing new of a dense model
        families = [family for family in families if family in MIXTURES]
    settings = [
        settings_of(folder, family, **parallel, **(for_mixtures if family in MIXTURES else {})) for family in families
    ]
    results = run_distributed(run_cases, num_ranks, settings, timeout=220)[0]
    for family, (loss, columns, gradients) in zip(families, results, strict=True):
        wanted_loss, wanted_columns, wanted_gradients = unsharded[family]
        assert (columns["selected"] == wanted_columns["selected"]).all(), family
        assert loss == pytest.approx(wanted_loss, abs=1e-5), family
        assert largest_difference(gradients, wanted_gradients) < 1e-4, family


RESUMED = {
    "qwen3_moe": {"parallel__expert": 2},
    "glm4_moe": {"parallel__expert": 2},
    "deepseek_v3": {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2},
    "gpt_oss": {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2},
    "qwen3_next": {"parallel__tensor": 2, "parallel__sequence": True, "parallel__expert": 2},
    "qwen3_5_text": {"parallel__tensor": 2, "parallel__sequence": True},
}


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("family", RESUMED)
def test_a_run_resumes_on_another_layout(bench, tmp_path, family):
    """Two steps with experts or heads on two ranks, two more on one: the losses and norms of four steps on one."""
    folder = bench[0]

    (expected,) = run_distributed(run_training, 1, [four_steps(folder, family)])[0]
    directory = str(tmp_path / "run")
    apart = four_steps(folder, family, checkpoint__directory=directory, **RESUMED[family])
    found = run_distributed(train_and_save, 2, apart)[-1]
    found += run_distributed(resume, 1, four_steps(folder, family, checkpoint__directory=directory))[0]
    for one, wanted in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def four_steps(folder, family, **changes):
    settings = settings_of(folder, family, optimizer__learning_rate=3e-3, **changes)
    settings.training.steps = 4
    return settings


def train_and_save(rank, settings):
    from megatron_sstoken.training.loop import save
    from tests.helpers.workbench import make_trainer

    trainer = make_trainer(settings)
    results = train(trainer, range(2))
    save(trainer)
    return results


def resume(rank, settings):
    from tests.helpers.workbench import make_trainer

    trainer = make_trainer(settings)
    assert trainer.step == 2
    return train(trainer, range(2, 4))


def train(trainer, numbers):
    from megatron_sstoken.training.loop import training_step

    results = []
    for number in numbers:
        metrics, norm, _ = training_step(trainer, number)
        results.append({"loss": metrics.loss_selected, "grad_norm": norm})
        trainer.step = number + 1
    return results
