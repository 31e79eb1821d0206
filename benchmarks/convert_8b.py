#!/usr/bin/env python3
"""Conversion of a synthetic 8B-shaped Llama both ways: bits, peak memory, and rate beside a plain copy.

    python benchmarks/convert_8b.py --work FOLDER [--layers 32] [--hf FOLDER] [--rounds 1] [--max_memory 3GB]

Writes Llama-3.1-8B's shapes with random bf16 weights (16 GB, shard by shard), or takes the folder --hf, converts them with
tools/convert_checkpoint.py from-hf and to-hf, each right before and after a plain `cp` of the same files, and compares every
tensor bit by bit. All begin alike: none of the files in the page cache, and --pause seconds later, for the host of a virtual
machine takes back what has become free, and to get that again takes longer than to copy; all are timed until the bytes are
on disk. Needs 64 GB of disk (16 of them for the copies, each deleted at once); fewer --layers need less. Appends a CSV row a
measurement to benchmarks/results/convert_8b.csv.

`seconds` are those of the whole program, of which `work_seconds` without the imports. `cp_ratio` compares the whole program's
rate with the mean of the two copies', `work_ratio` that of the work. `cpu` are seconds of all cores. Memory is sampled every
20 ms from /proc: `peak_rss` counts pages of mapped files, `peak_anonymous` does not; both contain Python, torch and megatron
(about 0.5 GB). The converter is one process.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    "workers work_seconds cp_ratio work_ratio work_cpu copy_cpu load"
)


PROGRAM = """
import json, sys, time
from megatron_sstoken.commands.convert_checkpoint import main
begun, cpu = time.perf_counter(), time.process_time()
code = main(sys.argv[1:])
print(json.dumps({"seconds": time.perf_counter() - begun, "cpu": time.process_time() - cpu}))
sys.exit(code)
"""


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """Write configuration and random weights in files of at most 5 GB."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    architecture = read_architecture(str(folder))
    tensors = {
        name: torch.empty(expected_shape(name, architecture), dtype=torch.bfloat16, device="meta")
        for name in architecture.tensor_names()
    }
    shards = plan_shards(tensors, 5 * 10**9)
    generator = np.random.default_rng(0)
    for shard in shards:
        writer = ShardWriter(folder, shard)
        for name in shard.places:
            bits = generator.integers(0, 1 << 16, tensors[name].numel(), dtype=np.uint16)
            bits &= 0xBFFF  # below 2, never infinite
            writer.write(name, torch.from_numpy(bits).view(torch.bfloat16).reshape(tensors[name].shape))
        os.fsync(writer.descriptor)
        writer.close()
    if len(shards) > 1:
        (folder / INDEX).write_text(index_text(shards))


def forget(folders: list[Path], pause: float) -> None:
    """Ask the system to drop the files of some folders from its page cache, and wait."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    time.sleep(pause)


@dataclass(frozen=True)
class Measured:
    """What a command took."""

    seconds: float
    cpu: float
    """Seconds of all cores, of a conversion without its imports."""
    work: float = 0.0
    """Seconds of a conversion without its imports."""
    resident: float = 0.0
    anonymous: float = 0.0
    """Largest GB."""


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def copy(source: Path, target: Path) -> Measured:
    """`cp`, until the bytes are on disk. The copy is deleted."""
    begun, cpu = time.perf_counter(), _cpu_of_children()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *(path for path in target.rglob("*") if path.is_file())], check=True)
    taken = Measured(time.perf_counter() - begun, _cpu_of_children() - cpu)
    shutil.rmtree(target)
    return taken


def convert(output: Path, arguments: list[str]) -> Measured:
    """`convert_checkpoint`."""
    command = [sys.executable, "-c", PROGRAM, *arguments, "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    resident = anonymous = 0
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            resident = max(resident, int(status.get("VmHWM", "0 kB").split()[0]))
            anonymous = max(anonymous, int(status.get("RssAnon", "0 kB").split()[0]))
        except (FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(0.02)
    seconds = time.perf_counter() - begun
    told, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with exit code {process.returncode}: {errors.decode()}")
    work = json.loads(told.splitlines()[-1])
    return Measured(seconds, work["cpu"], work["seconds"], resident * 1024 / 1e9, anonymous * 1024 / 1e9)


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
    parser.add_argument("--hf", type=Path, help="Hugging Face folder to convert, in place of random weights")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max_memory", default="3GB")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=8.0, help="seconds before each (default: 8)")
    options = parser.parse_args()
    model, megatron, back = (options.work / name for name in ("model", "megatron", "back"))
    if options.hf:
        model = options.hf
        options.layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    else:
        make_model(model, CONFIG | {"num_hidden_layers": options.layers})
    options.work.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    print(f"{size / 1e9:.2f} GB", flush=True)
    settings = ["--max_memory", options.max_memory, "--workers", str(options.workers)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    rows: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for output in (megatron, back):
            shutil.rmtree(output, ignore_errors=True)
        for what, option, source, output in (
            ("from-hf", "--hf", model, megatron),
            ("to-hf", "--checkpoint", megatron, back),
        ):
            forget([model, options.work], options.pause)
            first = copy(source, options.work / "copy")
            forget([model, options.work], options.pause)
            taken = convert(output, [what, option, str(source), *settings])
            forget([model, options.work], options.pause)
            second = copy(source, options.work / "copy")
            copying, copy_cpu = (first.seconds + second.seconds) / 2, (first.cpu + second.cpu) / 2
            row = {
                "commit": commit.strip(),
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "layers": options.layers,
                "gigabytes": f"{size / 1e9:.2f}",
                "what": what,
                "seconds": f"{taken.seconds:.2f}",
                "gb_per_s": f"{size / 1e9 / taken.seconds:.3f}",
                "copy_gb_per_s": f"{size / 1e9 / copying:.3f}",
                "peak_rss_gb": f"{taken.resident:.2f}",
                "peak_anonymous_gb": f"{taken.anonymous:.2f}",
                "max_memory": options.max_memory,
                "workers": options.workers,
                "work_seconds": f"{taken.work:.2f}",
                "cp_ratio": f"{copying / taken.seconds:.3f}",
                "work_ratio": f"{copying / taken.work:.3f}",
                "work_cpu": f"{taken.cpu:.2f}",
                "copy_cpu": f"{copy_cpu:.2f}",
                "load": f"{os.getloadavg()[0]:.1f}",
            }
            print(", ".join(f"{name} {row[name]}" for name in COLUMNS.split()[5:]), flush=True)
            rows.append(row)
    print(f"{compare(model, back)} tensors, all bit-identical", flush=True)
    for what in ("from-hf", "to-hf"):
        for name in ("cp_ratio", "work_ratio"):
            found = sorted(float(row[name]) for row in rows if row["what"] == what)
            print(f"{what}: {name} {statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})", flush=True)
    write_rows(ROOT / "benchmarks" / "results" / "convert_8b.csv", rows)
    shutil.rmtree(options.work)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file; those that it holds get the columns that they lack."""
    old = []
    if path.exists():
        with open(path, newline="") as file:
            old = list(csv.DictReader(file))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS.split(), restval="")
        writer.writeheader()
        writer.writerows([*old, *rows])


if __name__ == "__main__":
    main()
