"""Options that the programs which ask a model share, and what they do by them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_sstoken.folders import local_model
from megatron_sstoken.talk.answers import AnswerFile, Line, answer_all, identity_of
from megatron_sstoken.talk.generation import Answer, Decoding, Talker, load_talker
from megatron_sstoken.talk.loading import DTYPES, ModelFolder
from megatron_sstoken.talk.questions import Question


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, and where and how it is computed."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", type=local_model, required=True, help="Hugging Face folder (of to-hf), or a PEFT folder"
    )
    group.add_argument("--adapter", metavar="FOLDER", help="PEFT folder of adapters of --model")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 …; auto: the GPUs, if there are any")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the weights; auto: as they are stored")


def add_questions(group: argparse._ArgumentGroup, source: str) -> None:
    """How the file of questions that `source` names is read, and where its answers go."""
    group.add_argument("--fields", help=f"columns of {source}, as in prepare_data.py: prompt=question,response=answer")
    group.add_argument("--limit", type=int, help=f"first rows of {source}")
    group.add_argument("--batch_size", type=int, default=8, help="questions at a time")
    group.add_argument("--output", metavar="PATH", help="JSON lines with the answers; run again to go on")
    group.add_argument("--overwrite", action="store_true", help="answer everything again that --output holds")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """What is around a question, and how long its answer may be."""
    group = parser.add_argument_group("prompt")
    group.add_argument("--system", metavar="TEXT", help="system message; replaces a row's own")
    group.add_argument("--chat_template", metavar="NAME|FILE", help="template in place of the folder's")
    group.add_argument("--max_new_tokens", type=int, default=Decoding.max_new_tokens, help="longest answer, in tokens")


def load(options: argparse.Namespace, folder: ModelFolder, decoding: Decoding) -> Talker:
    """The model that the options name."""
    from megatron_sstoken.data.text.templates import find_template

    template = find_template(options.chat_template) if options.chat_template else None
    return load_talker(folder, decoding, device=options.device, dtype=options.dtype, template=template)


def asking(
    options: argparse.Namespace,
    folder: ModelFolder,
    decoding: Decoding,
    questions: Sequence[Question],
    output: str | Path | None,
    more: Callable[[Question, Answer], Line] | None = None,
    **decides: str,
) -> Callable[[], list[Line]]:
    """Check what `output` holds; returns what asks the model, if need be, and returns the lines of all questions.

    `decides`: what else the lines depend on; `more` adds to a line. Raises ValueError as `AnswerFile`.
    """
    identity = identity_of(
        weights=folder.state(),
        decoding=asdict(decoding),
        system=options.system,
        template=options.chat_template,
        **decides,
    )
    file = AnswerFile(output, identity, overwrite=options.overwrite)
    file.require(questions)
    return lambda: answer_all(
        lambda: load(options, folder, decoding),
        questions,
        file,
        batch_size=options.batch_size,
        title=str(folder.name),
        more=more,
    )


def require_batch_size(size: int) -> None:
    """Raise ValueError for a number of questions at a time that cannot be."""
    if size < 1:
        raise ValueError(f"--batch_size {size} must be at least 1")


def next_to(path: str | Path, mark: str) -> Path:
    """`answers.jsonl` and `compare` → `answers.compare.jsonl`."""
    path = Path(path)
    return path.with_name(f"{path.stem}.{mark}{path.suffix}")
