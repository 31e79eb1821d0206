#!/usr/bin/env python3
"""Time and peak memory of the report of a run with many token records.

    python benchmarks/report_scale.py [--tokens 10_000_000] [--files 20] [--length 500] [--vocabulary 128_000] [--watched 16]

Writes records as training does, a row group a step, with texts: losses, scores and a selection per sample that are drawn at
random, and token ids as frequent as words are. Then makes the page, and the ranked samples, each in a process of its own, and
reads that process's peak memory from the system. Nothing else that the process does is left out: imports count.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_sstoken.config import Settings  # noqa: E402
from megatron_sstoken.files import format_bytes  # noqa: E402
from megatron_sstoken.training.records import SCHEMA  # noqa: E402

TEXT = pa.field("text", pa.dictionary(pa.int32(), pa.string()))
RHO = 0.6
SCHEMA_WITH_TEXT = SCHEMA if "text" in SCHEMA.names else SCHEMA.append(TEXT)


def make_step(path: Path, samples: np.ndarray, length: int, vocabulary: int, texts: pa.Array, seed: int) -> None:
    """Records of some samples, each of `length` tokens, the first third of them context."""
    chance = np.random.default_rng(seed)
    count = len(samples) * length
    position = np.tile(np.arange(length), len(samples))
    response = position >= length // 3
    score = chance.random((len(samples), length), dtype=np.float32)
    score[:, : length // 3] = np.nan
    kept = int(np.ceil(RHO * (length - length // 3)))
    threshold = -np.sort(-np.nan_to_num(score, nan=-1), axis=1)[:, kept - 1]
    token = np.minimum(chance.zipf(1.2, count), vocabulary) - 1
    loss = chance.gamma(0.5, 1.5, count)
    undefined = np.full(count, np.nan)
    columns = {
        "sample": np.repeat(samples, length),
        "position": position,
        "token": token,
        "role": response,
        "loss": np.where(response, loss, np.nan),
        "history_loss": np.where(response, loss + chance.normal(0.1, 0.3, count), np.nan),
        "rel_norm": np.where(response, chance.random(count), np.nan),
        "attention": np.where(response, chance.random(count), np.nan),
        "score": score.ravel(),
        "selected": (score >= threshold[:, None]).ravel(),
        "weight": undefined,
        "entropy": np.where(response, chance.gamma(1.0, 1.0, count), np.nan),
        "top1": np.where(response, chance.random(count), np.nan),
    }
    arrays = [
        pa.DictionaryArray.from_arrays(pa.array(token, pa.int32()), texts)
        if field.name == "text"
        else pa.array(columns[field.name].astype(field.type.to_pandas_dtype()), from_pandas=True)
        for field in SCHEMA_WITH_TEXT
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=SCHEMA_WITH_TEXT), path, compression="zstd", row_group_size=count
    )


def make_run(folder: Path, options: argparse.Namespace) -> None:
    """A run folder: records, watched samples, metrics and settings."""
    texts = pa.array([f" word{number}" for number in range(options.vocabulary)])
    per_file = options.tokens // options.files // options.length
    lines = []
    for number in range(1, options.files + 1):
        first = (number - 1) * per_file
        name, arguments = f"step_{10 * number:07d}.parquet", (options.length, options.vocabulary, texts, number)
        make_step(folder / "logs" / "records" / name, np.arange(first, first + per_file), *arguments)
        if options.watched:
            make_step(folder / "logs" / "watched" / name, np.arange(options.watched), *arguments)
        lines.append(json.dumps({"step": 10 * number, "loss/validation": 2 / number, "loss/all": 2.1 / number}))
    (folder / "logs" / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start = {"settings": asdict(Settings())}
    (folder / "run.json").write_text(json.dumps({"format": 1, "starts": [start]}), encoding="utf-8")


def measure(arguments: list[str]) -> tuple[float, float, int]:
    """Wall-clock and processor seconds, and peak resident bytes, of the program in a process of its own."""
    command = [sys.executable, "-m", "megatron_sstoken.report", *arguments]
    before, begun, peak = os.times(), time.perf_counter(), 0
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}) as child:
        # The kernel's own peak; what `wait4` tells holds the peak of the process that started it, too.
        while child.poll() is None:
            with suppress(OSError, ValueError):
                status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
                peak = max(peak, 1024 * int(status.partition("VmHWM:")[2].split()[0] if "VmHWM:" in status else 0))
            time.sleep(0.02)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {child.returncode}")
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begun, processor, peak


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("tokens", 10_000_000),
        ("files", 20),
        ("length", 500),
        ("vocabulary", 128_000),
        ("watched", 16),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        make_run(run, options)
        size = sum(path.stat().st_size for path in run.rglob("*.parquet"))
        print(f"{options.tokens:,} tokens in {options.files} files of records, {format_bytes(size)}", flush=True)
        for option, name in (("--output", "page.html"), ("--export", "samples.jsonl")):
            target = Path(folder, name)
            seconds, processor, peak = measure(["--run", str(run), option, str(target)])
            print(
                f"{option}: {seconds:.1f} s ({processor:.1f} s of processor), peak memory {format_bytes(peak)}; "
                f"wrote {format_bytes(target.stat().st_size)}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
