"""The planner's workload against what a run of the same settings does."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.batches import BatchLoader, PackOrder, SampleFilter
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.model.presets import find_architecture
from megatron_sstoken.planner.workload import Workload, problems_of_workload
from megatron_sstoken.supported import TOKEN_MULTIPLE
from megatron_sstoken.validate.layout import Findings, batch_shape_of

EIGHT = find_architecture("Llama-3.1-8B")


def loaded_tokens(w: Workload) -> int:
    """Tokens of a micro-batch as the loader makes it of samples that fill their rows."""
    shape = batch_shape_of(w.settings(), w.data, Findings([]))
    assert shape is not None
    length = w.sequence_length
    store: Any = SimpleNamespace(
        tokens=lambda index, stop: np.zeros(stop, dtype=np.int64),
        roles=lambda index, stop: np.ones(stop, dtype=np.uint8),
        rows=np.arange(w.global_batch_size),
    )
    lengths = np.full(w.global_batch_size, length, dtype=np.int32)
    order = PackOrder(SampleFilter(np.arange(w.global_batch_size), lengths, 0, 0, 0), seed=0, shuffle=False)
    loader = BatchLoader(cast(SampleStore, store), order, shape, data_rank=0, num_rows=w.global_batch_size)
    return loader.load(0)[0].tokens.numel()


@given(
    tensor=st.sampled_from([1, 2, 3, 4, 6, 8]),
    context=st.sampled_from([1, 2, 3, 4, 8]),
    data=st.integers(1, 3),
    micro=st.integers(1, 3),
    sequence=st.booleans(),
    length=st.integers(2, 2100),
    precision=st.sampled_from(["bf16", "fp32", "fp8"]),
    recipe=st.sampled_from(list(TOKEN_MULTIPLE)),
)
def test_a_micro_batch_is_as_long_as_the_loaders(tensor, context, data, micro, sequence, length, precision, recipe):
    w = Workload(
        EIGHT, world_size=tensor * context * data, tensor=tensor, context=context, sequence=sequence and tensor > 1,
        micro_batch_size=micro, global_batch_size=micro * data, sequence_length=length, precision=precision,
        fp8_recipe=recipe,
    )  # fmt: skip
    assert w.pack_tokens == loaded_tokens(w)
    assert w.tokens * w.context == w.pack_tokens and w.tokens % 2 == 0
    if precision == "fp8":
        assert w.split_tokens % TOKEN_MULTIPLE[recipe] == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "fp8", "lora_rank": 8}, "training.precision=fp8 has no adapters"),
        ({"lora_rank": -1}, "lora.rank=-1 is too small"),
        (
            {"precision": "fp8", "fp8_recipe": "blockwise", "world_size": 32, "tensor": 32},
            "training.fp8_recipe=blockwise needs multiples of 128",
        ),
        ({"lora_rank": 8, "world_size": 32, "tensor": 32}, "adapters on q_proj, k_proj, v_proj need"),
    ],
)
def test_what_a_run_refuses_is_not_planned(changes, says):
    problems = problems_of_workload(Workload(EIGHT, **changes))
    assert any(says in problem for problem in problems), problems
