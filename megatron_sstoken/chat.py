"""Talk to a model: in a terminal, a few questions from the command line, or a file of them."""

import argparse
import json
import sys

from megatron_sstoken.tool import HelpFormatter, add_debug, run_tool

EPILOG = """Without --prompt and --file each line of the standard input is a turn of one conversation; in it, /new begins
another one, and /quit, Ctrl-D or Ctrl-C ends. --file reads the rows that prepare_data.py reads, and rows with a prompt or a
question alone; of a conversation the last answer is left out and given anew."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from megatron_sstoken.talk.options import add_model, add_prompt, add_questions

    parser = argparse.ArgumentParser(
        prog="python -m megatron_sstoken.chat", description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter
    )
    add_model(parser)
    asking = parser.add_argument_group("questions")
    asking.add_argument("--prompt", nargs="+", metavar="TEXT", help="questions, each in a conversation of its own")
    asking.add_argument("--file", metavar="PATH", help="file of questions, as JSON lines")
    add_questions(asking, "--file")
    add_prompt(parser)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token (greedy)")
    sampling.add_argument("--top_p", type=float, default=1.0, help="share of probability that is drawn from")
    sampling.add_argument("--seed", type=int, default=0, help="of what is drawn")
    add_debug(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 for a mistake of the user, 130 interrupted."""
    options = parse_arguments(arguments)
    again = ": start the same command again to go on" if options.output else ""
    return run_tool(lambda: chat(options), debug=options.debug, interrupted=f"interrupted{again}")


def chat(options: argparse.Namespace) -> int:
    """Answer what the options ask."""
    from megatron_sstoken.talk.generation import Decoding
    from megatron_sstoken.talk.loading import ModelFolder
    from megatron_sstoken.talk.options import load, require_batch_size

    decoding = Decoding(options.temperature, options.top_p, options.max_new_tokens, options.seed)
    require_batch_size(options.batch_size)
    _require_one_place(options)
    folder = ModelFolder(options.model, options.adapter)
    if options.file is not None:
        _answer_file(options, folder, decoding)
        return 0
    talker = load(options, folder, decoding)
    if options.prompt is not None:
        for number, text in enumerate(options.prompt):
            if len(options.prompt) > 1:
                print(f"{'' if not number else chr(10)}> {text}")
            _say(talker, [*_system(options), {"role": "user", "content": text}])
        return 0
    _converse(talker, options)
    return 0


def _require_one_place(options: argparse.Namespace) -> None:
    if options.file is not None and options.prompt is not None:
        raise ValueError("--prompt and --file cannot both be given: write the prompts into the file")
    if options.file is None:
        for name in ("output", "fields", "limit"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name} belongs to --file: name a file of questions")


def _answer_file(options: argparse.Namespace, folder, decoding) -> None:
    from megatron_sstoken.talk.options import asking
    from megatron_sstoken.talk.questions import read_questions

    questions = [
        question.with_system(options.system)
        for question in read_questions(options.file, fields=options.fields, limit=options.limit)
    ]
    lines = asking(options, folder, decoding, questions, options.output)()
    if options.output is None:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))
        return
    print(f"written: {options.output} ({len(lines)} answers)")


def _converse(talker, options: argparse.Namespace) -> None:
    """Turn by turn, until the input ends; the context grows by each."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _note(f"{options.model}: /new begins another conversation; /quit, Ctrl-D or Ctrl-C ends")
    messages = _system(options)
    while (text := _next_line(is_terminal)) is not None:
        if not text.strip():
            continue
        if text.strip() == "/new":
            messages = _system(options)
            continue
        if text.strip() == "/quit":
            return
        messages = [*messages, {"role": "user", "content": text}]
        try:
            said = _say(talker, messages)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            messages.pop()
            print()
            _note("stopped: the question is forgotten")
            continue
        messages.append({"role": "assistant", "content": said})


def _next_line(is_terminal: bool) -> str | None:
    if not is_terminal:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        return input("\n> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _say(talker, messages: list[dict]) -> str:
    """Print an answer as it comes; it is also returned."""
    from megatron_sstoken.talk.generation import Request

    answer = talker.answer(Request(messages), lambda text: print(text, end="", flush=True))
    print(flush=True)
    if answer.is_cut:
        _note(f"(cut after {talker.decoding.max_new_tokens} tokens: --max_new_tokens)")
    return answer.text


def _system(options: argparse.Namespace) -> list[dict]:
    return [{"role": "system", "content": options.system}] if options.system else []


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
