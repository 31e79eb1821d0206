"""How rows become samples: what whoever prepares data decides about it."""

from dataclasses import dataclass, field
from typing import Any, Literal

DROPPABLE = ("system", "tools", "tool_calls", "reasoning", "content")
"""What a template may leave out of a conversation where `Recipe.allow_dropped` names it."""


@dataclass(frozen=True)
class FieldNames:
    """What a data set calls its columns: either prompt and response, or messages."""

    prompt: str | None = None
    response: str | None = None
    system: str | None = None
    """Of the system text, which may be empty."""
    messages: str | None = None
    """Of a list of messages; what follows is about these."""
    role: str | None = None
    """Key of a message's role."""
    content: str | None = None
    """Key of a message's content."""
    user: str | None = None
    """The user's role."""
    assistant: str | None = None
    """The assistant's role."""
    tools: str | None = None
    """Of the tool schemas."""

    @classmethod
    def parse(cls, text: str) -> "FieldNames":
        """`prompt=question,response=answer[,system=rules]` or `messages=dialog[,role=from …]`; else `ValueError`."""
        pairs = [part.partition("=")[::2] for part in text.split(",")]
        names = {key.strip(): name.strip() for key, name in pairs}
        general = {"system", "tools"}
        exchange = {"prompt", "response"} <= names.keys() <= {"prompt", "response"} | general
        messages = {"messages"} <= names.keys() <= {"messages", "role", "content", "user", "assistant"} | general
        if not (exchange or messages) or len(names) < len(pairs) or not all(names.values()):
            raise ValueError(
                f"--fields: {text!r} must read prompt=NAME,response=NAME or messages=NAME[,role=KEY][,content=KEY]"
                "[,user=ROLE][,assistant=ROLE], each with [,system=NAME][,tools=NAME]"
            )
        return cls(**names)


@dataclass(frozen=True)
class Recipe:
    """The options of preparation on which the samples depend; the same for every row. Goes to worker processes."""

    fields: FieldNames | None = None
    """Columns that the user named."""
    turns: Literal["all", "last"] = "all"
    """Whether every assistant message is trained on or only the last; one with a weight of its own keeps to it."""
    thinking_weight: float = 1.0
    """How much a token of the assistant's thinking counts; 0: it is context."""
    allow_dropped: frozenset[str] = frozenset()
    """Of `DROPPABLE`: what the chat template may leave out. Anything else that it leaves out makes the row a bad one."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Names that the chat template sees; a row's own `chat_template_kwargs` win."""


DEFAULT_RECIPE = Recipe()
