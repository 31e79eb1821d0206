"""Tokenise conversations (JSON lines or arrays, Parquet, Arrow, CSV; compressed or not) into a folder that training reads."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from megatron_sstoken.data.mixing import Plan
from megatron_sstoken.data.output import store_folders
from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.recipe import DROPPABLE, FieldNames, Recipe
from megatron_sstoken.data.show import show
from megatron_sstoken.data.summary import summary
from megatron_sstoken.data.text.templates import template_names
from megatron_sstoken.data.workers import default_workers
from megatron_sstoken.folders import local_model
from megatron_sstoken.tool import HelpFormatter, add_debug, run_tool

ROWS = """input rows: messages or conversations (role and content, or from and value), prompt and completion (texts, or
lists of messages), prompt, query or question and response, question and answer, query and answers (calls), input and
output, instruction and output or response (Alpaca, Dolly), or the columns named by --fields. docs/data.md has a row of
each."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=ROWS,
        formatter_class=HelpFormatter,
    )
    _add_input(parser.add_argument_group("input"))
    _add_samples(parser.add_argument_group("samples"))
    _add_output(parser.add_argument_group("output"))
    add_debug(parser)
    options = parser.parse_args(arguments)
    if options.show < 0:
        parser.error(f"--show={options.show} must be 0 or more")
    if options.input is None and not options.show:
        parser.error("the following argument is required: --input (or --show N, for a finished --output)")
    if options.input is not None and options.tokenizer is None:
        parser.error("the following argument is required: --tokenizer")
    return options


def _add_input(group: Any) -> None:
    group.add_argument(
        "--input",
        nargs="+",
        metavar="[NAME=]PATH",
        help="files, folders or patterns, read in this order; NAME labels their samples (needed, except to --show a folder)",
    )
    group.add_argument(
        "--fields",
        help="columns: prompt=question,response=answer[,system=rules], or messages=dialog[,role=from][,content=value]",
    )
    group.add_argument(
        "--on_bad_row",
        choices=("error", "skip"),
        default="error",
        help="stop and list the bad input rows, or skip them and write them to OUTPUT/skipped.jsonl",
    )
    group.add_argument("--workers", type=int, default=default_workers(), help="tokenising processes")


def _add_samples(group: Any) -> None:
    group.add_argument(
        "--tokenizer",
        type=local_model,
        help="Hugging Face folder, or sentencepiece .model file (needed, except to --show a folder)",
    )
    group.add_argument(
        "--chat_template",
        metavar="NAME|FILE",
        help=f"template to use instead of the tokenizer's: a Jinja file, or one of {', '.join(template_names())}",
    )
    group.add_argument(
        "--template_arguments",
        metavar="JSON",
        help="names for the chat template, such as '{\"enable_thinking\": false}'",
    )
    group.add_argument(
        "--train_turns", choices=("all", "last"), default="all", help="assistant messages that are trained on"
    )
    group.add_argument(
        "--thinking_weight", type=float, default=1.0, help="how much a token of thinking counts; 0: context"
    )
    group.add_argument(
        "--allow_dropped",
        nargs="+",
        choices=DROPPABLE,
        default=(),
        metavar="WHAT",
        help=f"what the chat template may leave out of a conversation: {', '.join(DROPPABLE)}",
    )


def _add_output(group: Any) -> None:
    group.add_argument("--output", required=True, help="folder to create")
    group.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N samples of the result, what is trained on in colour, or in « »; without --input, of a finished OUTPUT",
    )
    group.add_argument(
        "--mix",
        nargs="+",
        metavar="NAME=SHARE",
        help="shares of samples in the result, by label; the scarcest source decides how many, the rest is drawn",
    )
    group.add_argument(
        "--mix_repeat", action="store_true", help="let sources repeat, so that every sample of all is used"
    )
    group.add_argument("--split", type=float, default=0.0, help="share of samples that goes to OUTPUT/validation")
    group.add_argument("--deduplicate", action="store_true", help="keep the first of samples with the same tokens")
    group.add_argument("--seed", type=int, default=0, help="of what --mix draws")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an OUTPUT made by this tool and everything in it (history losses too)",
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 for a mistake of the user."""
    options = parse_arguments(arguments)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:
            signal.signal(ending, lambda number, _: sys.exit(128 + number))  # so that nothing is left behind
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers decides how many cores work
    return run_tool(lambda: _prepare(options), debug=options.debug)


def _prepare(options: argparse.Namespace) -> int:
    if options.input is None:
        _show(options)
        return 0
    prepare(
        options.input,
        options.tokenizer,
        options.output,
        chat_template=options.chat_template,
        recipe=_recipe(options),
        plan=Plan(
            shares=Plan.parse_shares(options.mix) if options.mix else None,
            repeat=options.mix_repeat,
            split=options.split,
            deduplicate=options.deduplicate,
            seed=options.seed,
        ),
        workers=options.workers,
        on_bad_row=options.on_bad_row,
        overwrite=options.overwrite,
    )
    print(summary(options.output))
    _show(options)
    return 0


def _show(options: argparse.Namespace) -> None:
    """Print samples of OUTPUT; of `train` where it holds that and `validation`."""
    folder = (store_folders(Path(options.output)) or [options.output])[0]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if not options.show:
        return
    try:
        for text in show(folder, options.show, tokenizer=options.tokenizer, colour=colour):
            print(f"\n{text}", flush=True)
    except BrokenPipeError:  # the reader has seen enough: `| head`. Python must not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _recipe(options: argparse.Namespace) -> Recipe:
    if not 0 <= options.thinking_weight < float("inf"):
        raise ValueError(f"--thinking_weight: {options.thinking_weight} must be at least 0")
    return Recipe(
        fields=FieldNames.parse(options.fields) if options.fields else None,
        turns=options.train_turns,
        thinking_weight=options.thinking_weight,
        allow_dropped=frozenset(options.allow_dropped),
        template_arguments=_template_arguments(options.template_arguments),
    )


def _template_arguments(text: str | None) -> dict[str, Any]:
    try:
        content = json.loads(text or "{}")
    except ValueError as error:
        raise ValueError(f"--template_arguments: {text!r} is not JSON ({error}): give an object in quotes") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--template_arguments: {text!r} must be a JSON object, such as '{{\"enable_thinking\": false}}'"
        )
    return content


if __name__ == "__main__":
    sys.exit(main())
