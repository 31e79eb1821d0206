"""The planner's workload against what a run of the same settings does."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.config import LoraSettings
from megatron_sstoken.data.batches import BatchLoader, PackOrder, SampleFilter
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.model.families import Architecture, DeltaNet
from megatron_sstoken.model.lora_places import num_adapter_parameters
from megatron_sstoken.model.presets import MODELS, find_architecture
from megatron_sstoken.planner.memory import adapter_parameters, parameter_sizes
from megatron_sstoken.planner.workload import Workload, problems_of_workload
from megatron_sstoken.supported import TOKEN_MULTIPLE
from megatron_sstoken.validate.findings import Findings
from megatron_sstoken.validate.layout import batch_shape_of

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
    loader = BatchLoader(cast(SampleStore, store), order, shape, data_rank=0, num_packs=w.global_batch_size)
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


LAYOUTS = [
    {"world_size": tensor * pipeline * 2, "tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual}
    for tensor in (1, 2, 4)
    for pipeline, virtual in ((1, 1), (2, 1), (2, 2), (4, 1))
]


def architectures() -> list[Architecture]:
    """Presets, with and without tied embeddings and biases, one with norms of queries and keys, one with all biases, one with
    delta nets."""
    biased = replace(EIGHT, qkv_bias=True, output_bias=True, mlp_bias=True)
    normed = replace(EIGHT, family="qwen3", qk_norm=True, tied_embeddings=True)
    mixed = replace(
        EIGHT,
        family="qwen3_5_text",
        qk_norm=True,
        output_gate=True,
        delta_net=DeltaNet(key_heads=16, value_heads=32, key_dim=128, value_dim=128, kernel=4),
        delta_layers=(True, True, True, False) * (EIGHT.num_layers // 4),
    )
    return [*map(find_architecture, MODELS), normed, biased, mixed]


def num_delta_layers(a: Architecture) -> int:
    return a.num_layers - len(a.attention_layers)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parameters_of_all_ranks_are_the_models(layout):
    """Split tensors once over the tensor ranks, whole ones as often as they are held; padding and copies apart."""
    for a in architectures():
        w = Workload(a, **layout)
        if a.num_layers % (w.pipeline * w.virtual_pipeline):
            continue
        stages = [parameter_sizes(w, stage) for stage in range(w.pipeline)]
        split = sum(w.tensor * (sizes["linear"] + sizes["embedding"] + sizes["head"]) for sizes in stages)
        whole = sum(sizes["vector"] for sizes in stages)
        if a.qkv_bias:  # the vectors that are split
            biases = a.num_layers * (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim
            biases += a.num_layers * 2 * a.ffn_hidden_size if a.mlp_bias else 0
            split, whole = split + biases, whole - biases // w.tensor
        if a.delta_net is not None:
            by_head = a.delta_net.convolved * a.delta_net.kernel + 2 * a.delta_net.value_heads
            split += num_delta_layers(a) * by_head
            whole -= num_delta_layers(a) * by_head // w.tensor
        copies = 2 if not a.tied_embeddings or w.pipeline > 1 else 1
        padding = copies * (w.vocabulary * w.tensor - a.vocabulary_size) * a.hidden_size
        second = a.vocabulary_size * a.hidden_size if a.tied_embeddings and w.pipeline > 1 else 0
        assert split + whole - padding - second == a.num_parameters()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adapter_parameters_of_all_ranks_are_the_models(layout):
    for a in architectures():
        w = Workload(a, lora_rank=8, **layout)
        if a.num_layers % (w.pipeline * w.virtual_pipeline):
            continue
        # a side of each linear, which every tensor rank holds; a delta net has one more
        whole = (a.num_layers * 7 + num_delta_layers(a)) * w.lora_rank * a.hidden_size
        held = w.tensor * sum(adapter_parameters(w, stage) for stage in range(w.pipeline))
        assert held - (w.tensor - 1) * whole == num_adapter_parameters(a, LoraSettings(rank=w.lora_rank))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "fp8", "lora_rank": 8}, "training.precision=fp8 has no adapters"),
        ({"lora_rank": -1}, "lora.rank=-1 is too small"),
        (
            {"precision": "fp8", "fp8_recipe": "blockwise", "world_size": 32, "tensor": 32},
            "training.fp8_recipe=blockwise needs multiples of 128",
        ),
    ],
)
def test_what_a_run_refuses_is_not_estimated(changes, says):
    problems = problems_of_workload(Workload(EIGHT, **changes))
    assert any(says in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("changes", "made_of"),
    [
        ({}, "transformer_engine"),
        ({"lora_rank": 8}, "transformer_engine"),
        ({"precision": "fp32"}, "torch"),
        ({"backend": "torch"}, "torch"),
    ],
)
def test_layers_are_estimated_of_what_a_run_makes_them(changes, made_of):
    assert Workload(EIGHT, **changes).layers_of == made_of
