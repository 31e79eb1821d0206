"""The adapter of the embedding, vocabulary-parallel, as PEFT computes it: W[token] + scale · B·A[:, token].

A lies as the embedding does: a row of `rank` numbers for each word of this tensor rank's part of the padded vocabulary. Its
parameters are `embedding.adapters.lora_A.weight` and `embedding.adapters.lora_B`. PEFT drops none of its inputs.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_sstoken.compat import mark_split
from megatron_sstoken.config import LoraSettings


class EmbeddingAdapter(MegatronModule):
    """A [vocabulary / tensor size, rank] as an embedding of its own, and B [hidden, rank], the same on all tensor ranks."""

    def __init__(self, embedding: VocabParallelEmbedding, config: TransformerConfig, lora: LoraSettings):
        super().__init__(config)
        self.scale, self.adapters_on = lora.scale, True
        self.lora_A = VocabParallelEmbedding(
            embedding.num_embeddings,
            lora.rank,
            init_method=config.init_method,
            reduce_scatter_embeddings=embedding.reduce_scatter_embeddings,
            config=config,
            tp_group=embedding.tp_group,
        )
        torch.nn.init.zeros_(self.lora_A.weight)
        mark_split(self.lora_A.weight, 0)
        self.lora_B = torch.nn.Parameter(
            torch.zeros(embedding.embedding_dim, lora.rank, dtype=config.params_dtype, device=self.lora_A.weight.device)
        )
        # Each rank sees its share of the tokens: megatron sums such gradients over the tensor ranks.
        self.lora_B.sequence_parallel = embedding.reduce_scatter_embeddings  # type: ignore[attr-defined]

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Words int64 [batch, tokens] → what is added to their embedding, in its shape."""
        return F.linear(self.lora_A(words) * self.scale, self.lora_B)


def adapt_embedding(chunk: GPTModel, lora: LoraSettings) -> None:
    """Give the embedding of a model chunk that has one its adapter."""
    embedding = chunk.embedding
    adapter = embedding.adapters = EmbeddingAdapter(embedding.word_embeddings, chunk.config, lora)

    def add(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + adapter(*inputs) if adapter.adapters_on else output

    embedding.word_embeddings.register_forward_hook(add)
