"""What is measured on: a random Llama, and GSM8K through the project's own preparation. Made once, in a work folder."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.changes import apply
from benchmarks.drawn_history import DrawnHistory
from megatron_sstoken.config import Settings
from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.recipe import FieldNames, Recipe
from megatron_sstoken.data.store import SampleStore, StoreWriter
from megatron_sstoken.parallel import create_layout, reset_layout
from megatron_sstoken.training.loop import Trainer, create_trainer, model_to_train
from megatron_sstoken.validate.agree import agreed_plan
from tools.make_toy import make_tokenizer

RECIPE = Recipe(FieldNames.parse("prompt=question,response=answer"))
LENGTHS = (256, 512, 1024, 2048, 4096)
RESPONSE_SHARE = 0.6


@dataclass(frozen=True)
class Shape:
    """The model of docs/performance.md."""

    hidden: int = 512
    layers: int = 8
    vocabulary: int = 32768
    intermediate: int = 1408
    heads: int = 8
    groups: int = 4


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    gsm8k: Path
    work: Path
    rounds: int
    shape: Shape
    num_problems: int

    @property
    def tensor(self) -> int:
        """All processes are tensor parallel."""
        return dist.get_world_size()

    def config(self, **more: Any) -> dict[str, Any]:
        """What the rows say of the configuration."""
        return vars(self.shape) | {"num_problems": self.num_problems, "tensor": self.tensor} | more


def make(gsm8k: Path, work: Path, shape: Shape, num_problems: int) -> None:
    """Tokenizer, model, `num_problems` problems of GSM8K, and one sample of each of `LENGTHS`; kept for the next time."""
    name = work / "made.json"
    wanted = {**vars(shape), "num_problems": num_problems}
    if name.is_file() and json.loads(name.read_text()) == wanted:
        return
    work.mkdir(parents=True, exist_ok=True)
    lines = (gsm8k / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    conversations = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    make_tokenizer(conversations, shape.vocabulary).save_pretrained(work / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, vocab_size=shape.vocabulary,
        intermediate_size=shape.intermediate, num_attention_heads=shape.heads, num_key_value_heads=shape.groups,
        max_position_embeddings=max(LENGTHS), tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(work / "model")
    (work / "problems.jsonl").write_text("\n".join(lines[:num_problems]) + "\n", encoding="utf-8")
    prepare(
        [work / "problems.jsonl"], work / "model", work / "data", recipe=RECIPE, workers=1, overwrite=True,
        progress=False,
    )  # fmt: skip
    _make_lengths(work / "lengths", SampleStore(work / "data"))
    name.write_text(json.dumps(wanted))


def _make_lengths(folder: Path, problems: SampleStore) -> None:
    """One sample of every length, of random words; its last 60 % are response."""
    manifest = problems.manifest
    generator = np.random.default_rng(0)
    writer = StoreWriter(folder)
    for row, length in enumerate(LENGTHS):
        roles = np.zeros(length, dtype=np.uint8)
        roles[round(length * (1 - RESPONSE_SHARE)) :] = 1
        writer.add(generator.integers(10, manifest.vocabulary_size, length).astype(np.int32), roles, row)
    writer.finalize(
        vocabulary_size=manifest.vocabulary_size, eos_token_id=manifest.eos_token_id,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint, tokenizer_path=manifest.tokenizer_path, template=None,
    )  # fmt: skip


def settings_for(work: Path, *, tensor: int = 1, data: str = "data", **changes: Any) -> Settings:
    """fp32 settings of a run on the workload; `changes` as `section__key=value`."""
    settings = Settings()
    settings.model.hf_path, settings.data.train = str(work / "model"), str(work / data)
    settings.data.sequence_length, settings.parallel.tensor = 1024, tensor
    settings.training.precision = "fp32"
    settings.training.micro_batch_size = settings.training.global_batch_size = 1
    return apply(settings, **changes)


def make_trainer(settings: Settings) -> Trainer:
    """A trainer with drawn history losses; a former one's process groups are given up."""
    if dist.is_initialized():
        reset_layout()
    plan = agreed_plan(settings)
    layout = create_layout(settings.parallel, 0)
    trainer = create_trainer(plan, layout, model_to_train(plan, layout), DrawnHistory())
    trainer.model.train(True)
    return trainer


def typical_batch(trainer: Trainer) -> int:
    """The global batch whose share of response tokens is nearest to that of all data: packing puts long samples together."""
    manifest = trainer.loader.store.manifest
    wanted = manifest.num_response_tokens / manifest.num_tokens

    def distance(number: int) -> float:
        batches = trainer.loader.load(number)
        found = sum(int(batch.response.sum()) for batch in batches) / sum(batch.response.numel() for batch in batches)
        return abs(found - wanted)

    return min(range(min(trainer.loader.num_batches, 32)), key=distance)


def use(trainer: Trainer, method: str, head: str) -> None:
    """Switch a trainer to another selection method and head, without building the model again."""
    trainer.settings.selection.method = method
    trainer.model.captured_layers = () if method == "full" else trainer.plan.captured_layers
    for chunk in trainer.model.unwrapped:
        chunk.head = replace(chunk.head, selective=head == "selective")
