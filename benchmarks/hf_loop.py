"""ssToken as a user would write it today with transformers: what github.com/jianke0604/ssToken does in a step (2a0c57d; read,
not copied), in fp32, in one process, without LoRA.

Micro-batches of three samples, padded to the longest. transformers is given the labels, so it computes the loss of all
response tokens; the losses that select come sample by sample from a second cross-entropy, those that train from a third. The
attention of the last layer is a dense matrix for every head: either computed again from the layer's input, while the model
runs on SDPA (`scripts/finetune_with_hook.py`), or returned by a model in eager mode, which then keeps that of every layer
(`scripts/finetune.py`). History losses are lists of Python floats. The loss is a mean over micro-batches of means.
"""

import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

GAMMA, RHO = 0.5, 0.6
MICRO_BATCH = 3


class HuggingFaceLoop:
    """The model, its AdamW, and one optimizer step a call."""

    def __init__(self, folder: Path, attention: Literal["recomputed", "returned"], learning_rate: float = 1e-5):
        self.returned = attention == "returned"
        implementation = "eager" if self.returned else "sdpa"
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation=implementation, dtype=torch.float32
        )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=learning_rate, fused=True)  # as ours
        self.last = self.model.model.layers[-1].self_attn
        if not self.returned:
            self.last.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        self.generator = np.random.default_rng(0)

    def _keep_input(self, module, args, kwargs) -> None:
        self.last_input = {name: kwargs[name] for name in ("hidden_states", "position_embeddings")}

    @torch.no_grad()
    def _recomputed_attention(self) -> torch.Tensor:
        """The last layer's attention once more, in eager mode: fp32 [batch, heads, tokens, tokens]."""
        inputs, self.last_input = self.last_input, {}
        length = inputs["hidden_states"].shape[1]
        causal = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
        config = self.last.config
        config._attn_implementation = "eager"
        try:
            return self.last.forward(attention_mask=causal, **inputs)[1]  # not through the hook
        finally:
            config._attn_implementation = "sdpa"

    def step(self, samples: list[np.ndarray], roles: list[np.ndarray]) -> float:
        """One step on these samples; the mean of the micro-batches' losses."""
        history = [self.generator.uniform(0, 12, len(sample)).tolist() for sample in samples]
        starts = range(0, len(samples), MICRO_BATCH)
        total = 0.0
        for start in starts:
            part = slice(start, start + MICRO_BATCH)
            loss = self._loss(samples[part], roles[part], history[part])
            (loss / len(starts)).backward()
            total += loss.item() / len(starts)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def _loss(self, samples, roles, history) -> torch.Tensor:
        """Mean loss over the selected tokens of a micro-batch."""
        tokens = _padded([torch.from_numpy(sample.astype(np.int64)) for sample in samples], 0)
        labels = _padded(
            [torch.from_numpy(np.where(r == 1, s, -100).astype(np.int64)) for s, r in zip(samples, roles, strict=True)],
            -100,
        )
        lengths = torch.tensor([len(sample) for sample in samples])
        mask = (torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)).long()
        outputs = self.model(
            tokens, attention_mask=mask, labels=labels, use_cache=False, output_attentions=self.returned
        )
        attention = outputs.attentions[-1] if self.returned else self._recomputed_attention()
        mean_attention = attention.mean(1)
        kept = labels.clone()
        for number, length in enumerate(lengths.tolist()):
            kept[number, :length] = self._select(
                outputs.logits[number, :length],
                labels[number, :length],
                mean_attention[number, :length, :length],
                torch.tensor(history[number]),
            )
        logits = outputs.logits[:, :-1].contiguous()
        return F.cross_entropy(logits.flatten(0, 1), kept[:, 1:].flatten())

    @staticmethod
    def _select(logits, labels, attention, history) -> torch.Tensor:
        """The labels of one sample, −100 where not selected. The prompt is as long as there are labels of −100."""
        prompt = int((labels == -100).sum().item())
        losses = F.cross_entropy(logits[:-1], labels[1:], reduction="none")[prompt - 1 :]
        rel = history[prompt:] - losses
        normalized = (rel - rel.min()) / (rel.max() - rel.min() + 1e-8)
        scores = GAMMA * normalized + (1 - GAMMA) * attention[prompt:, :prompt].sum(-1)
        dropped = torch.ones(len(scores), dtype=torch.bool)
        dropped[scores.topk(math.ceil(RHO * len(scores))).indices] = False
        return labels.index_fill(0, prompt + dropped.nonzero().flatten(), -100)


def _padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
