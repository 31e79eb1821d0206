"""Messages → what the model says: one answer as it comes, or many at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sstoken.data.conversation import Message
from megatron_sstoken.data.text.end_of_turn import end_of_turn
from megatron_sstoken.talk.loading import ModelFolder


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0: the likeliest token (greedy)."""
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be at least 0 (0: greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must be above 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"--top_p {self.top_p} does nothing without --temperature: set it above 0")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} must be from 0 to {2**63 - 1}")


@dataclass(frozen=True)
class Request:
    """What the model is to answer: messages up to the user's last, and what else the template takes."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What the model said, without special tokens."""

    text: str
    is_cut: bool
    """It did not end by itself: `max_new_tokens` or the model's positions were over."""


class Talker:
    """A model that answers.

    Of the folder's generation settings only the stop tokens count: no penalties, no sampling, so that greedy is greedy. The
    token that ends an assistant's turn in the chat template stops as well, for a base model's own list lacks it.
    """

    def __init__(self, model: Any, tokenizer: Any, decoding: Decoding):
        if not tokenizer.chat_template:
            raise ValueError(
                f"{tokenizer.name_or_path} has no chat template: export with the template of the data (to-hf does, for "
                "checkpoints of training), or name one with --chat_template"
            )
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        self._stops = stop_tokens(model, tokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = self._stops[0] if self._stops else 0
        self._limit: int | None = getattr(model.config, "max_position_embeddings", None)
        seed_everything(decoding.seed)

    def answer(self, request: Request, show: Callable[[str], None] | None = None) -> Answer:
        """The answer to one request; `show` gets its text piece by piece as it comes."""
        (answer,) = self._generate([request], _streamer(self.tokenizer, show) if show is not None else None)
        return answer

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers to several requests at once, padded on the left. Greedy, they are those of one request at a time."""
        return self._generate(requests, None)

    def render(self, request: Request) -> str:
        """The prompt as the model sees it. Raises ValueError for what the chat template refuses."""
        try:
            return self.tokenizer.apply_chat_template(
                request.messages,
                tools=request.tools,
                add_generation_prompt=True,
                tokenize=False,
                **request.template_arguments,
            )
        except Exception as error:  # a template's own, and jinja's
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    def _generate(self, requests: Sequence[Request], streamer: Any) -> list[Answer]:
        import torch

        encoded = self.tokenizer(
            [self.render(request) for request in requests],
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(self.model.device)
        rooms = [self._room(length) for length in encoded["attention_mask"].sum(-1).tolist()]
        try:
            # A short prompt beside a long one has as much room as it has alone; the long one's answer is cut below.
            output = self.model.generate(**encoded, generation_config=self._config(max(rooms)), streamer=streamer)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of memory: use a smaller --batch_size ({len(requests)} here)") from error
        begin = encoded["input_ids"].shape[1]
        return [self._read(ids[begin : begin + room].tolist()) for ids, room in zip(output, rooms, strict=True)]

    def _room(self, prompt: int) -> int:
        """Tokens that an answer to a prompt of so many tokens may have."""
        if self._limit is None:
            return self.decoding.max_new_tokens
        if prompt >= self._limit:
            raise ValueError(f"a prompt has {prompt} tokens and the model {self._limit} positions: shorten it")
        return min(self.decoding.max_new_tokens, self._limit - prompt)

    def _read(self, ids: list[int]) -> Answer:
        end = next((index for index, token in enumerate(ids) if token in self._stops), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text.strip(), is_cut=end is None)

    def _config(self, num_tokens: int) -> Any:
        from transformers import GenerationConfig

        sampling: dict[str, Any] = {"do_sample": False}
        if self.decoding.temperature:
            sampling = {
                "do_sample": True,
                "temperature": self.decoding.temperature,
                "top_p": self.decoding.top_p,
                "top_k": 0,
            }
        return GenerationConfig(
            max_new_tokens=num_tokens,
            eos_token_id=self._stops or None,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )


def load_talker(
    folder: ModelFolder, decoding: Decoding, *, device: str = "auto", dtype: str = "auto", template: str | None = None
) -> Talker:
    """The model of a folder, ready to answer. `template`: a chat template in place of the folder's."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it warns of lengths and settings that are dealt with here
    tokenizer = folder.load_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return Talker(folder.load_model(device=device, dtype=dtype), tokenizer, decoding)


def seed_everything(seed: int) -> None:
    """Sampling draws the same tokens for the same seed, model and batches."""
    import torch

    torch.manual_seed(seed)


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens after which an answer is over: the folder's, the tokenizer's, and the one that ends a turn in the template."""
    named = model.generation_config.eos_token_id
    found = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return list(dict.fromkeys(token for token in found if token is not None))


def _streamer(tokenizer: Any, show: Callable[[str], None]) -> Any:
    """Gives an answer away word by word, without the white space around it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        has_begun = False
        held_back = ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = self.held_back + text if self.has_begun else text.lstrip()
            shown = text.rstrip()
            self.held_back = text[len(shown) :]
            if shown:
                self.has_begun = True
                show(shown)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
