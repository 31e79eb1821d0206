"""Tiny tokenizers, templates and conversations that tests build for themselves."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_HEAD = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_MARK = (
    "{% if message['role'] == 'assistant' %}{% generation %}MARKED{% endgeneration %}REST"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
_LLAMA_HEAD = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
)
_LLAMA_PROMPT = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"


def _marked(inside: str, rest: str) -> str:
    return _MARK.replace("MARKED", inside).replace("REST", rest)


CHAT_TEMPLATES: dict[str, str] = {
    # ChatML without marks, as Qwen's
    "plain": _HEAD + "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}" + _PROMPT,
    # ChatML whose marks hold the content only, or also the end of turn and the newline after it
    "generation": _HEAD + _marked("{{ message['content'] }}", "{{ '<|im_end|>\n' }}") + _PROMPT,
    "generation_newline": _HEAD + _marked("{{ message['content'] + '<|im_end|>\n' }}", "") + _PROMPT,
    # headers as Llama 3's, without and with marks
    "llama3": _LLAMA_HEAD + "{{ message['content'] + '<|eot_id|>' }}{% endfor %}" + _LLAMA_PROMPT,
    "llama3_generation": _LLAMA_HEAD
    + "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|eot_id|>' }}"
    + "{% endgeneration %}{% else %}{{ message['content'] + '<|eot_id|>' }}{% endif %}{% endfor %}"
    + _LLAMA_PROMPT,
}
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "how many apples are there if I have three and you have four",
    "there are 3 + 4 = 7 apples, so the answer is 7",
    "you are a helpful assistant",
    "the capital of the country is a large city by the sea",
)


def make_tokenizer(
    folder: str | Path,
    vocab_size: int = 384,
    chat_template: str | None = "generation",
    eos_token: str | None = "<|endoftext|>",
    bos_token: str | None = None,
    pad_token: str | None = "<|endoftext|>",
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on a few sentences, save it to `folder` and return it.

    `chat_template` is a name of `CHAT_TEMPLATES`, a template, or None. `vocab_size` is an upper bound that
    includes 256 bytes and the special tokens. Pad and end of sequence are one token unless told otherwise.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{sentence}. {sentence}\n" for sentence in SENTENCES] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos_token, bos_token=bos_token, pad_token=pad_token
    )
    wrapped.chat_template = CHAT_TEMPLATES.get(chat_template, chat_template) if chat_template else None
    wrapped.save_pretrained(str(folder))
    return wrapped


def make_sentencepiece(path: str | Path, vocab_size: int = 96, **options: Any) -> Path:
    """Train a sentencepiece BPE model with `<s>` and `</s>` and write it to `path` (ending in .model)."""
    path = Path(path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES] * 8),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
        **options,
    )
    return path


def exchange(user: str, assistant: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of one user and one assistant message."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def random_conversations(num: int, seed: int = 0, max_turns: int = 3) -> list[list[dict[str, str]]]:
    """`num` conversations of 1 to `max_turns` exchanges, of words from `SENTENCES`."""
    generator = np.random.default_rng(seed)
    words = " ".join(SENTENCES).split()

    def text() -> str:
        return " ".join(generator.choice(words, size=generator.integers(1, 12)).tolist())

    return [
        [message for _ in range(generator.integers(1, max_turns + 1)) for message in exchange(text(), text())]
        for _ in range(num)
    ]


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(path)
