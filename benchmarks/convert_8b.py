#!/usr/bin/env python3
"""Conversion of a synthetic 8B-shaped Llama both ways: bits, peak memory, and rate beside a plain copy.

    python benchmarks/convert_8b.py --work FOLDER [--layers 32] [--rounds 1] [--max_memory 3GB] [--workers 2]

Writes Llama-3.1-8B's shapes with random bf16 weights (16 GB, shard by shard), converts them with tools/convert_checkpoint.py
from-hf and to-hf, each right after a plain `cp` of the same files (both with an empty page cache for what they read, both
timed until the bytes are on disk), and compares every tensor bit by bit. Needs 64 GB of disk (16 of them for the copies,
each deleted at once); fewer --layers need less. Appends a CSV row a measurement to benchmarks/results/convert_8b.csv.
Seconds are those of the whole program, its start included. Memory is sampled every 20 ms from /proc: `peak_rss`
counts pages of mapped files, `peak_anonymous` does not; both contain Python, torch and megatron (about 0.5 GB).
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_sstoken.conversion.safetensors_files import INDEX, ShardWriter, index_text, plan_shards  # noqa: E402
from megatron_sstoken.model.families import read_architecture  # noqa: E402
from megatron_sstoken.model.weight_files import HuggingFaceWeights  # noqa: E402
from megatron_sstoken.model.weights import expected_shape  # noqa: E402

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
COLUMNS = (
    "commit torch date layers gigabytes what seconds gb_per_s copy_gb_per_s peak_rss_gb peak_anonymous_gb max_memory "
    "workers"
)


def make_model(folder: Path, layers: int) -> int:
    """Write configuration and random weights in files of at most 5 GB; returns their bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2))
    architecture = read_architecture(str(folder))
    names = [
        pattern.format(layer=layer)
        for rule in architecture.weight_rules()
        for layer in range(layers if "{layer}" in rule.megatron else 1)
        for pattern in rule.hugging_face
    ]
    shapes = {name: torch.Size(expected_shape(name, architecture)) for name in sorted(names)}
    shards = plan_shards(shapes, torch.bfloat16, 5 * 10**9)
    generator = np.random.default_rng(0)
    for shard in shards:
        writer = ShardWriter(folder, shard)
        for name in shard.places:
            bits = generator.integers(0, 1 << 16, shapes[name].numel(), dtype=np.uint16)
            bits &= 0xBFFF  # below 2, never infinite
            writer.write(name, torch.from_numpy(bits).view(torch.bfloat16).reshape(shapes[name]))
        os.fsync(writer.descriptor)
        writer.close()
    if len(shards) > 1:
        (folder / INDEX).write_text(index_text(shards))
    return sum(shard.size for shard in shards)


def forget(folder: Path) -> None:
    """Ask the system to drop the files of a folder from its page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_seconds(source: Path, target: Path) -> float:
    """Seconds that `cp` takes, until the bytes are on disk. The copy is deleted."""
    forget(source)
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def run_measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds, peak resident GB and peak anonymous GB of a command."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    resident = anonymous = 0
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            resident = max(resident, int(status.get("VmHWM", "0 kB").split()[0]))
            anonymous = max(anonymous, int(status.get("RssAnon", "0 kB").split()[0]))
        except (FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return time.perf_counter() - begun, resident * 1024 / 1e9, anonymous * 1024 / 1e9


def compare(first: Path, second: Path) -> int:
    """Number of tensors, after checking that both folders hold the same bits under the same names."""
    one, other = HuggingFaceWeights(str(first)), HuggingFaceWeights(str(second))
    if one.names() != other.names():
        raise SystemExit(f"names differ: {sorted(set(one.names()) ^ set(other.names()))}")
    for name in one.names():
        left, right = one.slice(name)[:], other.slice(name)[:]
        if left.dtype != right.dtype or not torch.equal(left.view(torch.int16), right.view(torch.int16)):
            raise SystemExit(f"{name} differs")
        del left, right
        one.close()
        other.close()
    return len(one.names())


def main() -> None:
    """Measure and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files, deleted at the end")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max_memory", default="3GB")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    model, megatron, back = (options.work / name for name in ("model", "megatron", "back"))
    size = make_model(model, options.layers)
    print(f"{size / 1e9:.2f} GB written", flush=True)
    tool = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    settings = ["--max_memory", options.max_memory, "--workers", str(options.workers)]
    commands = {
        "from-hf": (model, [*tool, "from-hf", "--hf", str(model), "--output", str(megatron), *settings]),
        "to-hf": (megatron, [*tool, "to-hf", "--checkpoint", str(megatron), "--output", str(back), *settings]),
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    rows = []
    for _ in range(options.rounds):
        for output in (megatron, back):
            shutil.rmtree(output, ignore_errors=True)
        for what, (source, command) in commands.items():
            copying = copy_seconds(source, options.work / "copy")
            forget(source)
            seconds, resident, anonymous = run_measured(command)
            print(
                f"{what}: {seconds:.1f} s, {size / 1e9 / seconds:.2f} GB/s (cp {size / 1e9 / copying:.2f} GB/s), "
                f"peak resident {resident:.2f} GB, anonymous {anonymous:.2f} GB",
                flush=True,
            )
            rates = [f"{size / 1e9 / one:.3f}" for one in (seconds, copying)]
            memory = [f"{resident:.2f}", f"{anonymous:.2f}", options.max_memory, options.workers]
            now = time.strftime("%Y-%m-%d")
            start = [commit.strip(), torch.__version__, now, options.layers, f"{size / 1e9:.2f}", what]
            rows.append([*start, f"{seconds:.1f}", *rates, *memory])
    print(f"{compare(model, back)} tensors, all bit-identical", flush=True)
    path = ROOT / "benchmarks" / "results" / "convert_8b.csv"
    header = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(COLUMNS.split())
        writer.writerows(rows)
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
