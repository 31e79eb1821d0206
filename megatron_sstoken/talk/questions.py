"""Files of questions: the rows that `prepare_data.py` reads, and rows that hold a question alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sstoken.data.conversation import BadRow, Message, printable
from megatron_sstoken.data.inputs.files import find_files
from megatron_sstoken.data.recipe import FieldNames, Recipe
from megatron_sstoken.data.rows.formats import parse_row
from megatron_sstoken.data.rows.messages import parse_messages
from megatron_sstoken.talk.generation import Request

QUESTION_COLUMNS = ("prompt", "question", "query", "instruction", "text")
"""Columns of a row that holds a question alone."""


@dataclass(frozen=True)
class Question:
    """A row of the file, as the model is asked."""

    row: int
    """From 0."""
    request: Request
    reference: str | None
    """What the row says that the answer is."""

    @property
    def text(self) -> str:
        """The user's last message."""
        return str(self.request.messages[-1]["content"])

    def with_system(self, text: str | None) -> "Question":
        """The question under a system message; one that the row has is replaced."""
        if text is None:
            return self
        messages = [message for message in self.request.messages if message["role"] != "system"]
        request = replace(self.request, messages=[{"role": "system", "content": text}, *messages])
        return replace(self, request=request)


def read_questions(
    path: str | Path, *, fields: str | None = None, limit: int | None = None, needs_reference: bool = False
) -> list[Question]:
    """The first `limit` questions of a file (JSON lines or whatever else `prepare_data.py` reads).

    Of a conversation the last answer is the reference, and what comes before it the question. Raises ValueError with file,
    place and reason for a row that holds no question, or no reference where it `needs_reference`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1")
    names = FieldNames.parse(fields) if fields else None
    found: list[Question] = []
    for where, row in _rows(path):
        if len(found) == limit:
            break
        try:
            question = question_of(row, len(found), names)
            if needs_reference and question.reference is None:
                raise BadRow("has a question and no answer to compare with")
        except BadRow as error:
            raise ValueError(f"{where}: {error}") from error
        found.append(question)
    if not found:
        raise ValueError(f"{path} holds no rows")
    return found


def question_of(row: dict[str, Any], number: int = 0, names: FieldNames | None = None) -> Question:
    """What a row asks. Raises BadRow."""
    if names is None and (alone := _question_alone(row)) is not None:
        return Question(number, Request(alone), None)
    conversation = parse_row(row, Recipe(fields=names))
    roles = [message["role"] for message in conversation.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if not last or roles[last - 1] not in ("user", "tool"):
        raise BadRow("no question comes before the last answer")
    request = Request(conversation.messages[:last], conversation.tools, conversation.template_arguments)
    return Question(number, request, str(conversation.messages[last].get("content") or ""))


def _question_alone(row: dict[str, Any]) -> list[Message] | None:
    """The messages of a row that has no answer."""
    messages = row.get("messages")
    if (
        isinstance(messages, list)
        and messages
        and isinstance(messages[-1], dict)
        and messages[-1].get("role") == "user"
    ):
        return [parsed.message for parsed in parse_messages(messages, "messages")]
    texts = {name: row[name] for name in QUESTION_COLUMNS if isinstance(row.get(name), str)}
    others = set(row) & {
        "messages",
        "conversations",
        "conversation",
        "completion",
        "response",
        "answer",
        "answers",
        "output",
    }
    if len(texts) != 1 or others:
        return None
    (text,) = texts.values()
    if not text.strip():
        raise BadRow("the question is empty")
    return [{"role": "user", "content": text}]


def _rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and place, row) of a file or folder."""
    for file in find_files([str(path)]):
        for chunk in file.chunks():
            for place, raw in chunk.rows():
                try:
                    row = chunk.decode(raw)
                except BadRow as error:
                    raise ValueError(f"{chunk.where(place)}: {printable(str(error))}") from error
                yield chunk.where(place), row
