"""How rows become samples: what whoever prepares data decides about it."""

from dataclasses import dataclass, field
from typing import Any, Literal

DROPPABLE = ("system", "tools", "tool_calls", "reasoning", "content")
"""What a template may leave out of a conversation where `Recipe.allow_dropped` names it."""


@dataclass(frozen=True)
class FieldNames:
    """Names of the fields that hold the prompt, the response and (optional, may be empty) the system text."""

    prompt: str
    response: str
    system: str | None = None

    @classmethod
    def parse(cls, text: str) -> "FieldNames":
        """`prompt=question,response=answer[,system=rules]` → names; `ValueError` for anything else."""
        pairs = [part.partition("=")[::2] for part in text.split(",")]
        names = {key.strip(): name.strip() for key, name in pairs}
        right_keys = {"prompt", "response"} <= names.keys() <= {"prompt", "response", "system"}
        if not right_keys or len(names) < len(pairs) or not all(names.values()):
            raise ValueError(f"--fields: {text!r} must read prompt=NAME,response=NAME[,system=NAME]")
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
