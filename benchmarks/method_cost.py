#!/usr/bin/env python3
"""What selection methods, history sources, soft weights and exploration cost: whole training steps ÷ plain fine-tuning.

    python benchmarks/method_cost.py --work FOLDER [--rounds 12]

One process, a random Llama of 10 million parameters with 16,384 words, packs of 512 tokens, 4 a step. Every variant is a run of
its own, with its own model and optimizer; each round makes the next step of every run, in turning order, so that noise of the
machine hits all alike. What is done once before training (history, files, a choice over all data) is not in the step. Runs with
adapters are compared with plain fine-tuning of adapters. Prints a table, and appends a row a variant to
benchmarks/results/method_cost.csv: median, p20 and p80 of the seconds, and of the ratio within a round.
"""

import argparse
import csv
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from benchmarks.measure import alternate  # noqa: E402
from benchmarks.stand_ins import SHAPE, make_conversations, make_settings, make_store, save_random_model  # noqa: E402
from megatron_sstoken.config import Settings  # noqa: E402
from megatron_sstoken.data.store import SampleStore  # noqa: E402
from megatron_sstoken.history.source import open_history  # noqa: E402
from megatron_sstoken.parallel import Layout, create_layout, start_processes, stop_processes  # noqa: E402
from megatron_sstoken.training.known import open_known  # noqa: E402
from megatron_sstoken.training.loop import Trainer, create_trainer, model_to_train, training_step  # noqa: E402
from megatron_sstoken.validate.agree import agreed_plan  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "method_cost.csv"
LORA = {"lora__rank": 16}
Changes = dict[str, Any]


def variants(work: Path) -> dict[str, dict[str, Changes]]:
    """Baseline → its variants: name and settings."""

    def method(name: str, **more: Any) -> Changes:
        return {"selection__method": name, **more}

    reference, scores = str(work / "reference"), str(work / "scores.parquet")
    above = {"selection__rule": "threshold", "selection__threshold": 1e-4}
    visits = {"history__source": "previous_visit", "checkpoint__directory": str(work / "visits")}
    whole = {
        "full": method("full"),
        "random": method("random"),
        "sstoken": method("sstoken"),
        "sstoken, scope batch": method("sstoken", selection__scope="batch"),
        "sstoken, explore 0.1": method("sstoken", selection__explore=0.1),
        "sstoken, previous_visit": method("sstoken", **visits),
        "sstoken, snapshot": method("sstoken", history__source="snapshot"),
        "sstoken, ema": method("sstoken", history__source="ema"),
        "rel": method("rel"),
        "attention": method("attention"),
        "rho1": method("rho1", history__hf_path=reference),
        "probability ≥ τ": method("probability", **above),
        "history_probability ≥ τ": method("history_probability", **above),
        "entropy, rho 0.2": method("entropy", selection__rho=0.2),
        "cleaning, all data": method("cleaning", selection__scope="dataset", history__reference_hf_path=reference),
        "external scores": method("external", selection__external=scores, selection__rule="top"),
    }
    whole |= {f"full × {name}": method("full", weights__method=name) for name in ("power", "deft", "entropy")}
    adapters = {
        "full, LoRA": method("full", **LORA),
        "sstoken, LoRA": method("sstoken", **LORA),
        "sstoken, LoRA, adapters_off": method("sstoken", history__source="adapters_off", **LORA),
        "sstoken, LoRA, ema": method("sstoken", history__source="ema", **LORA),
    }
    return {"full": whole, "full, LoRA": adapters}


def write_scores(path: Path, data: str) -> None:
    """A random score of every token."""
    store = SampleStore(data)
    sample = np.repeat(store.rows, store.lengths)
    position = np.concatenate([np.arange(length) for length in store.lengths])
    score = np.random.default_rng(0).random(len(sample)).astype(np.float32)
    pq.write_table(pa.table({"sample": sample, "position": position, "score": score}), path)


def started(settings: Settings, layout: Layout) -> Trainer:
    """A run before its first step."""
    plan = agreed_plan(settings)
    history = open_history(plan, layout)
    known = open_known(plan, layout, history)
    trainer = create_trainer(plan, layout, model_to_train(plan, layout), history, known=known)
    trainer.model.train(True)
    return trainer


def next_step(trainer: Trainer, numbers: "count[int]") -> None:
    """One optimizer step."""
    training_step(trainer, next(numbers))


def append_row(row: list[Any], measured: list[str]) -> None:
    """Add a row to the results."""
    header = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(["commit", "torch", "variant", "baseline", "rounds", *measured])
        writer.writerow(row)


def main() -> None:
    """Measure, print and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and data")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--baseline", help="only the group of this one: full, or 'full, LoRA'")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"vocab_size": 16384, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8}
    shape |= {"num_key_value_heads": 4, "num_hidden_layers": 8, "max_position_embeddings": 1024}
    model, _ = (
        save_random_model(options.work / name, LlamaConfig(**(SHAPE | shape)), seed=seed)
        for seed, name in enumerate(("model", "reference"))
    )
    data = make_store(options.work / "data", make_conversations(200, longest=400, shortest=50))
    write_scores(options.work / "scores.parquet", data)
    start_processes()
    layout = create_layout(make_settings(model, data).parallel, 0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    for baseline, group in variants(options.work).items():
        if options.baseline not in (None, baseline):
            continue
        runs = {}
        for name, changes in group.items():
            steps = {"training__steps": options.rounds + 1, "training__global_batch_size": 4}
            common = {"data__packing": True, "data__sequence_length": 512, **steps}
            trainer = started(make_settings(model, data, **(common | changes)), layout)
            runs[name] = partial(next_step, trainer, count())
        for name, timing in alternate(runs, options.rounds, baseline=baseline).items():
            told = timing.columns()
            append_row([commit.strip(), torch.__version__, name, baseline, options.rounds, *told.values()], [*told])
            spread = f"{told['ratio_p20']:.2f} to {told['ratio_p80']:.2f}"
            print(f"| {name} | {told['seconds']:.3f} s | {told['ratio']:.2f} ({spread}) |", flush=True)
    stop_processes()


if __name__ == "__main__":
    main()
