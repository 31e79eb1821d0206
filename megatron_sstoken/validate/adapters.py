"""Whether adapters can sit where `lora.targets` wants them."""

from dataclasses import replace
from typing import get_args

from megatron_sstoken.config import Settings
from megatron_sstoken.config.model import LINEARS, DeltaLinear
from megatron_sstoken.model.backend import preferred_backend
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.lora_places import adapter_places, linears_of, smaller_sides
from megatron_sstoken.model.lora_targets import EMBEDDING, FUSED, OF_MLP
from megatron_sstoken.validate.findings import Findings, divisors


def with_own_targets(settings: Settings, a: Architecture) -> Settings:
    """The settings with the linears of `a` as `lora.targets` where adapters are trained on what `all-linear` stands for."""
    if not settings.lora.rank or set(settings.lora.targets) != set(LINEARS):
        return settings
    return replace(settings, lora=replace(settings.lora, targets=linears_of(a)))


def check_adapters(settings: Settings, a: Architecture, found: Findings) -> None:
    """Whether adapters can sit where `lora.targets` wants them."""
    lora, tensor = settings.lora, settings.parallel.tensor
    if lora.rank == 0:
        return
    keys = [name for name in lora.targets if name in ("k_proj", "v_proj")]
    width = a.num_query_groups * a.head_dim
    has = linears_of(a)
    lacking = [name for name in lora.targets if name not in has and name != EMBEDDING]
    if lacking:
        found.problems.append(
            f"lora.targets={lora.targets} names {', '.join(lacking)}, which model.model_type={a.family} does not have: use "
            f"some of {', '.join(has)}"
        )
        return
    found.require(
        not keys or width % tensor == 0,
        f"parallel.tensor={tensor} does not divide model.num_key_value_heads × head_dim={width}, the rows of adapters on "
        f"{' and '.join(keys)}: use {divisors(width)}, or leave them out of lora.targets",
    )
    if a.delta_net is not None and not {*lora.targets} & {*get_args(DeltaLinear)}:
        found.notes.append(
            f"lora.targets={lora.targets} leaves out the linears of gated delta nets, which model.model_type={a.family} has "
            f"in {a.num_layers - len(a.attention_layers)} of {a.num_layers} layers in place of attention: all-linear names "
            "them, too"
        )
    _check_adapted_stages(settings, a, found)
    _check_rank(settings, a, found)
    found.require(
        not a.tied_embeddings or len(lora.train_whole) != 1,
        f"lora.train_whole={lora.train_whole} parts embedding and head, which are one in this model (tie_word_embeddings): use "
        "[embed_tokens, lm_head], or neither",
    )
    if a.tied_embeddings and EMBEDDING in lora.targets:
        found.notes.append(
            f"lora.targets={lora.targets} names the embedding, which in this model is the head, too (tie_word_embeddings): "
            "the adapter is of the embedding alone, as in PEFT, and a merged model has a head of its own"
        )
    if lora.dora:
        _check_dora(settings, a, found)
    if a.num_experts and set(OF_MLP) & set(lora.targets):
        _check_experts_adapters(settings, a, found)


def _check_dora(settings: Settings, a: Architecture, found: Findings) -> None:
    """Whether every rank holds whole rows of what `lora.dora` scales, and PEFT's linears are those of `lora.targets`."""
    lora, tensor = settings.lora, settings.parallel.tensor
    found.require(
        a.num_query_groups % tensor == 0 or not {"q_proj", "k_proj", "v_proj"} & set(lora.targets),
        f"lora.dora=true needs a parallel.tensor that divides model.num_key_value_heads={a.num_query_groups}, which {tensor} "
        f"does not: use {divisors(a.num_query_groups)}, or leave q_proj, k_proj and v_proj out of lora.targets",
    )
    if a.num_experts and set(OF_MLP) & set(lora.targets):
        found.problems.append(
            f"lora.dora=true is not for experts, as in PEFT, of which lora.targets={lora.targets} names linears: use "
            "lora.dora=false, or leave out gate_proj, up_proj and down_proj"
        )
        return
    fused = sorted({place.module for place in adapter_places(a, lora.targets)} & FUSED.keys())
    found.require(
        not fused,
        f"lora.dora=true is not for linears that model.model_type={a.family} fuses ({', '.join(fused)}): use lora.dora=false",
    )


def _check_experts_adapters(settings: Settings, a: Architecture, found: Findings) -> None:
    """Whether the experts can have adapters, of which `lora.targets` names linears."""
    targets = settings.lora.targets
    leave = f"leave out {', '.join(name for name in OF_MLP if name in targets)}"
    backend = preferred_backend(settings)
    found.require(
        backend == "torch",
        f"lora.targets={targets} names linears of experts, which take no adapters in the grouped products of "
        f"model.backend={backend}: use model.backend=torch, or {leave}",
    )
    found.require(
        a.shared_ffn_hidden_size > 0 or not set(targets) <= {*OF_MLP, EMBEDDING},
        f"lora.targets={targets} names linears of experts alone, which leaves megatron's optimizer of all others nothing: add "
        "one of attention, as o_proj",
    )
    found.require(
        ("gate_proj" in targets) == ("up_proj" in targets),
        f"lora.targets={targets} parts gate_proj and up_proj of experts, which PEFT holds in one tensor: name both or neither",
    )


def _check_adapted_stages(settings: Settings, a: Architecture, found: Findings) -> None:
    """Every part of the pipeline needs something to train: where layers are not alike, targets may be in some of them alone."""
    lora = settings.lora
    adapted = {layer for place in adapter_places(a, lora.targets) for layer in place.layers}
    # With the first layer is the embedding, with the last the head.
    adapted |= {0} if EMBEDDING in (*lora.targets, *lora.train_whole) else set()
    adapted |= {a.num_layers - 1} if "lm_head" in lora.train_whole else set()
    chunks = [layers for stage in settings.parallel.chunk_layers(a.num_layers) for layers in stage]
    without = [f"{one[0]} to {one[-1]}" for one in sorted(chunks, key=min) if not adapted & {*one}]
    found.require(
        not without,
        f"lora.targets={lora.targets} names linears of some layers alone, which leaves nothing to train in the pipeline's "
        f"layers {', '.join(without)}: add gate_proj, up_proj or down_proj, or use a smaller parallel.pipeline",
    )


def _check_rank(settings: Settings, a: Architecture, found: Findings) -> None:
    """A product of matrices of a rank above the smaller side of a weight is no better than the weight, and larger."""
    rank, sides = settings.lora.rank, smaller_sides(a, settings.lora.targets)
    below = {name: min(numbers) for name, numbers in sides.items() if min(numbers) < rank}
    most = max(map(max, sides.values()))
    if most < rank:
        found.problems.append(
            f"lora.rank={rank} is above the smaller side of every weight in lora.targets (at most {most}): use {most} or less, "
            "8 to 128 being customary, or lora.rank=0 to train the weights themselves"
        )
    elif below:
        name, side = min(below.items(), key=lambda one: one[1])
        found.notes.append(
            f"lora.rank={rank} is above the smaller side of {', '.join(below)} ({side} of {name}): more numbers than the "
            "weights themselves, for no higher rank"
        )
