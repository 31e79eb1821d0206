#!/usr/bin/env python3
"""Step time on one GPU: plain fine-tuning against ssToken, alternately in one run, in bf16 and each FP8 recipe.

    python benchmarks/gpu_step.py [--minutes 7.5]         # everything worth measuring on one Hopper GPU, most telling first
    python benchmarks/gpu_step.py --tiny --device cpu     # the same code on a small model, to see that it runs

Random Llamas of the real shapes (of 8B half the layers: the optimizer state of all does not fit), rows packed with
stand-in data. Every round runs each method once on the same batch, with the optimizer's step. Writes a CSV row a
measurement and a Markdown table into --output. What the time does not suffice for is left out, and said.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

METHODS = ("full", "random", "sstoken")
"""Plain fine-tuning; selection alone; selection and attention scores."""
SHAPES = {"8B, half the layers": ("Llama-3.1-8B", 16), "1B": ("Llama-3.2-1B", 16), "3B": ("Llama-3.2-3B", 28)}
Precision = Literal["fp32", "bf16", "fp8"]
Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
NUMERICS: tuple[tuple[Precision, Recipe | None], ...] = (
    ("bf16", None),
    ("fp8", "tensorwise"),
    ("fp8", "blockwise"),
    ("fp8", "delayed"),
)
LENGTHS = (4096, 2048, 8192)
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


class ConstantHistory:
    """History losses for timing: their values do not matter, only that there are some."""

    def values(self, start, stop):
        import numpy as np

        return np.full(stop - start, 2.0, dtype=np.float32)


def matmul_ceiling(size: int) -> float:
    """TFLOP/s of a bf16 matrix product of `size`, the fastest of several: what this device can do at most."""
    import torch

    from megatron_sstoken.device import compute_device, synchronize

    a = torch.randn(size, size, dtype=torch.bfloat16, device=compute_device())
    best = float("inf")
    for _ in range(8):
        synchronize()
        begun = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best / 1e12


def make_case(folder: Path, shape: str, length: int, numerics: tuple[Precision, Recipe | None], tiny: bool):
    """Settings of one measurement; writes config.json and data where they are missing."""
    from megatron_sstoken.config import Settings
    from megatron_sstoken.model.presets import model_config
    from tools.make_config import make_stand_in_data

    name, layers = SHAPES[shape]
    config = model_config(name) | ({**TINY, "num_hidden_layers": 2, "vocab_size": 512} if tiny else {})
    model = folder / f"{name}-{layers}"
    model.mkdir(parents=True, exist_ok=True)
    config["num_hidden_layers"] = 2 if tiny else layers
    (model / "config.json").write_text(json.dumps(config))
    data = folder / "data"
    if not data.exists():
        make_stand_in_data(data, 200, vocabulary_size=config["vocab_size"])
    settings = Settings()
    settings.model.hf_path, settings.data.train = str(model), str(data)
    settings.data.sequence_length = length
    settings.training.micro_batch_size, settings.training.global_batch_size = (
        max(8192 // length, 1),
        max(8192 // length, 1),
    )
    settings.training.precision, recipe = numerics
    settings.training.fp8_recipe = recipe or settings.training.fp8_recipe
    settings.training.steps = 100
    return settings


def randomize(model) -> None:
    """Weights as a fresh model's, the same for all numerics."""
    import torch

    torch.manual_seed(0)
    for chunk in model.unwrapped:
        for name, parameter in chunk.named_parameters():
            with torch.no_grad():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)


def measure(settings, rounds: int) -> list[dict]:
    """Rows of one shape, length and numerics: a method each."""
    import torch

    from megatron_sstoken.data.batches import BatchLoader
    from megatron_sstoken.device import have_cuda, peak_memory_bytes, synchronize
    from megatron_sstoken.model.backend import numerics_of
    from megatron_sstoken.model.build import build_model
    from megatron_sstoken.model.optimizer import build_optimizer
    from megatron_sstoken.parallel import create_layout
    from megatron_sstoken.training.metrics import training_flops
    from megatron_sstoken.training.selector import selector_of, train_on_selected
    from megatron_sstoken.validate.run import plan_run

    plan = plan_run(settings, 1, dry_run=True)  # a dry run: these models have no weights on disk
    layout = create_layout(settings.parallel, 0)
    model = build_model(plan.architecture, settings, layout, captured_layers=plan.captured_layers, trainable=True)
    randomize(model)
    optimizer, _ = build_optimizer(model, settings.optimizer, 100)
    loader = BatchLoader(
        plan.train.store, plan.train.order, plan.shape, data_rank=0, num_packs=plan.num_packs, history=ConstantHistory()
    )
    batches = loader.load(0)
    positions = sum(batch.tokens.numel() for batch in batches)
    flops = sum(training_flops(batch, plan.architecture) for batch in batches)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    memory = dict.fromkeys(METHODS, 0)
    for round_number in range(rounds + 2):  # two warm up
        for method in METHODS:
            settings.selection.method = method
            model.captured_layers = plan.captured_layers if method == "sstoken" else ()
            if have_cuda():
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            begun = time.perf_counter()
            model.zero_gradients()
            optimizer.zero_grad()
            train_on_selected(model, batches, selector_of(settings, layout, gamma=0.5, step=round_number))
            optimizer.step()
            synchronize()
            memory[method] = max(memory[method], peak_memory_bytes())
            if round_number > 1:
                seconds[method].append(time.perf_counter() - begun)
    plain = statistics.median(seconds["full"])
    return [
        {
            "numerics": numerics_of(settings),
            "method": method,
            "median_s": statistics.median(values),
            "ratio_to_full": statistics.median(v / f for v, f in zip(values, seconds["full"], strict=True)),
            "tokens_per_s": positions / statistics.median(values),
            "tflops": flops / statistics.median(values) / 1e12,
            "peak_gib": memory[method] / 2**30,
            "rounds": rounds,
            "full_s": plain,
        }
        for method, values in seconds.items()
    ]


def release_memory() -> None:
    """Let go of the last model and the process groups it was made for."""
    import gc

    import torch

    from megatron_sstoken.parallel import reset_layout

    reset_layout()
    gc.collect()
    torch.cuda.empty_cache()


def cases(tiny: bool) -> list[tuple[str, int, tuple[Precision, Recipe | None]]]:
    """(shape, length, numerics), the most telling first: FP8 at one length, other lengths in bf16 only."""
    if tiny:
        return [("8B, half the layers", 256, ("bf16", None)), ("1B", 128, ("fp32", None))]
    first = [(shape, LENGTHS[0], numerics) for shape, numerics in itertools.product(SHAPES, NUMERICS)]
    first.sort(key=lambda case: NUMERICS.index(case[2]) > 1)  # bf16 and one recipe everywhere before the others
    return first + [(shape, length, NUMERICS[0]) for shape in SHAPES for length in LENGTHS[1:]]


def main() -> int:
    """Measure until the time is up; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers, on torch if there is no GPU")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["SSTOKEN_DEVICE"] = "cpu"
    begun = time.monotonic()
    import torch

    from megatron_sstoken.device import have_cuda
    from megatron_sstoken.model.backend import machine_problems
    from megatron_sstoken.parallel import start_processes, stop_processes

    if options.device == "cuda" and not have_cuda():
        print("skipped: this machine has no CUDA device; --tiny --device cpu shows that the program runs")
        return 0
    start_processes()
    ceiling = matmul_ceiling(256 if options.tiny else 8192)
    print(f"matrix product ceiling: {ceiling:.4g} TFLOP/s bf16")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape, length, numerics in cases(options.tiny):
            what = f"{shape}, packs of {length}, {' '.join(filter(None, numerics))}"
            settings = make_case(Path(folder), shape, length, numerics, options.tiny)
            if time.monotonic() - begun > 60 * options.minutes:
                print(f"left out, no time: {what}")
            elif problems := machine_problems(settings):
                print(f"left out: {what}: {problems[0]}")
            else:
                try:
                    measured = measure(settings, options.rounds)
                except torch.OutOfMemoryError:
                    print(f"left out, more memory than this GPU has: {what}", flush=True)
                    continue
                finally:
                    release_memory()
                found = [row | {"of_ceiling": row["tflops"] / ceiling} for row in measured]
                rows += [{"shape": shape, "length": length} | row for row in found]
                print(f"{what}: " + ", ".join(f"{row['method']} {row['median_s']:.3f} s" for row in found), flush=True)
    stop_processes()
    write_results(rows, options.output)
    return 0


def write_results(rows: list[dict], folder: Path) -> None:
    """gpu_step.csv and gpu_step.md in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    with open(folder / "gpu_step.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["device", "torch", *rows[0]])
        writer.writeheader()
        writer.writerows({"device": device, "torch": torch.__version__} | row for row in rows)
    columns = (
        "shape",
        "length",
        "numerics",
        "method",
        "tokens_per_s",
        "tflops",
        "of_ceiling",
        "ratio_to_full",
        "peak_gib",
    )
    lines = [f"{device}, torch {torch.__version__}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    (folder / "gpu_step.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
