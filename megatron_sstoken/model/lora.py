"""Low-rank adapters (LoRA, arXiv 2106.09685) on parallel linears, megatron's and Transformer Engine's, as PEFT computes them.

A linear with weight W that is named in `lora.targets` computes W·x + scale · B·(A·dropout(x)), with A [rank, in]
and B [out, rank]; W is frozen. megatron fuses q, k and v into one linear and gate and up into another; each of them keeps
an A and a B of its own, in the row order of the Hugging Face model, and its own dropout mask. Adapters are parameters
`<linear>.adapters.<target>.lora_A` and `.lora_B`, and DoRA's `.magnitude`; the names of the base stay what they are.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_sstoken.compat import dense_mlp, expert_mlp
from megatron_sstoken.config import LoraSettings
from megatron_sstoken.model.dora import squared_row_norms
from megatron_sstoken.model.lora_embedding import EmbeddingAdapter
from megatron_sstoken.model.lora_targets import OF_MLP, base_parameters, expert_of


class Adapter(torch.nn.Module):
    """This rank's slices of one target's A and B.

    Column-parallel: A whole, B split by rows. Row-parallel: A split by columns, B whole. Whole matrices are the same on all
    tensor parallel ranks. Those of an expert are whole on the ranks that hold it.
    """

    def __init__(self, num_inputs: int, num_outputs: int, rank: int, config: TransformerConfig, *, dora: bool):
        super().__init__()
        if dora:  # the length of each row, cut as B is
            self.magnitude = torch.nn.Parameter(torch.ones(num_outputs, dtype=config.params_dtype))
        self.lora_A = torch.nn.Parameter(torch.zeros(rank, num_inputs, dtype=config.params_dtype))
        self.lora_B = torch.nn.Parameter(torch.zeros(num_outputs, rank, dtype=config.params_dtype))


class AdaptedLinear(torch.nn.Module):
    """What all linears with adapters share; mixed into megatron's classes and Transformer Engine's."""

    # Of the linears beside which this stands.
    config: TransformerConfig
    tp_group: dist.ProcessGroup
    sequence_parallel: bool
    input_size: int
    """Inputs over all tensor parallel ranks."""

    lora: LoraSettings
    adapters: torch.nn.ModuleDict
    weight: torch.Tensor
    bias: torch.Tensor | None
    adapters_on: bool = True
    adapter_axis: dict[str, int]
    """Which parameter of each adapter tensor parallel splits → along which axis."""

    def _add_adapters(self, lora: LoraSettings, sizes: dict[str, tuple[int, int]], axis: dict[str, int]) -> None:
        """`sizes`: target → (inputs, outputs) on this rank."""
        self.lora, self.adapter_axis = lora, axis
        self.adapters = torch.nn.ModuleDict(
            {name: Adapter(*size, lora.rank, self.config, dora=lora.dora) for name, size in sizes.items()}
        )
        for adapter in self.named_adapters().values():
            for name, parameter in adapter.named_parameters():
                if name in axis:
                    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=axis[name], stride=1)
                elif self.sequence_parallel:
                    # Each rank sees its share of the tokens: megatron sums such gradients over the tensor ranks.
                    setattr(parameter, "sequence_parallel", True)  # noqa: B010  (an attribute of megatron's)

    def forward(self, input_, *args, **kwargs):
        """The linear's output and bias, with what the adapters add."""
        output, bias = super().forward(input_, *args, **kwargs)
        return (self.add_to(output, bias, self.adapter_output(input_)), bias) if self.adapters_on else (output, bias)

    def add_to(self, output: torch.Tensor, bias: torch.Tensor | None, added: torch.Tensor) -> torch.Tensor:
        """The linear's output with what the adapters add; `bias`: what it returned apart."""
        if not self.lora.dora:
            return output + added
        factors = self._in_rows(
            {name: one.magnitude / norm for name, (one, norm) in self._adapters_and_norms().items()}
        )
        within = self.bias if bias is None and self.bias is not None and self.bias.numel() else 0  # not to be scaled
        return (output - within + added) * factors.to(output.dtype) + within

    @torch.no_grad()
    def _adapters_and_norms(self) -> dict[str, tuple[Adapter, torch.Tensor]]:
        """Target → its adapter, and the norms of the rows of W + scale · B·A that this rank computes, fp32 [rows]."""
        found, adapters = {}, self.named_adapters()
        for name, weight in self._target_weights().items():
            one = adapters[name]
            squares = squared_row_norms(weight, one.lora_A.to(weight.dtype), one.lora_B, self.lora.scale)
            found[name] = one, self._whole_rows(squares).sqrt()
        return found

    @torch.no_grad()
    def start_magnitudes(self) -> None:
        """Let DoRA's magnitudes be the norms of the rows as they are, so that the linear computes what its base does."""
        for adapter, norms in self._adapters_and_norms().values():
            adapter.magnitude.copy_(norms)

    def adapter_output(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the adapters add to the output on this rank."""
        raise NotImplementedError

    def _target_weights(self) -> dict[str, torch.Tensor]:
        """Target → the rows of the weight that it adapts, on this rank, in the order of its B."""
        raise NotImplementedError

    def _in_rows(self, factors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Factors of the targets' rows → those of all rows of the output on this rank."""
        raise NotImplementedError

    def _whole_rows(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the columns that this rank has → over whole rows."""
        raise NotImplementedError

    def named_adapters(self) -> dict[str, Adapter]:
        """Target → its adapter, in the order of the output."""
        return {name: module for name, module in self.adapters.items() if isinstance(module, Adapter)}

    def _drop(self, inputs: torch.Tensor, *, replicated: bool) -> torch.Tensor:
        """Dropout whose masks agree over the tensor ranks where the inputs do, and differ where they differ.

        Under sequence parallel megatron runs whole layers inside its tracker's fork (a fork in a fork would draw the
        same again and again).
        """
        if replicated or self.sequence_parallel:
            return F.dropout(inputs, self.lora.dropout)
        with get_cuda_rng_tracker().fork():
            return F.dropout(inputs, self.lora.dropout)

    def _shrink(self, inputs: torch.Tensor, *, replicated: bool) -> torch.Tensor:
        """Scaled A·dropout(x) of all targets side by side: [tokens, batch, targets · rank]."""
        matrices: list[torch.Tensor] = [adapter.lora_A for adapter in self.named_adapters().values()]
        if self.training and self.lora.dropout > 0:
            parts = [F.linear(self._drop(inputs, replicated=replicated), matrix) for matrix in matrices]
            small = torch.cat(parts, dim=-1)
        else:  # one product, which reads the inputs once
            small = F.linear(inputs, torch.cat(matrices))
        return small * self.lora.scale

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """megatron's own entry for the base, and one for each adapter matrix."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        ours = {name: value for name, value in self.state_dict(keep_vars=True).items() if name.startswith("adapters.")}
        axes = {name: axis for name in ours for last, axis in self.adapter_axis.items() if name.endswith(last)}
        state |= make_sharded_tensors_for_checkpoint(
            ours, prefix, axes, sharded_offsets, tp_group=self.tp_group, dp_cp_group=(metadata or {})["dp_cp_group"]
        )
        return state


@dataclass(frozen=True)
class Blocks:
    """What a column-parallel linear computes, one output or several fused ones."""

    shares: dict[str, int]
    """In the order of the output: name of each fused linear → its share of the output."""
    num_groups: int | None = None
    """If set, the output over all ranks is made of that many groups, each holding a block of every linear: q, k and v by
    query group."""


class AdaptedColumns(AdaptedLinear):
    """The adapters of a column-parallel linear, one for each target among its blocks."""

    def add_column_adapters(self, lora: LoraSettings, blocks: Blocks, num_outputs: int) -> None:
        """`num_outputs`: on this rank."""
        tensor, shares = self.tp_group.size(), blocks.shares
        groups = tensor if blocks.num_groups is None else blocks.num_groups
        self.num_groups, self.ranks_of_group = max(groups // tensor, 1), max(tensor // groups, 1)
        group_rows = num_outputs * self.ranks_of_group // self.num_groups
        rows = {name: group_rows * share // sum(shares.values()) for name, share in shares.items()}
        sizes: dict[str, tuple[int, int]] = {
            name: (self.input_size, rows[name] * groups // tensor) for name in rows if name in lora.targets
        }
        self._add_adapters(lora, sizes, {"lora_B": 0, "magnitude": 0})
        first = self.tp_group.rank() % self.ranks_of_group * num_outputs
        last = first + num_outputs if self.ranks_of_group > 1 else group_rows
        self.block_rows = {}
        """Of a group: name of each fused linear → its rows that this rank computes."""
        for name, number in rows.items():
            self.block_rows[name] = range(number)[max(first, 0) : max(last, 0)]
            first, last = first - number, last - number

    def _target_weights(self) -> dict[str, torch.Tensor]:
        blocks = self.weight.unflatten(0, (self.num_groups, -1)).split(
            [len(one) for one in self.block_rows.values()], dim=1
        )
        named = zip(self.block_rows, blocks, strict=True)
        return {name: block.flatten(0, 1) for name, block in named if name in self.adapters}

    def _in_rows(self, factors: dict[str, torch.Tensor]) -> torch.Tensor:
        blocks = [
            factors[name].view(self.num_groups, -1)
            if name in factors
            else self.weight.new_ones(self.num_groups, len(rows))
            for name, rows in self.block_rows.items()
        ]
        return torch.cat(blocks, dim=1).flatten()

    def _whole_rows(self, sums: torch.Tensor) -> torch.Tensor:
        return sums

    def adapter_output(self, inputs: torch.Tensor) -> torch.Tensor:
        """[tokens (of this rank under sequence parallel), batch, in] → [tokens, batch, out / tensor size]."""
        small = self._shrink(inputs, replicated=not self.sequence_parallel)
        if self.sequence_parallel:  # gathered here the tokens are `rank` wide, not as wide as the model
            small = gather_from_sequence_parallel_region(small, group=self.tp_group)
        else:
            small = copy_to_tensor_model_parallel_region(small, group=self.tp_group)
        matrices = self._matrices() if self.ranks_of_group == 1 else self._matrices_of_cut_group()
        pieces = dict(zip(matrices, small.split(self.lora.rank, dim=-1), strict=True))
        shape = (*small.shape[:-1], self.num_groups)
        blocks = [
            F.linear(pieces[name], matrices[name]).view(*shape, len(rows))
            if name in pieces
            else small.new_zeros(*shape, len(rows))
            for name, rows in self.block_rows.items()
        ]
        return torch.cat(blocks, dim=-1).flatten(-2)

    def _matrices(self) -> dict[str, torch.Tensor]:
        """Target → its B, of the rows that this rank computes."""
        return {name: adapter.lora_B for name, adapter in self.named_adapters().items()}

    def _matrices_of_cut_group(self) -> dict[str, torch.Tensor]:
        """The same where tensor parallel outnumbers the query groups and cuts through them; megatron gathers q, k and v.

        Each rank holds an even share of every B, and a part of one group's rows is what it computes: all B are gathered.
        Linears of which this rank computes no row stay part of the graph, so that all ranks reduce their gradients.
        """
        held = self._matrices()
        tensor, group = self.tp_group.size(), self.tp_group.rank() // self.ranks_of_group
        gathered = gather_from_sequence_parallel_region(torch.cat(list(held.values())), group=self.tp_group)
        parts = gathered.unflatten(0, (tensor, -1)).split([len(matrix) for matrix in held.values()], dim=1)
        found = {}
        for name, part in zip(held, parts, strict=True):
            whole, rows = part.flatten(0, 1), self.block_rows[name]
            first = group * (len(whole) * self.ranks_of_group // tensor)
            found[name] = whole[first + rows.start : first + rows.stop]
        return found


class AdaptedRows(AdaptedLinear):
    """The adapter of a row-parallel linear."""

    def add_row_adapter(self, lora: LoraSettings, target: str, num_inputs: int, num_outputs: int) -> None:
        """`target` names the linear; `num_inputs`: on this rank."""
        self._add_adapters(lora, {target: (num_inputs, num_outputs)}, {"lora_A": 1})

    def _target_weights(self) -> dict[str, torch.Tensor]:
        return dict.fromkeys(self.named_adapters(), self.weight)

    def _in_rows(self, factors: dict[str, torch.Tensor]) -> torch.Tensor:
        (only,) = factors.values()
        return only

    def _whole_rows(self, sums: torch.Tensor) -> torch.Tensor:
        if self.tp_group.size() > 1:
            dist.all_reduce(sums, group=self.tp_group)
        return sums

    def adapter_output(self, inputs: torch.Tensor) -> torch.Tensor:
        """[tokens, batch, in / tensor size] → [tokens (of this rank under sequence parallel), batch, out]."""
        small = self._shrink(inputs, replicated=False)
        if self.sequence_parallel:
            small = reduce_scatter_to_sequence_parallel_region(small, group=self.tp_group)
        else:
            small = reduce_from_tensor_model_parallel_region(small, group=self.tp_group)
        (adapter,) = self.named_adapters().values()
        return F.linear(small, adapter.lora_B)


class AdaptedColumnParallelLinear(AdaptedColumns, ColumnParallelLinear):
    """megatron's column-parallel linear with adapters."""

    output_size_per_partition: int

    def __init__(self, *args, lora: LoraSettings, blocks: Blocks, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_column_adapters(lora, blocks, self.output_size_per_partition)


class AdaptedRowParallelLinear(AdaptedRows, RowParallelLinear):
    """megatron's row-parallel linear with an adapter."""

    input_size_per_partition: int
    output_size: int

    def __init__(self, *args, lora: LoraSettings, target: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_row_adapter(lora, target, self.input_size_per_partition, self.output_size)


def adapt_layer(layer: TransformerLayerSubmodules, config: TransformerConfig, lora: LoraSettings) -> None:
    """Put adapted linears into a layer's spec wherever `lora.targets` names them: in attention, and in the dense feed-forward
    part or in the experts that are computed one after another."""
    column: type[AdaptedColumns] = AdaptedColumnParallelLinear
    row: type[AdaptedRows] = AdaptedRowParallelLinear
    if config.transformer_impl == "transformer_engine":
        from megatron_sstoken.model.lora_transformer_engine import AdaptedTELinear, adapted_columns

        column, row = adapted_columns(layer.self_attention.submodules.linear_qkv), AdaptedTELinear
    attention = layer.self_attention.submodules
    heads_per_group = config.num_attention_heads // config.num_query_groups
    heads_per_group *= 2 if config.attention_output_gate else 1  # gates come from the queries' linear
    if {"q_proj", "k_proj", "v_proj"} & set(lora.targets):
        fused = Blocks({"q_proj": heads_per_group, "k_proj": 1, "v_proj": 1}, config.num_query_groups)
        attention.linear_qkv = partial(column, lora=lora, blocks=fused)
    if "o_proj" in lora.targets:
        attention.linear_proj = ModuleSpec(row, params={"lora": lora, "target": "o_proj"})
    mlp = dense_mlp(layer) or (expert_mlp(layer) if set(OF_MLP) & set(lora.targets) else None)
    if mlp is None:
        return
    if {"gate_proj", "up_proj"} & set(lora.targets):
        mlp.linear_fc1 = ModuleSpec(column, params={"lora": lora, "blocks": Blocks({"gate_proj": 1, "up_proj": 1})})
    if "down_proj" in lora.targets:
        mlp.linear_fc2 = ModuleSpec(row, params={"lora": lora, "target": "down_proj"})


def prepare_adapters(chunk: GPTModel, seed: int, whole: frozenset[str], *, full_recompute: bool) -> None:
    """Freeze the base of a model chunk (an unwrapped GPTModel) but its parameters `whole`, and draw its adapters, for training.

    A is drawn as PEFT draws it (uniform, kaiming with a = √5), B is zero; of the embedding A is zero and B normal.
    Each is drawn whole from a generator of its own, seeded by `seed`, layer, expert and target, so that it is the same on
    every layout.
    """
    for name, parameter in base_parameters(chunk):
        parameter.requires_grad_(name in whole)
    for layer in chunk.decoder.layers:
        for expert, linear in linears_of_layer(layer):
            place = f"{layer.layer_number}" if expert is None else f"{layer.layer_number}/{expert}"
            for target, adapter in linear.named_adapters().items():
                _draw(adapter.lora_A, linear, f"{seed}/{place}/{target}")
    if chunk.pre_process and hasattr(chunk.embedding, "adapters"):
        adapter = chunk.embedding.adapters
        with torch.no_grad():
            drawn = torch.empty(adapter.lora_B.shape).normal_(generator=_generator(f"{seed}/embedding"))
            adapter.lora_B.copy_(drawn)
    if full_recompute and chunk.pre_process:
        # megatron recomputes layers through an autograd function, which drops all gradients inside it where no input asks
        # for one; the output of a frozen embedding does not.
        chunk.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


def _generator(name: str) -> torch.Generator:
    """A generator whose numbers hang on `name` alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)


@torch.no_grad()
def _draw(parameter: torch.nn.Parameter, linear: AdaptedLinear, name: str) -> None:
    bound = 1 / math.sqrt(linear.input_size)  # kaiming_uniform_(a=√5): √(6 / ((1 + 5) · inputs))
    whole = torch.empty(parameter.shape[0], linear.input_size).uniform_(-bound, bound, generator=_generator(name))
    width = parameter.shape[1]
    first = linear.tp_group.rank() * width if width < linear.input_size else 0
    parameter.copy_(whole[:, first : first + width])


def adapted_modules(chunks: Iterable[torch.nn.Module]) -> Iterator[AdaptedLinear | EmbeddingAdapter]:
    """All linears with adapters, and the adapter of the embedding."""
    kinds = AdaptedLinear | EmbeddingAdapter
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, kinds))


def start_magnitudes(chunks: Iterable[torch.nn.Module]) -> None:
    """Begin DoRA, where it is used, from the base's weights, which have been read. All tensor parallel ranks call it."""
    for module in adapted_modules(chunks):
        if isinstance(module, AdaptedLinear) and module.lora.dora:
            module.start_magnitudes()


def linears_of_layer(layer: torch.nn.Module) -> Iterator[tuple[int | None, AdaptedLinear]]:
    """The linears of a layer that have adapters, each with the number in the model of the expert that it belongs to."""
    for name, module in layer.named_modules():
        if isinstance(module, AdaptedLinear):
            local = expert_of(name)
            yield (None if local is None else layer.mlp.local_expert_indices[local]), module  # type: ignore
