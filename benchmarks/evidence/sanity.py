"""Is `full` what it should be? As `random` that keeps all tokens, and as a plain loop with transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.evidence.arms import ALL_AT_RANDOM, FULL_IN_FP32, Task
from benchmarks.evidence.runs import Runs
from benchmarks.evidence.train import settings_of
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.validate.run import plan_run

LIMIT = 1e-3
"""Largest difference of the losses on clean held-out problems, in nats."""


def twin_of(full: Task) -> Task:
    """`random` with ρ = 1, which must end with the very weights of `full`."""
    return replace(full, arm=ALL_AT_RANDOM)


def require_equal_twins(runs: Runs, full: Task) -> None:
    """Raise RuntimeError where `full` and its twin are done, and their weights differ in a bit."""
    digests = {found["weights"] for one in (full, twin_of(full)) if (found := runs.result(one))}
    if len(digests) > 1:
        raise RuntimeError(f"the weights of `full` and of `random` with ρ = 1 differ: SHA-256 {digests}")


def compare_with_transformers(runs: Runs, full: Task) -> dict[str, float]:
    """Losses of both in fp32 on the clean held-out problems, once. Raises RuntimeError if they differ.

    The plain loop takes the same batches and learning rates, and torch's AdamW, one sample at a time.
    """
    path, task = runs.work / "plain_loop.json", replace(full, arm=FULL_IN_FP32)
    if not path.is_file():
        runs.run([task])
        found = runs.result(task)
        assert found is not None, "it has run"
        ours = found["measures"][str(found["steps"])]["clean"]["all"]
        rates = [step["learning_rate"] for step in found["train"]]
        theirs = _train(runs.changes(task), runs.folders(task).validation, rates)
        path.write_text(json.dumps({"megatron_sstoken": ours, "transformers": theirs}))
    both = json.loads(path.read_text())
    if abs(both["megatron_sstoken"] - both["transformers"]) > LIMIT:
        raise RuntimeError(f"full fine-tuning is not what a plain loop is: {both}")
    return both


def _train(changes: dict[str, Any], validation: Path, rates: list[float]) -> float:
    """Train on every response token; the loss on the clean held-out problems."""
    settings = settings_of(changes)
    longest = settings.data.sequence_length
    plan = plan_run(settings, 1)
    model = AutoModelForCausalLM.from_pretrained(settings.model.hf_path, dtype=torch.float32)
    betas = settings.optimizer.beta1, settings.optimizer.beta2
    optimizer = torch.optim.AdamW(model.parameters(), betas=betas, eps=settings.optimizer.epsilon, weight_decay=0.0)
    model.train()
    store, order = plan.train.store, plan.train.order
    size = settings.training.global_batch_size
    packs = [order.pack(number) for number in range(plan.num_packs)]
    for step, rate in enumerate(tqdm(rates, "transformers")):
        samples = np.concatenate(packs[size * step : size * (step + 1)])
        losses = [_losses(model, store, int(index), longest) for index in samples]
        count = sum(len(one) for one in losses)
        (torch.cat(losses).sum() / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    store = SampleStore(validation)
    with torch.no_grad():
        return float(torch.cat([_losses(model, store, index, longest) for index in range(len(store))]).double().mean())


def _losses(model: torch.nn.Module, store: SampleStore, index: int, longest: int) -> torch.Tensor:
    """fp32 [response tokens]: the losses of a sample, of its first `longest` tokens."""
    tokens = torch.from_numpy(store.tokens(index, longest).astype(np.int64))
    response = torch.from_numpy(store.roles(index, longest) == 1)[1:]
    losses = F.cross_entropy(model(tokens.unsqueeze(0)).logits[0, :-1], tokens[1:], reduction="none")
    return losses[response]
