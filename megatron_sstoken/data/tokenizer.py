"""What preparation asks of a tokenizer, whatever its files: render chats, encode text."""

import json
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    _render_with_assistant_indices,
    render_jinja_template,
)

from megatron_sstoken.data.conversation import BadRow, Message, Span
from megatron_sstoken.data.text.finder import Finder
from megatron_sstoken.data.text.limits import MEMORY, BadTemplate, size_limit, time_limit
from megatron_sstoken.data.text.marks import has_generation_marks
from megatron_sstoken.data.text.template_style import TemplateStyle, find_style
from megatron_sstoken.data.text.verbatim import is_verbatim

RESERVED = frozenset(
    ("messages", "tools", "add_generation_prompt", "conversations", "chat_template", "continue_final_message",
     "return_assistant_tokens_mask")
)  # fmt: skip
"""Names that a template gets from us or from transformers: no template argument can have them."""


ID_BYTES = 4
"""Of a packed token id."""


@dataclass(frozen=True)
class Encoding:
    """Token ids of one text.

    `tokens_of(start, stop)` is the range of tokens that hold any of the characters [start, stop) of the text. It raises
    `BadRow` where the tokenizer cannot tell. Ask in ascending order: then all borders together cost one reading.
    """

    ids: list[int]
    tokens_of: Callable[[int, int], Span]


@dataclass(frozen=True)
class RenderedChat:
    """Text of a conversation and the character spans [start, stop) inside its `{% generation %}` marks."""

    text: str
    spans: list[Span]


class TextTokenizer(ABC):
    """What data preparation needs from a tokenizer. It adds no special tokens: templates contain them."""

    path: str
    template: str | None
    marked: bool  # the template has generation marks
    is_verbatim: bool  # the template does not look at what contents say
    bos_id: int | None
    eos_id: int | None
    vocabulary_size: int  # largest token id + 1
    special_ids: frozenset[int]
    end_of_turn_ids: frozenset[int]
    specials: Finder  # the text of any special token
    end_pattern: re.Pattern[str]  # the text of any token that ends a turn
    special_tokens: dict[str, Any]  # what templates see: bos_token, eos_token, ...
    fingerprint: str  # hex sha256 over what determines tokenisation
    shapes: dict[Any, Any]  # what `rendering` has learnt of the template
    splits_at_specials = False
    """Special tokens are split off first, each as its text stands; the rest is encoded part by part."""
    tokens_are_texts = False
    """A token is the same characters everywhere; those that the vocabulary lacks may be left out, or a token of their own."""

    @cached_property
    def special_mask(self) -> np.ndarray:
        """Which tokens are special, bool [vocabulary size]."""
        mask = np.zeros(self.vocabulary_size, dtype=bool)
        mask[[*self.special_ids]] = True
        return mask

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Token ids of each text, without added special tokens."""

    def encode_packed(self, texts: Sequence[str]) -> list[bytes]:
        """As `encode_batch`, int32 one after another and without positions, which may be faster."""
        return [pack_ids(encoding.ids) for encoding in self.encode_batch(texts)]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """What one token stands for in UTF-8, of which it may hold part of a character; a special one its name.

        Empty where the vocabulary has no such token.
        """

    def set_template(self, template: str | None) -> None:
        """Use this Jinja chat template (None: none). Raises as `has_generation_marks`."""
        self.template = template
        self.marked = template is not None and has_generation_marks(template)
        self.is_verbatim = template is not None and is_verbatim(template)
        self.shapes = {}
        self._prompts: dict[str, str] = {}
        self._style: TemplateStyle | None = None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        locate_marks: bool = True,
    ) -> RenderedChat:
        """Apply the chat template to a conversation; `arguments` are more names that the template sees.

        Without `locate_marks` no span is given. Raises `BadRow` if the template refuses the conversation, or if an
        argument has a name of ours; `BadTemplate` if it takes too much time or room.
        """
        assert self.template is not None, "render needs a chat template"
        check_arguments(arguments)
        located = self.marked and locate_marks
        try:
            with time_limit():
                if tools is None and not arguments and all(map(_is_plain, messages)):
                    text, spans = self._render_plain(messages, add_generation_prompt, located)
                else:
                    text, spans = self._render_any(messages, add_generation_prompt, located, tools, arguments)
        except BadTemplate:
            raise
        except MemoryError as error:
            raise BadTemplate(f"the chat template takes more than {MEMORY >> 30} GiB: use another template") from error
        except Exception as error:  # a template is a program: it can raise anything
            raise BadRow(f"the chat template refuses the conversation: {error}") from error
        length = len(text)
        # Most texts are within what any conversation may give: then nobody measures theirs.
        if length > size_limit(0) and length > (
            limit := size_limit(sum(len(str(given)) for given in (*messages, tools, arguments)))
        ):
            raise BadTemplate(
                f"the chat template makes {length:,} characters of a conversation, of which it may make {limit:,}: use "
                "another template"
            )
        return RenderedChat(text, spans)

    def _render_any(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        located: bool,
        tools: Sequence[dict[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> tuple[str, list[Span]]:
        rendered: Any  # upstream annotates a str and returns a pair of lists
        rendered = render_jinja_template(
            conversations=[list(messages)],
            tools=None if tools is None else list(tools),
            chat_template=self.template,
            return_assistant_tokens_mask=located,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens, **arguments},
        )
        texts, spans = rendered
        return texts[0], spans[0] if located else []

    def _render_plain(
        self, messages: Sequence[Message], add_generation_prompt: bool, located: bool
    ) -> tuple[str, list[Span]]:
        """As `_render_any` without what it does for messages of other kinds, which takes longer than rendering."""
        template: Any = _compile_jinja_template(self.template)
        names = {
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
        }
        if located:
            return _render_with_assistant_indices(compiled_template=template, **names)
        return template.render(names), []

    def as_template_wants(self, messages: Sequence[Message]) -> list[Message]:
        """The messages of a conversation in the style of the chat template, which is found once."""
        if not any(message.get("tool_calls") for message in messages):
            return list(messages)
        if self._style is None:
            self._style = find_style(lambda probe: self.render(probe, locate_marks=False).text)
        return self._style.apply(messages)

    def generation_prompt(self, tools: Sequence[dict[str, Any]] | None, arguments: Mapping[str, Any]) -> str:
        """What the template writes for the assistant to go on from; empty if it ignores `add_generation_prompt`."""
        key = json.dumps([tools is None, dict(arguments)], sort_keys=True)
        if key not in self._prompts:
            self._prompts[key] = ""
            question = [{"role": "user", "content": "x"}]
            with suppress(BadRow):  # it may want a system message
                without, prompted = (
                    self.render(question, add, tools=tools, arguments=arguments, locate_marks=False).text
                    for add in (False, True)
                )
                self._prompts[key] = prompted.removeprefix(without) if prompted.startswith(without) else ""
        return self._prompts[key]


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as int32; `struct` reads a list in half the time that numpy takes."""
    return struct.pack(f"{len(ids)}i", *ids)


def unpack_ids(packed: bytes) -> np.ndarray:
    """Packed token ids as int32 [n], read-only."""
    return np.frombuffer(packed, dtype=np.int32)


def _is_plain(message: Message) -> bool:
    """Whether a message has a role and a content, both texts, and nothing else."""
    return len(message) == 2 and type(message.get("role")) is str and type(message.get("content")) is str


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise BadRow if a template argument has a name of ours."""
    if taken := sorted(RESERVED & arguments.keys()):
        raise BadRow(f"template argument {taken[0]!r} is a name of the conversation itself: leave it out")
