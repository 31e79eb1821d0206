"""Where adapters lie: the linears of a Hugging Face model that `lora.targets` reaches, and their sizes."""

from collections.abc import Collection
from dataclasses import dataclass

from megatron_sstoken.config import LoraSettings, LoraTarget
from megatron_sstoken.config.model import LINEARS
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.families.weight_map import HF, LAYER, Split, WeightRule
from megatron_sstoken.model.lora_targets import EMBEDDING, FUSED, OTHER_NAMES, expert_of, peft_name
from megatron_sstoken.model.weights import expected_shape


@dataclass(frozen=True)
class Place:
    """A linear of the Hugging Face model's layers that has adapters."""

    path: str
    """In its layer; of a part of a tensor of all experts with the expert's number in it, as if it were a linear."""
    linear: str
    """The linear of megatron's layer that it is, or is a part of."""
    targets: tuple[str, ...]
    """Those of `lora.targets` that lie in it."""
    rows: dict[str, int]
    """All targets that it is made of, in the order of its rows → their outputs."""
    inputs: int
    layers: tuple[int, ...]
    """The layers that have it, from 0."""
    in_stack: bool = False
    """Whether folders hold it in a tensor of all experts, in which outputs of gate and up take turns."""
    blocks: tuple[int, ...] = ()
    """Of what goes into a delta net: the rows that a key head has of each part that lies in it in folders. Here they lie by key
    head."""

    def rule(self, name: str, layer: int, matrix: str) -> WeightRule:
        """How the adapter's parameter `name`, lora_A, lora_B or DoRA's magnitude, is made from PEFT's in layer `layer`."""
        by_head = bool(self.blocks) and matrix != "lora_A"
        return WeightRule(
            name,
            (peft_name(layer, self.path, matrix),),
            Split.KEY_HEADS if by_head else Split.WHOLE,
            blocks=(self.blocks,) if by_head else (),
            stacked=self.in_stack,
        )

    @property
    def module(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    @property
    def expert(self) -> int | None:
        """The number of the expert that it belongs to."""
        return expert_of(self.linear)


def adapter_places(a: Architecture, targets: Collection[str]) -> list[Place]:
    """The linears of `a` that any of `targets` reaches by its name, wherever in a layer, as in PEFT."""
    found = []
    for rule in a.weight_rules():
        if not rule.megatron.startswith(LAYER) or rule.megatron.endswith(".bias"):
            continue
        for name, blocks in zip(rule.hugging_face, rule.blocks or [()] * len(rule.hugging_face), strict=True):
            path = name.removeprefix(HF).removesuffix(".weight")
            parent, _, module = path.rpartition(".")
            parts = FUSED.get(module, (OTHER_NAMES.get(module, module),))
            reached = tuple(part for part in parts if part in targets)
            if reached:
                if rule.stacked:
                    path, (_, inputs, outputs) = f"{parent}.{rule.expert}.{module}", expected_shape(name, a)
                else:
                    outputs, inputs = expected_shape(name, a)
                rows = rows_of_fused(a, module) if module in FUSED else {parts[0]: outputs}
                linear = rule.megatron.removeprefix(LAYER).removesuffix(".weight")
                found.append(Place(path, linear, reached, rows, inputs, rule.layers(a), rule.stacked, blocks))
    return found


def rows_of_fused(a: Architecture, module: str) -> dict[str, int]:
    """What a linear of Hugging Face models that fuses some is made of, in the order of its rows → their outputs."""
    keys = a.num_query_groups * a.head_dim
    of_attention = {"q_proj": a.query_rows, "k_proj": keys, "v_proj": keys}
    return {part: of_attention.get(part, a.ffn_hidden_size) for part in FUSED[module]}


def linears_of(a: Architecture) -> list[LoraTarget]:
    """The targets that are linears of `a`."""
    reached = {target for place in adapter_places(a, LINEARS) for target in place.targets}
    return [target for target in LINEARS if target in reached]


def smaller_sides(a: Architecture, targets: Collection[str]) -> dict[str, list[int]]:
    """Target → the smaller side of each of its weights."""
    sides: dict[str, list[int]] = {EMBEDDING: [min(a.vocabulary_size, a.hidden_size)]} if EMBEDDING in targets else {}
    for place in adapter_places(a, targets):
        for target in place.targets:
            sides.setdefault(target, []).append(min(place.rows[target], place.inputs))
    return sides


def num_adapter_parameters(a: Architecture, lora: LoraSettings) -> int:
    """Parameters of all adapters of a model, without those of the padded vocabulary."""
    total = lora.rank * (a.hidden_size + a.vocabulary_size) if EMBEDDING in lora.targets else 0
    for place in adapter_places(a, lora.targets):
        for target in place.targets:
            rows = place.rows[target]
            total += len(place.layers) * (lora.rank * (place.inputs + rows) + (rows if lora.dora else 0))
    return total


def num_whole_tables(a: Architecture, lora: LoraSettings) -> int:
    """Matrices of vocabulary × hidden size that are trained whole beside the adapters."""
    return min(len(lora.train_whole), 1 if a.tied_embeddings else 2)


def describe_trained(a: Architecture, lora: LoraSettings) -> str:
    """What a run trains, for people."""
    if lora.rank == 0:
        return "all weights"
    kind = "DoRA adapters" if lora.dora else "adapters"
    stabilized = " (rank-stabilized)" if lora.rank_stabilized else ""
    adapters = (
        f"{num_adapter_parameters(a, lora):,} parameters in {kind} of rank {lora.rank}, alpha {lora.alpha:g}{stabilized}, "
        f"dropout {lora.dropout:g}, on {', '.join(lora.targets)}"
    )
    if not lora.train_whole:
        return adapters
    whole = num_whole_tables(a, lora) * a.vocabulary_size * a.hidden_size
    return f"{adapters}, and {whole:,} of {' and '.join(lora.train_whole)}"
