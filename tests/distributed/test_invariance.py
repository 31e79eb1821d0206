"""The selected set, the loss and every gradient do not depend on how the work is split.

Why the comparison is exact up to rounding: the loss of a global batch is Σ weight·loss ÷ Σ count over all micro-batches
and ranks, and every rank adds its part to both sums. Only the scope `microbatch` sees the split: its tokens compete
within one micro-step, that is among micro-batch × data-parallel rows, so that a run on D data-parallel ranks equals the
unsharded run whose micro-batch is D times as large. `pytest -s` prints the table.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_sstoken.data.batches import PackOrder, filter_samples
from megatron_sstoken.data.store import SampleStore
from tests.helpers.gradients import largest_difference, results_of
from tests.helpers.workbench import (
    LAYOUTS,
    load_model,
    make_model,
    make_samples,
    make_settings,
    make_store,
)
from tests.reference.hf_reference import Objective, loss_and_gradients

pytestmark = pytest.mark.timeout(400)

ALL_LAYOUTS = LAYOUTS | {
    "cp2": (2, {"parallel.context": 2}),
    "tp2-cp2": (4, {"parallel.tensor": 2, "parallel.context": 2, "parallel.sequence": True}),
    "pp2-cp2": (4, {"parallel.pipeline": 2, "parallel.context": 2}),
    "dp2-cp2": (4, {"parallel.context": 2}),
    "tp2-pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
}
SHARDED = [name for name in ALL_LAYOUTS if name != "single"]
SLOW = ("tp2", "tp2-cp2", "pp2-cp2", "tp2-pp2", "dp2-cp2")  # nothing that the other layouts do not show
SCOPES = ("sample", "microbatch", "batch")
LAYER = [1, -1]  # with two stages the first lies on the earlier one
GLOBAL_BATCH = 8
NEAR = 2e-5
"""Scores this close to the threshold may fall on either side of it."""

# (family, packed, scope, loss average [÷ divisor, with the data's own weights [× soft weight]], rows of a micro-batch)
CASES = [
    ("llama", packed, scope, "token", rows) for packed, scope, rows in itertools.product((False, True), SCOPES, (1, 2))
]
CASES += [
    ("qwen2", True, "batch", "sample", 1),
    ("qwen2", False, "sample", "microbatch", 2),
    ("llama", True, "sample", "sample", 2),
    ("llama", True, "sample", "token ÷ selected", 1),
    ("llama", True, "batch", "token ÷ weight × power 0.3", 1),
    ("qwen2", False, "sample", "token ÷ response × deft", 2),
    ("llama", True, "sample", "sample ÷ weight × entropy 1.7", 2),
]
# A scope may go with a method, and a method with a threshold.
CASES += [
    ("llama", True, "batch of entropy", "token", 1),
    ("qwen2", False, "sample of probability ≥ 0.01", "token", 2),
]
WEIGHTS = (0.3, 1.0, 1.7)


def selection_of(case):
    """(scope, method, threshold)."""
    scope, _, method = case[2].partition(" of ")
    method, _, threshold = method.partition(" ≥ ")
    return scope, method or "sstoken", float(threshold) if threshold else None


def parts_of(loss):
    """(average, divisor, soft weight, its exponent); empty or None where the case has none."""
    average, _, rest = loss.partition(" ÷ ")
    divisor, _, weight = rest.partition(" × ")
    weight, _, alpha = weight.partition(" ")
    return average, divisor, weight, float(alpha) if alpha else None


def settings_of(folder, case, parallel, micro_batch_size):
    family, packed, _, loss, _ = case
    scope, method, threshold = selection_of(case)
    average, divisor, weight, alpha = parts_of(loss)
    return make_settings(
        f"{folder}/{family}",
        f"{folder}/weighted" if divisor else f"{folder}/data",
        weights__method=weight or None,
        weights__alpha=alpha,
        weights__divisor=divisor or "selected",
        history__hf_path=f"{folder}/{family}-history",
        history__store=f"{folder}/{family}-history-losses{'-weighted' * bool(divisor)}",
        data__packing=packed,
        data__shuffle=packed,
        selection__method=method,
        selection__scope=scope,
        selection__rule=threshold and "threshold",
        selection__threshold=threshold,
        selection__loss_average=average,
        selection__layer=LAYER,
        training__global_batch_size=GLOBAL_BATCH,
        training__micro_batch_size=micro_batch_size,
        training__steps=1,
        **parallel,
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Folder with models, data and history losses, and the unsharded runs: (case, rows a micro-step) → results."""
    folder = tmp_path_factory.mktemp("invariance")
    samples = make_samples(30, seed=11)
    make_store(folder / "data", samples)
    generator = np.random.default_rng(3)
    weighted = [
        replace(one, weights=(np.array(one.roles) * generator.choice(WEIGHTS, len(one.roles))).tolist())
        for one in samples
    ]
    make_store(folder / "weighted", weighted)
    for number, family in enumerate(("llama", "qwen2")):
        make_model(folder / family, family, seed=2 * number + 1)
        make_model(folder / f"{family}-history", family, seed=2 * number + 2)
    keys = sorted({(case, rows) for case in CASES for rows in (case[-1], 2 * case[-1])})
    settings = [settings_of(folder, case, {}, rows) for case, rows in keys]
    results = results_of(settings, 1)
    return folder, {"data": samples, "weighted": weighted}, dict(zip(keys, results, strict=True))


def test_unsharded_run_equals_the_reference(bench):
    folder, data, unsharded = bench
    models = {name: load_model(folder / name) for name in ("llama", "qwen2", "llama-history", "qwen2-history")}
    for (case, rows_at_once), result in unsharded.items():
        family, packed, _, loss, _ = case
        average, divisor, weight, alpha = parts_of(loss)
        samples = data["weighted" if divisor else "data"]
        rows = global_batch(folder, packed)
        batch = [
            [samples[i] for row in rows[k : k + rows_at_once] for i in row]
            for k in range(0, GLOBAL_BATCH, rows_at_once)
        ]
        scope, method, threshold = selection_of(case)
        objective = Objective(
            method, models[f"{family}-history"], layer=LAYER, scope=scope, threshold=threshold, loss_average=average,
            divisor=divisor or "selected", weight=weight or "none", alpha=alpha or 1.0,
        )  # fmt: skip
        value, gradients = loss_and_gradients(models[family], batch, objective)
        if loss == "token":
            assert result[0] == pytest.approx(value, abs=1e-5), case
        assert largest_difference(result[2], gradients) < 2e-4, (case, rows_at_once)


def global_batch(folder, packed):
    """Sample numbers of the rows of the first global batch, as training draws them."""
    chosen = filter_samples(SampleStore(folder / "data"), 128, "truncate")
    packing = {"shuffle": True, "packing": "first_fit", "capacity": 128} if packed else {"shuffle": False}
    order = PackOrder(chosen, seed=1234, **packing)
    return [order.pack(number).tolist() for number in range(GLOBAL_BATCH)]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SHARDED]
)
def test_sharded_runs_equal_the_unsharded(bench, layout):
    folder, _, unsharded = bench
    num_ranks, parallel = ALL_LAYOUTS[layout]
    data_size = 2 if layout.startswith("dp2") else 1
    settings = [settings_of(folder, case, parallel, case[-1]) for case in CASES]
    results = results_of(settings, num_ranks)
    for case, (loss, columns, gradients) in zip(CASES, results, strict=True):
        # The average `microbatch` is over the micro-batches of single ranks, whatever their number.
        rows_at_once = case[-1] * (1 if case[3] == "microbatch" else data_size)
        wanted_loss, wanted_columns, wanted_gradients = unsharded[case, rows_at_once]
        near = tokens_near_threshold(wanted_columns, case, folder, rows_at_once)
        np.testing.assert_array_equal(columns["sample"], wanted_columns["sample"])
        np.testing.assert_array_equal(columns["position"], wanted_columns["position"])
        differing = (columns["selected"] != wanted_columns["selected"]) & ~near
        error = largest_difference(gradients, wanted_gradients)
        print(
            f"{layout:<13} {case[0]:<6} {'packed' if case[1] else 'padded'} scope {case[2]:<10} average {case[3]:<10} "
            f"micro-batch {case[4]}: {int(columns['selected'].sum())} selected, {int(differing.sum())} differ, "
            f"{int(near.sum())} near the threshold, loss ±{abs(loss - wanted_loss):.1e}, gradients ±{error:.1e}"
        )
        assert not differing.any(), case
        assert loss == pytest.approx(wanted_loss, abs=1e-5), case
        assert error < 1e-4, case
        both = columns["selected"] & wanted_columns["selected"]
        np.testing.assert_allclose(columns["weight"][both], wanted_columns["weight"][both], rtol=1e-4)


def tokens_near_threshold(columns, case, folder, rows_at_once):
    """Tokens whose score is within `NEAR` of a threshold that is not their own score."""
    scope, _, fixed = selection_of(case)
    if fixed is not None:
        return np.abs(columns["score"] - fixed) < NEAR
    group = np.zeros(len(columns["sample"]), dtype=int)
    if scope == "sample":
        group = columns["sample"]
    elif scope == "microbatch":
        rows = global_batch(folder, case[1])
        step_of = {sample: number // rows_at_once for number, row in enumerate(rows) for sample in row}
        group = np.array([step_of[sample] for sample in columns["sample"].tolist()])
    near = np.zeros(len(group), dtype=bool)
    for value in np.unique(group):
        inside = (group == value) & ~np.isnan(columns["score"])
        scores, selected = columns["score"][inside], columns["selected"][inside]
        lowest, highest_dropped = scores[selected].min(), scores[~selected].max(initial=-math.inf)
        if lowest - highest_dropped < NEAR:
            near[inside] = np.abs(scores - lowest) < NEAR
    return near
