"""Attention whose output is multiplied by gates (Qwen3-Next, Qwen3.5): each head makes one beside its query."""

import torch
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention


class GatedSelfAttention(SelfAttention):
    """megatron's attention with `attention_output_gate`, the rows of each head's query and gate one after the other as in
    Hugging Face folders and PEFT's.

    megatron has those of a group's queries first, and where tensor parallel outnumbers the query groups forgets to take this
    rank's heads of the gates.
    """

    def get_query_key_value_tensors(self, hidden_states, *args, **options):
        """Hidden states [tokens of this rank, 1, hidden] → queries, keys, values and gates [tokens, 1, heads, head_dim]."""
        mixed, _ = self.linear_qkv(hidden_states)
        dim, group = self.hidden_size_per_attention_head, self.pg_collection.tp
        ranks_of_group = max(group.size() // self.config.num_query_groups, 1)
        if ranks_of_group > 1:
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=group)
            mixed = mixed.chunk(self.config.num_query_groups, dim=-1)[group.rank() // ranks_of_group]
        by_group = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        heads, key, value = by_group.split([by_group.shape[-1] - 2 * dim, dim, dim], dim=-1)
        heads = heads.unflatten(-1, (-1, 2, dim)).flatten(2, 3)
        if ranks_of_group > 1:
            heads = heads.chunk(ranks_of_group, dim=2)[group.rank() % ranks_of_group]
        query, gate = (one.contiguous() for one in heads.unbind(-2))
        return self.q_layernorm(query), self.k_layernorm(key.contiguous()), value.contiguous(), gate

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """megatron's is compiled where it is first called, which takes a compiler and a second."""
        return (x * gate.view_as(x).float().sigmoid()).to(x.dtype)
