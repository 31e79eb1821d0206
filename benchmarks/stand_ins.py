"""Small random models, prepared data and settings, for programs that measure and for tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from benchmarks.changes import apply
from megatron_sstoken.config import Settings
from megatron_sstoken.data.store import StoreWriter

VOCABULARY = 99  # no tensor parallel size divides it
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
}
"""Of a model, in the words of a Hugging Face configuration, where nothing else is asked for."""


class TokensAndRoles(Protocol):
    """A conversation of n tokens."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def roles(self) -> list[int]:
        """0 context, 1 response."""


class Conversation(NamedTuple):
    """What `make_conversations` draws."""

    tokens: list[int]
    roles: list[int]


def save_random_model(folder: str | Path, config: PretrainedConfig, *, seed: int = 0) -> str:
    """Save a random model of a Hugging Face configuration; returns its folder.

    Biases and norms are not what they are initialised to, and the states of delta nets fade less fast.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):
                parameter.uniform_(-4.0, 0.0)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(std=0.3)
    model.save_pretrained(str(folder))
    return str(folder)


def make_conversations(num: int, *, seed: int = 0, longest: int = 60, shortest: int = 8) -> list[Conversation]:
    """Random conversations, single- and multi-turn; every one begins with context and has a response."""
    generator = np.random.default_rng(seed)
    conversations = []
    for _ in range(num):
        length = int(generator.integers(shortest, longest + 1))
        turns = int(generator.integers(1, 4))
        cuts = np.sort(generator.choice(np.arange(1, length), size=min(2 * turns - 1, length - 1), replace=False))
        roles = np.zeros(length, dtype=int)
        for number, part in enumerate(np.split(np.arange(length), cuts)):
            roles[part] = number % 2
        conversations.append(Conversation(generator.integers(0, VOCABULARY, length).tolist(), roles.tolist()))
    return conversations


def make_store(folder: str | Path, samples: Sequence[TokensAndRoles], rows: Sequence[int] | None = None) -> str:
    """Write samples as a prepared folder; `rows` are their numbers in the input. Returns the folder."""
    with StoreWriter(folder) as writer:
        for number, sample in enumerate(samples):
            weights = getattr(sample, "weights", None)
            writer.add(
                np.array(sample.tokens, dtype=np.int32),
                np.array(sample.roles, dtype=np.uint8),
                number if rows is None else rows[number],
                weights=None if weights is None else np.array(weights, dtype=np.float32),
            )
        writer.finalize(
            vocabulary_size=VOCABULARY, eos_token_id=1, tokenizer_fingerprint="toy", tokenizer_path="toy", template=None
        )
    return str(folder)


def make_settings(model: str, data: str, **changes: Any) -> Settings:
    """fp32 settings for tiny runs; `changes` as `apply` takes them."""
    settings = Settings()
    settings.model.hf_path = model
    settings.data.train = data
    settings.data.sequence_length = 128
    settings.data.packing = False
    settings.training.precision = "fp32"
    settings.training.global_batch_size = 8
    settings.training.micro_batch_size = 1
    settings.optimizer.learning_rate = 1e-3
    settings.optimizer.schedule = "constant"
    settings.optimizer.warmup_fraction = 0.0
    return apply(settings, **changes)
