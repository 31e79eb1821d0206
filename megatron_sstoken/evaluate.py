"""How many questions of a file a model answers right: greedy, batched, with a 95 % interval; also two models side by side."""

import argparse
import sys
from collections.abc import Callable

from megatron_sstoken.tool import HelpFormatter, add_debug, run_tool

EPILOG = """--match final compares the number after the last ####, else in the last \\boxed{}, else the last one: GSM8K's
answers, and those of models that were not asked for a form. last_number compares the last one always, text the whole text. $,
commas, and zeros at the end of decimals do not count."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from megatron_sstoken.talk.marking import MATCHES
    from megatron_sstoken.talk.options import add_model, add_prompt, add_questions

    parser = argparse.ArgumentParser(
        prog="python -m megatron_sstoken.evaluate", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter
    )
    add_model(parser)
    group = parser.add_argument_group("questions")
    group.add_argument("--data", required=True, metavar="PATH", help="rows with question and answer, as JSON lines")
    add_questions(group, "--data")
    group.add_argument("--match", choices=tuple(MATCHES), default="final", help="what of an answer is compared")
    group.add_argument(
        "--compare", metavar="FOLDER", help="another model on the same questions, as the one before training"
    )
    add_prompt(parser)
    add_debug(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 for a mistake of the user, 130 interrupted."""
    options = parse_arguments(arguments)
    again = ": start the same command again to go on" if options.output else ""
    return run_tool(lambda: evaluate(options), debug=options.debug, interrupted=f"interrupted{again}")


def evaluate(options: argparse.Namespace) -> int:
    """Ask, mark and print."""
    from megatron_sstoken.talk.generation import Decoding
    from megatron_sstoken.talk.loading import ModelFolder
    from megatron_sstoken.talk.marking import MATCHES
    from megatron_sstoken.talk.options import asking, next_to, require_batch_size

    decoding = Decoding(max_new_tokens=options.max_new_tokens)
    require_batch_size(options.batch_size)
    sides = [(ModelFolder(options.model, options.adapter), options.output)]
    if options.compare:
        sides.append((ModelFolder(options.compare), next_to(options.output, "compare") if options.output else None))
    questions = _questions(options)
    compared = MATCHES[options.match]
    asked = [  # mistakes come first
        asking(
            options,
            folder,
            decoding,
            questions,
            output,
            lambda question, answer: _mark(answer.text, question.reference or "", compared),
            match=options.match,
        )
        for folder, output in sides
    ]
    found = []
    for (folder, _), ask in zip(sides, asked, strict=True):
        found.append(ask())
        print("\n".join(_describe(str(folder.name), found[-1], options)), flush=True)
    if options.compare:
        print(_compare(found, [str(folder.name) for folder, _ in sides]))
    if options.output:
        print(f"answers: {', '.join(str(output) for _, output in sides)}")
    return 0


def _questions(options: argparse.Namespace) -> list:
    """The questions, each with an answer that can be compared."""
    from megatron_sstoken.talk.marking import MATCHES
    from megatron_sstoken.talk.questions import read_questions

    read = read_questions(options.data, fields=options.fields, limit=options.limit, needs_reference=True)
    for question in read:
        if MATCHES[options.match](question.reference or "") is None:
            says = "is empty" if options.match == "text" else "holds no number: use --match text"
            raise ValueError(f"{options.data}: the answer of row {question.row} {says}")
    return [question.with_system(options.system) for question in read]


def _mark(output: str, reference: str, compared: Callable[[str], str | None]) -> dict:
    found = compared(output)
    return {"found": found, "is_right": found == compared(reference)}


def _describe(name: str, lines: list[dict], options: argparse.Namespace) -> list[str]:
    from megatron_sstoken.talk.statistics import wilson

    right, total = sum(line["is_right"] for line in lines), len(lines)
    low, high = wilson(right, total)
    told = [
        f"{name}: {right} of {total} right, {100 * right / total:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"
    ]
    if cut := sum(line["is_cut"] for line in lines):
        told.append(f"  cut after {options.max_new_tokens} tokens (--max_new_tokens): {cut}")
    if options.match != "text" and (none := sum(line["found"] is None for line in lines)):
        told.append(f"  without a number: {none}")
    return told


def _compare(found: list[list[dict]], names: list[str]) -> str:
    from megatron_sstoken.talk.statistics import mcnemar

    first, second = ([line["is_right"] for line in lines] for lines in found)
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    points = 100 * (sum(first) - sum(second)) / len(pairs)
    return (
        f"both right {pairs.count((True, True))}, only {names[0]} {only_first}, only {names[1]} {only_second}, "
        f"neither {pairs.count((False, False))}: {points:+.1f} points, p = {mcnemar(only_first, only_second):.3g} "
        "(McNemar, exact)"
    )


if __name__ == "__main__":
    sys.exit(main())
