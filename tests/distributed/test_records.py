"""Token records of every layout against Hugging Face in eager attention, computed sample by sample."""

import math

import numpy as np
import pytest
import torch

from megatron_sstoken.training.records import read_records
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.workbench import LAYOUTS, load_model, make_model, make_samples, make_settings, make_store, run_score
from tests.reference.hf_reference import score_sample

FAMILIES = ("llama", "qwen2")
TOLERANCE = {"loss": 5e-4, "history_loss": 5e-4, "attention": 1e-4, "rel_norm": 1e-3, "score": 1e-3}
TOLERANCE |= {"entropy": 5e-4, "top1": 1e-4}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Per family: model, another model as history, data, and the reference's records."""
    folder = tmp_path_factory.mktemp("records")
    samples = make_samples(13, seed=3)
    rows = [2 * number + 1 for number in range(len(samples))]  # as if every other row had been skipped
    data = make_store(folder / "data", samples, rows)
    result = {}
    for family in FAMILIES:
        model = make_model(folder / family, family, seed=1)
        history = make_model(folder / f"{family}-history", family, seed=2)
        current, past = load_model(model), load_model(history)
        expected = [
            {"sample": row, **record, **more}
            for row, sample in zip(rows, samples, strict=True)
            for record, more in zip(
                score_sample(current, past, sample, rho="0.6"), uncertainty(current, sample.tokens), strict=True
            )
        ]
        result[family] = (model, history, data, expected)
    return result


@torch.no_grad()
def uncertainty(model, tokens: list[int]) -> list[dict]:
    """For every token: entropy and largest probability of the prediction it was compared with; None for the first."""
    logits = model(torch.tensor([tokens])).logits[0, :-1].double()
    found = torch.distributions.Categorical(logits=logits)
    rows = zip(found.entropy().tolist(), found.probs.amax(-1).tolist(), strict=True)
    return [{"entropy": None, "top1": None}] + [{"entropy": entropy, "top1": top1} for entropy, top1 in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_equal_the_reference(case, layout, tmp_path):
    num_ranks, parallel = LAYOUTS[layout]
    settings, outputs = [], []
    for family in FAMILIES:
        model, history, data, _ = case[family]
        settings.append(
            make_settings(
                model,
                data,
                history__hf_path=history,
                history__store=str(tmp_path / f"{family}-history"),
                logging__context_loss=True,
                logging__entropy=True,
                weights__method="power",
                weights__alpha=0.7,
                training__micro_batch_size=2,
                **parallel,
            )
        )
        outputs.append(str(tmp_path / f"{family}.parquet"))
    run_distributed(run_score, num_ranks, settings, outputs)
    for family, output in zip(FAMILIES, outputs, strict=True):
        compare(read_records(output), case[family][3])


def compare(found: dict[str, np.ndarray], expected: list[dict]) -> None:
    """Every token is there, in order; defined values agree, undefined ones are null, the selected set is the same."""
    keys = [(record["sample"], record["position"]) for record in expected]
    assert list(zip(found["sample"].tolist(), found["position"].tolist(), strict=True)) == keys
    assert found["token"].tolist() == [record["token"] for record in expected]
    assert found["role"].tolist() == [record["role"] for record in expected]
    in_response = np.array([record["role"] == 1 and record["position"] > 0 for record in expected])
    for name, tolerance in TOLERANCE.items():
        wanted = np.array([np.nan if record[name] is None else record[name] for record in expected], dtype=np.float64)
        if name == "attention":  # the records hold it where selection uses it
            wanted[~in_response] = np.nan
        np.testing.assert_allclose(found[name], wanted, atol=tolerance, rtol=0, err_msg=name)
    wanted = [math.exp(-0.7 * record["loss"]) if record["selected"] else math.nan for record in expected]
    np.testing.assert_allclose(found["weight"], wanted, atol=1e-4, rtol=0)
    wanted = [bool(record["selected"]) for record in expected]
    differing = [key for key, a, b in zip(keys, found["selected"].tolist(), wanted, strict=True) if a != b]
    assert not differing, f"selected differently: {differing}"
    assert 0 < sum(wanted) < in_response.sum()
