#!/usr/bin/env python3
"""Convert checkpoints: Hugging Face folders to megatron's format and back, and prove that it was done right."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sstoken.config import ParallelSettings  # noqa: E402
from megatron_sstoken.conversion.hf import from_hf, to_hf  # noqa: E402
from megatron_sstoken.conversion.verify import REAL_TEXT, verify  # noqa: E402
from megatron_sstoken.parallel import processes_problem  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="megatron checkpoint → Hugging Face folder")
    export.add_argument("--checkpoint", required=True, help="checkpoint folder, or a directory of them (the newest)")
    export.add_argument("--hf", help="folder to copy config and tokenizer from (default: where training started)")
    importing = commands.add_parser("from-hf", help="Hugging Face folder → megatron checkpoint, for any layout")
    importing.add_argument("--hf", required=True, help="Hugging Face folder with safetensors")
    for command in (export, importing):
        command.add_argument("--output", required=True, help="folder to write")
        command.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    _add_verify(commands)
    return parser.parse_args(arguments)


def _add_verify(commands) -> None:
    proof = commands.add_parser(
        "verify",
        help="compare tensors and logits with transformers; exit code 1 where they differ",
        description="Proves that a folder and megatron's model of it are the same: every tensor bit for bit, and the logits "
        "at every position. With several processes: torchrun --nproc-per-node N tools/convert_checkpoint.py verify …",
    )
    proof.add_argument("--hf", required=True, help="Hugging Face folder")
    proof.add_argument("--checkpoint", help="megatron checkpoint that must hold the same weights (default: --hf converted)")
    for name in ("tensor", "pipeline", "expert"):
        proof.add_argument(f"--{name}", type=int, default=1, help=f"{name} parallel size of the layout to prove (default: 1)")
    proof.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of logits (default: 1e-4)")
    proof.add_argument("--positions", type=int, help="tokens of each text (default: 256, or more than the sliding window)")
    proof.add_argument("--text", type=Path, help="UTF-8 file with the real text (default: some lines of our own)")


def run_verify(options: argparse.Namespace) -> int:
    """Exit code 0 if nothing differs, else 1; the findings are printed by rank 0."""
    parallel = ParallelSettings(tensor=options.tensor, pipeline=options.pipeline, expert=options.expert)
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size % (parallel.tensor * parallel.pipeline):
        raise ValueError(processes_problem(parallel, world_size))
    text = options.text.read_text(encoding="utf-8") if options.text else REAL_TEXT
    result = verify(
        options.hf,
        checkpoint=options.checkpoint,
        parallel=parallel,
        tolerance=options.tolerance,
        positions=options.positions,
        text=text,
    )
    if rank == 0:
        print(result.describe())
        print("verified" if result.passed else "NOT THE SAME: see above", flush=True)
    return 0 if result.passed else 1


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        if options.command == "verify":
            return run_verify(options)
        if options.command == "to-hf":
            written = to_hf(options.checkpoint, options.output, hf_path=options.hf, overwrite=options.overwrite)
        else:
            written = from_hf(options.hf, options.output, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
