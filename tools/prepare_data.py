#!/usr/bin/env python3
"""Tokenise conversations (JSON lines) into a folder that training reads."""

import argparse
import os
import signal
import sys
from pathlib import Path

try:
    import megatron_sstoken  # noqa: F401
except ModuleNotFoundError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sstoken.data.prepare import default_workers, prepare, summary
from megatron_sstoken.data.recipe import FieldNames, Recipe
from megatron_sstoken.data.templates import template_names
from megatron_sstoken.tool import add_debug, run_tool

ROWS = """input rows: messages or conversations (role and content, or from and value), prompt and completion (texts, or
lists of messages), prompt, query or question and response, question and answer, input and output, instruction and output or
response (Alpaca, Dolly), or the columns named by --fields. docs/data.md has a row of each."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=ROWS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE.jsonl", help="files, read in this order")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder, or sentencepiece .model file")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument(
        "--chat_template",
        metavar="NAME|FILE",
        help=f"template to use instead of the tokenizer's: a Jinja file, or one of {', '.join(template_names())}",
    )
    parser.add_argument(
        "--fields",
        help="columns: prompt=question,response=answer[,system=rules], or messages=dialog[,role=from][,content=value]",
    )
    parser.add_argument("--workers", type=int, default=default_workers(), help="tokenising processes")
    parser.add_argument(
        "--on_bad_row",
        choices=("error", "skip"),
        default="error",
        help="stop and list the bad input rows, or skip them and write them to OUTPUT/skipped.jsonl",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an OUTPUT made by this tool and everything in it (history losses too)",
    )
    add_debug(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 for a mistake of the user."""
    options = parse_arguments(arguments)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, lambda number, _: sys.exit(128 + number))  # so that nothing is left behind
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers decides how many cores work
    return run_tool(lambda: _prepare(options), debug=options.debug)


def _prepare(options: argparse.Namespace) -> int:
    prepare(
        options.input,
        options.tokenizer,
        options.output,
        chat_template=options.chat_template,
        recipe=Recipe(fields=FieldNames.parse(options.fields) if options.fields else None),
        workers=options.workers,
        on_bad_row=options.on_bad_row,
        overwrite=options.overwrite,
    )
    print(summary(options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
