"""ssToken as a user would write it today with transformers, after the way of the official code (read, not copied).

One process, samples padded to the longest, logits of all positions; the last layer's attention computed a second time as a
dense matrix for every head; scores sample by sample in Python, asking tensors for numbers; the loss a mean over the
micro-batch's selected tokens. The model itself runs on torch SDPA.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

GAMMA, RHO = 0.5, 0.6


class HuggingFaceLoop:
    """The model, its AdamW, and one optimizer step a call."""

    def __init__(self, folder: Path, learning_rate: float = 1e-5):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate)
        self.last = self.model.model.layers[-1].self_attn
        self.last.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        self.generator = torch.Generator().manual_seed(0)

    def _keep_input(self, module, args, kwargs) -> None:
        self.hidden, self.rope = kwargs["hidden_states"].detach(), kwargs["position_embeddings"]

    @torch.no_grad()
    def _dense_attention(self) -> torch.Tensor:
        """Mean over heads of the last layer's attention, fp32 [batch, tokens, tokens]."""
        layer, (batch, length, _) = self.last, self.hidden.shape
        shape = (batch, length, -1, layer.head_dim)
        query = layer.q_proj(self.hidden).view(shape).transpose(1, 2)
        key = layer.k_proj(self.hidden).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *self.rope)
        weights = query @ repeat_kv(key, layer.num_key_value_groups).transpose(2, 3) / math.sqrt(layer.head_dim)
        later = torch.full((length, length), -math.inf).triu(1)
        return (weights + later).softmax(-1).mean(1)

    def step(self, samples: list[np.ndarray], roles: list[np.ndarray]) -> float:
        """One step on a padded batch; the loss."""
        tokens = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(s.astype(np.int64)) for s in samples], True)
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(np.where(r == 1, s, -100).astype(np.int64)) for s, r in zip(samples, roles, strict=True)],
            batch_first=True,
            padding_value=-100,
        )
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(sample) for sample in samples]).unsqueeze(1)
        logits = self.model(tokens, attention_mask=mask.long()).logits[:, :-1]
        shifted = labels[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="none").view(shifted.shape)
        attention = self._dense_attention()
        selected = torch.zeros_like(shifted, dtype=torch.bool)
        for number in range(len(samples)):
            self._select(losses[number].detach(), attention[number], shifted[number], selected[number])
        loss = losses[selected].mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss)

    def _select(self, losses, attention, labels, selected) -> None:
        """Mark the positions of one sample that predict its selected tokens."""
        positions = (labels != -100).nonzero().flatten()
        first = int(positions[0].item()) + 1
        history = 12 * torch.rand(len(losses), generator=self.generator)
        rel, mass = [], []
        for position in positions:
            rel.append(history[position].item() - losses[position].item())
            mass.append(attention[position + 1, :first].sum().item())
        low, high = min(rel), max(rel)
        scores = torch.tensor(
            [GAMMA * (r - low) / (high - low + 1e-8) + (1 - GAMMA) * m for r, m in zip(rel, mass, strict=True)]
        )
        selected[positions[scores.topk(math.ceil(RHO * len(scores))).indices]] = True
