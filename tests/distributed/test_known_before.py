"""What is known of tokens before training, on every layout: the selection of another run, scores and weights of a file, and a
choice over all data by two frozen models; each against the reference."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_sstoken.data.batches import PackOrder, filter_samples
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.training.records import read_records
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.gradients import largest_difference, run_cases
from tests.helpers.workbench import load_model, make_model, make_samples, make_settings, make_store, run_score
from tests.reference.hf_reference import Objective, loss_and_gradients, method_records, select_global

LAYOUTS = {
    "single": (1, {}),
    "dp2": (2, {}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "cp2": (2, {"parallel.context": 2}),
}
CHANGES = {
    "selected": {},
    "score": {"selection__rule": "top"},
    "high scores": {"selection__rule": "threshold", "selection__threshold": 0.5},
    "weight": {"weights__method": "external"},
    "cleaning": {"selection__method": "cleaning", "selection__scope": "dataset", "selection__external": None},
}
ROWS = [2 * number for number in range(24)]
GLOBAL_BATCH = 8


def settings_of(folder, name, parallel):
    changes = {"selection__method": "external", "selection__external": str(folder / "records.parquet")} | CHANGES[name]
    if name == "cleaning":
        changes["history__reference_hf_path"] = str(folder / "reference")
    return make_settings(
        str(folder / "model"),
        str(folder / "data"),
        history__hf_path=str(folder / "history"),
        data__packing=True,
        training__global_batch_size=GLOBAL_BATCH,
        training__steps=1,
        **changes,
        **parallel,
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Models, data, and records of a run by ssToken, to which weights are added."""
    folder = tmp_path_factory.mktemp("known")
    samples = make_samples(len(ROWS), seed=7)
    make_store(folder / "data", samples, ROWS)
    for seed, name in enumerate(("model", "history", "reference")):
        make_model(folder / name, seed=seed)
    path = folder / "records.parquet"
    settings = make_settings(str(folder / "model"), str(folder / "data"), history__hf_path=str(folder / "history"))
    run_distributed(run_score, 1, [settings], [str(path)])
    table = pq.read_table(path)
    generator = np.random.default_rng(0)
    weights = generator.choice([0.0, 0.3, 1.7], table.num_rows).astype(np.float32)
    mask = generator.random(table.num_rows) < 0.2  # what is not told counts 1
    table = table.drop_columns("weight").append_column("weight", pa.array(weights, mask=mask))
    pq.write_table(table, path)
    records = read_records(path)
    return (
        folder,
        samples,
        {(s, p): n for n, (s, p) in enumerate(zip(records["sample"], records["position"], strict=True))},
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_known_is_what_is_trained(bench, layout):
    folder, samples, numbers = bench
    num_ranks, parallel = LAYOUTS[layout]
    results = run_distributed(run_cases, num_ranks, [settings_of(folder, name, parallel) for name in CHANGES])[0]
    records = read_records(folder / "records.parquet")
    in_batch = global_batch(folder)
    by_cleaning = chosen_by_cleaning(folder, samples)
    model = load_model(folder / "model")
    for name, (_, columns, gradients) in zip(CHANGES, results, strict=True):
        of_record = [numbers[key] for key in zip(columns["sample"], columns["position"], strict=True)]
        if name == "high scores":
            wanted = np.nan_to_num(records["score"], nan=-1) >= 0.5
        elif name == "cleaning":
            wanted = np.array([by_cleaning[s, p] for s, p in numbers])
        else:
            wanted = records["selected"]
        assert 0 < wanted.sum() < (records["role"] == 1).sum()
        np.testing.assert_array_equal(columns["selected"], wanted[of_record], err_msg=name)
        batch = [weighted(samples[index], ROWS[index], records, numbers, name) for index in in_batch]
        masks = [[bool(wanted[numbers[ROWS[i], p]]) for p in range(len(samples[i].tokens))] for i in in_batch]
        _, reference = loss_and_gradients(model, batch, Objective("chosen", chosen=masks))
        assert largest_difference(gradients, reference) < 2e-4, name


def weighted(sample, row, records, numbers, name):
    if name != "weight":
        return sample
    weights = [float(records["weight"][numbers[row, p]]) for p in range(len(sample.tokens))]
    return replace(sample, weights=[1.0 if np.isnan(one) else one for one in weights])


def global_batch(folder):
    """Sample numbers of the first global batch, as training draws them."""
    chosen = filter_samples(SampleStore(folder / "data"), 128, "truncate")
    order = PackOrder(chosen, seed=1234, shuffle=True, packing="first_fit", capacity=128)
    return [index for number in range(GLOBAL_BATCH) for index in order.pack(number).tolist()]


def chosen_by_cleaning(folder, samples):
    """(input row, position) → whether it is among the 60 % of all response tokens that the reference knows best."""
    history, reference = (load_model(folder / name) for name in ("history", "reference"))
    objective = Objective("cleaning", history, reference=reference)
    records = select_global([method_records(history, sample, objective) for sample in samples], "0.6")
    return {
        (row, record["position"]): record["selected"] is True
        for row, of_sample in zip(ROWS, records, strict=True)
        for record in of_sample
    }
