"""The best tokens of all data, in chunks, against a sort of all of them at once."""

import math
from decimal import ROUND_CEILING, Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.selection.dataset import Cut, NanScore, find_cut
from megatron_sstoken.selection.topk import simulate_topk, token_id
from tests.helpers.strategies import RHOS, scores


def chunked(values: torch.Tensor, ids: torch.Tensor, size: int):
    return lambda: zip(values.split(size), ids.split(size), strict=True)


def expected(values: list[float], ids: list[int], rho: str) -> set[int]:
    """The ceil(ρ·n) highest, ties to the lower id."""
    count = int((Decimal(rho) * len(values)).to_integral_value(ROUND_CEILING))
    order = sorted(range(len(values)), key=lambda n: (-values[n], ids[n]))
    return {ids[n] for n in order[:count]}


@settings(deadline=None, max_examples=150)
@given(st.lists(scores, max_size=60), st.sampled_from(RHOS), st.integers(1, 20), st.randoms())
def test_equals_a_sort(values, rho, size, random):
    ids = random.sample(range(10 * len(values) + 1), len(values))  # not in the order of the chunks
    tensors = torch.tensor(values, dtype=torch.float32), torch.tensor(ids, dtype=torch.int64)
    cut = find_cut(chunked(*tensors, size), rho)
    chosen = {int(id_) for s, i in chunked(*tensors, size)() for id_ in i[cut.selects(s, i)]}
    assert chosen == expected(values, ids, rho)
    assert (cut.num_candidates, cut.num_selected) == (len(values), len(chosen))
    kept = [value for value, id_ in zip(values, ids, strict=True) if id_ in chosen]
    assert cut.threshold == min(kept) if kept else math.isnan(cut.threshold)


def test_equals_the_selection_over_ranks_and_torch_topk():
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 900, (20_000,), generator=generator).float() / 7
    ids = torch.arange(20_000)
    for rho in ("0.013", "0.6"):
        cut = find_cut(chunked(values, ids, 777), rho)
        (whole,) = simulate_topk([(values, ids)], rho=rho)
        assert torch.equal(cut.selects(values, ids), whole.mask) and cut.threshold == whole.threshold
        assert values.topk(cut.num_selected).values.min() == cut.threshold


def test_reads_the_data_no_oftener_than_it_says():
    passes = []

    def chunks(values):
        def read():
            passes.append(1)
            return [(values, torch.arange(len(values)))]

        return read

    find_cut(chunks(torch.rand(100)), "0.5")
    assert len(passes) == 3
    passes.clear()
    find_cut(chunks(torch.zeros(100)), "0.5")
    assert len(passes) == 9


def test_nan_names_the_first_token():
    values = torch.tensor([1.0, math.nan, 2.0, math.nan])
    ids = token_id(torch.tensor([0, 7, 1, 3]), torch.tensor([1, 2, 3, 4]))
    with pytest.raises(NanScore) as error:
        find_cut(chunked(values, ids, 2), "0.5")
    assert (error.value.sample, error.value.position) == (3, 4)


def test_nothing_to_select():
    cut = find_cut(lambda: [], "0.5")
    assert (cut.num_candidates, cut.num_selected) == (0, 0) and math.isnan(cut.threshold)
    assert isinstance(cut, Cut) and not cut.selects(torch.ones(2), torch.arange(2)).any()
    with pytest.raises(ValueError, match="rho=0 is outside"):
        find_cut(lambda: [], 0)
