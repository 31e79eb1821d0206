#!/usr/bin/env python3
"""What selection and soft weights cost: step time of each scope, method and weight ÷ plain fine-tuning, alternating in one
process.

    python benchmarks/scope_cost.py --work FOLDER [--rounds 12]

One process, a random Llama of 6 million parameters, rows of 512 tokens packed. Every round runs each variant once on the
same batch (forward, backward, selection; no optimizer step), so that noise of the machine hits all alike. Appends a CSV
row a variant to benchmarks/results/scope_cost.csv: median, p20 and p80 of the ratio to `full` in the same round.
"""

import argparse
import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from benchmarks.stand_ins import SHAPE, make_conversations, make_settings, make_store, save_random_model  # noqa: E402
from megatron_sstoken.history.source import open_history  # noqa: E402
from megatron_sstoken.parallel import create_layout, start_processes, stop_processes  # noqa: E402
from megatron_sstoken.selection.weights import find_weight  # noqa: E402
from megatron_sstoken.training.loop import create_trainer, model_to_train  # noqa: E402
from megatron_sstoken.training.selector import selector_of, train_on_selected  # noqa: E402
from megatron_sstoken.validate.agree import agreed_plan  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "sample": {"scope": "sample"},
    "microbatch": {"scope": "microbatch"},
    "batch": {"scope": "batch"},
}
VARIANTS |= {f"full, {weight}": {"method": "full", "weight": weight} for weight in ("power", "deft", "entropy")}


def main() -> None:
    """Measure and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for model and data")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}
    shape |= {"num_hidden_layers": 8, "max_position_embeddings": 1024}
    model = save_random_model(options.work / "model", LlamaConfig(**(SHAPE | shape)))
    data = make_store(options.work / "data", make_conversations(60, longest=400, shortest=50))
    settings = make_settings(model, data, data__packing=True, data__sequence_length=512)
    start_processes()
    plan = agreed_plan(settings)
    layout = create_layout(settings.parallel, 0)
    trainer = create_trainer(plan, layout, model_to_train(plan, layout), open_history(plan, layout))
    trainer.model.train(True)
    batches = trainer.loader.load(0)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_number in range(options.rounds + 1):  # the first one warms up
        for name, changes in VARIANTS.items():
            settings.weights.method = changes.get("weight", "none")
            settings.selection.method = changes.get("method", "sstoken")
            settings.selection.scope = changes.get("scope", "sample")
            # Plain fine-tuning measures no attention, and the head tells what is weighed by.
            trainer.model.captured_layers = () if settings.selection.method == "full" else plan.captured_layers
            for chunk in trainer.model.unwrapped:
                chunk.head = replace(chunk.head, signals=tuple(find_weight(settings.weights.method).needs))
            selector = selector_of(settings, layout, gamma=0.5, step=0)
            trainer.model.zero_gradients()
            begun = time.perf_counter()
            train_on_selected(trainer.model, batches, selector)
            if round_number:
                seconds[name].append(time.perf_counter() - begun)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    path = ROOT / "benchmarks" / "results" / "scope_cost.csv"
    header = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(
                ["commit", "torch", "variant", "rounds", "median_s", "ratio_median", "ratio_p20", "ratio_p80"]
            )
        for name, values in seconds.items():
            low, middle, high = np.quantile(np.array(values) / np.array(seconds["full"]), [0.2, 0.5, 0.8])
            row = [commit.strip(), torch.__version__, name, options.rounds, f"{np.median(values):.4f}"]
            writer.writerow([*row, f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}"])
            print(f"{name:<13} {np.median(values):.3f} s, ÷ full {middle:.3f} (p20 {low:.3f}, p80 {high:.3f})")
    stop_processes()


if __name__ == "__main__":
    main()
