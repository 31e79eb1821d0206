#!/usr/bin/env python3
"""Convert checkpoints: Hugging Face folders to megatron's format and back."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sstoken.conversion.hf import from_hf, to_hf  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="megatron checkpoint → Hugging Face folder")
    export.add_argument("--checkpoint", required=True, help="checkpoint folder, or a directory of them (the newest)")
    export.add_argument("--hf", help="folder to copy config and tokenizer from (default: where training started)")
    export.add_argument("--merge", action="store_true", help="of a LoRA run: the whole model, adapters merged in")
    importing = commands.add_parser("from-hf", help="Hugging Face folder → megatron checkpoint, for any layout")
    importing.add_argument("--hf", required=True, help="Hugging Face folder with safetensors")
    for command in (export, importing):
        command.add_argument("--output", required=True, help="folder to write")
        command.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        if options.command == "to-hf":
            written = to_hf(
                options.checkpoint,
                options.output,
                hf_path=options.hf,
                overwrite=options.overwrite,
                merge=options.merge,
            )
        else:
            written = from_hf(options.hf, options.output, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
