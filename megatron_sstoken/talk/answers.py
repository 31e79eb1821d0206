"""Answers to many questions, written as they come; a stopped run goes on with those that are missing."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron_sstoken.files import existing_above
from megatron_sstoken.talk.generation import Answer, Talker
from megatron_sstoken.talk.questions import Question

Line = dict[str, Any]
"""row, question, reference, output, is_cut, run; and what the program adds."""


def identity_of(**what: Any) -> str:
    """A name for everything that decides the answers: the weights, the decoding, the messages around the questions."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


class AnswerFile:
    """JSON lines, one for each question, in the order of the rows; `path` None: nowhere but in memory."""

    def __init__(self, path: str | Path | None, identity: str, *, overwrite: bool = False):
        """Raises ValueError where the file holds something else, or its folder cannot be written to."""
        self._path, self.identity = Path(path) if path is not None else None, identity
        self.lines: dict[int, Line] = {}
        if self._path is None:
            return
        if self._path.is_dir():
            raise ValueError(f"--output {self._path} is a folder: name a file, as {self._path / 'answers.jsonl'}")
        if not os.access(existing_above(self._path), os.W_OK):
            raise ValueError(f"--output {self._path} cannot be written: name another file")
        if self._path.exists() and not overwrite:
            self.lines = {line["row"]: line for line in self._read()}
        elif self._path.exists():
            self._path.unlink()

    def require(self, questions: Sequence[Question]) -> None:
        """Raise ValueError where an answer that is there belongs to another question."""
        for question in questions:
            line = self.lines.get(question.row)
            if line is not None and line["question"] != question.text:
                raise ValueError(f"{self._other('another question')} (row {question.row})")

    @contextmanager
    def appending(self) -> Iterator[Callable[[Line], None]]:
        """Within, a function that adds a line, which is in the file when it returns."""
        with self._open() as file:

            def add(line: Line) -> None:
                self.lines[line["row"]] = line
                if file is not None:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    file.flush()

            yield add

    @contextmanager
    def _open(self) -> Iterator[TextIO | None]:
        if self._path is None:
            yield None
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            yield file

    def _read(self) -> Iterator[Line]:
        assert self._path is not None
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a run that was killed may have left half a line
        for text in whole.splitlines():
            try:
                line = json.loads(text)
                matches = line["run"] == self.identity and isinstance(line["row"], int)
            except (ValueError, KeyError, TypeError):
                matches = False
            if not matches:
                raise ValueError(self._other("another model, or with other settings"))
            yield line
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))

    def _other(self, what: str) -> str:
        return f"--output {self._path} holds answers of {what}: name another file, or pass --overwrite"


def answer_all(
    load: Callable[[], Talker],
    questions: Sequence[Question],
    file: AnswerFile,
    *,
    batch_size: int,
    title: str,
    more: Callable[[Question, Answer], Line] | None = None,
) -> list[Line]:
    """The lines of all questions; what `file` has is taken from it, and the model is loaded if anything is missing.

    `more` adds to a line. Shows progress on stderr.
    """
    missing = [question for question in questions if question.row not in file.lines]
    if missing:
        talker = load()
        with (
            file.appending() as add,
            tqdm(total=len(questions), initial=len(questions) - len(missing), desc=title, unit="answer") as bar,
        ):
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                for question, answer in zip(batch, talker.answers([one.request for one in batch]), strict=True):
                    line = {"row": question.row, "question": question.text, "reference": question.reference}
                    line |= {"output": answer.text, "is_cut": answer.is_cut}
                    add(line | (more(question, answer) if more is not None else {}) | {"run": file.identity})
                bar.update(len(batch))
    return [file.lines[question.row] for question in questions]
