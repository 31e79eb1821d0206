#!/usr/bin/env python3
"""Make a toy to try everything with: word problems as chats, a tokenizer trained on them, a tiny Llama that has read others."""

import argparse
import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # training the tokenizer takes a second

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

Message = dict[str, str]

END_OF_TEXT, START_OF_TURN, END_OF_TURN = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEAD_DIM = 32
MAX_POSITIONS = 512
NUM_BYTES = 256
PRETRAINING_BATCH = 8
PRETRAINING_RATE = 3e-3

# ChatML. The marks hold what the assistant says and the end of its turn, not the newline after it.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

SYSTEM_TEXTS = (
    "You are a patient teacher. Show every step.",
    "Solve the problem step by step.",
    "You are good at arithmetic. Answer in whole sentences.",
)
NAMES = "Ada Ben Chloe Dan Eva Finn Grace Hugo Iris Jack Kira Leo Mia Noah Olga Paul Rosa Sam Tara Yusuf".split()
THINGS = "apples books cards coins eggs flowers keys marbles pears pencils shells stamps".split()


class ProblemWriter:
    """Writes conversations about small sums; `generator` decides all of it."""

    def __init__(self, generator: random.Random):
        self._random = generator

    def conversation(self) -> list[Message]:
        """A problem with its worked answer, in half of the cases with follow-up questions, sometimes with a system text."""
        who, friend = self._random.sample(NAMES, 2)
        things = self._random.choice(THINGS)
        question, answer, count = self._opening(who, things)
        messages = [_message("user", question), _message("assistant", answer)]
        for _ in range(self._random.choice((0, 0, 1, 2))):
            question, answer, count = self._follow_up(who, friend, things, count)
            messages += [_message("user", question), _message("assistant", answer)]
        if self._random.random() < 0.25:
            messages.insert(0, _message("system", self._random.choice(SYSTEM_TEXTS)))
        return messages

    def _opening(self, who: str, things: str) -> tuple[str, str, int]:
        """(question, answer, things that `who` has in the end)."""
        first, second = self._random.randint(2, 9), self._random.randint(2, 9)
        kind = self._random.choice(("buys", "bags", "loses"))
        if kind == "buys":
            question = f"{who} has {first} {things} and buys {second} more. How many {things} does {who} have now?"
            return question, _worked(who, things, first, "+", second), first + second
        if kind == "bags":
            question = f"{who} has {first} bags with {second} {things} in each. How many {things} does {who} have?"
            return question, _worked(who, things, first, "*", second), first * second
        question = f"{who} has {first + second} {things} and loses {second} of them. How many {things} are left?"
        return question, _worked(who, things, first + second, "-", second), first

    def _follow_up(self, who: str, friend: str, things: str, count: int) -> tuple[str, str, int]:
        number = self._random.randint(1, 9)
        if count > number and self._random.random() < 0.5:
            question = f"Now {who} gives {number} of them to {friend}. How many {things} does {who} have left?"
            return question, _worked(who, things, count, "-", number), count - number
        question = f"Then {friend} brings {number} more. How many {things} does {who} have now?"
        return question, _worked(who, things, count, "+", number), count + number


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _worked(who: str, things: str, left: int, operator: str, right: int) -> str:
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    return f"We calculate {left} {operator} {right} = {result}. So {who} has {result} {things}."


def make_conversations(num: int, seed: int) -> list[list[Message]]:
    """`num` conversations, all different; the same for the same arguments."""
    writer = ProblemWriter(random.Random(seed))
    found: dict[str, list[Message]] = {}
    while len(found) < num:
        messages = writer.conversation()
        found[json.dumps(messages)] = messages
    return list(found.values())


def make_tokenizer(conversations: list[list[Message]], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with a ChatML template; single digits stay single, so that sums can be learnt.

    It has `vocabulary` entries, or fewer where the text does not hold as many pairs worth merging.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [f"{message['role']}\n{message['content']}" for messages in conversations for message in messages]
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(tokenizer: PreTrainedTokenizerFast, *, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights (fp32) for `tokenizer`: heads of 32, two query heads for each key-value head."""
    heads = hidden // HEAD_DIM
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: list[list[Message]]) -> None:
    """Train on every token of the conversations as plain text, without roles and turns, once and in their order.

    So it knows words and sums, as a pretrained model does, and no chats. AdamW, whose rate falls linearly to 0; on one thread,
    so that the weights do not depend on how many there are.
    """
    texts = ["\n".join(message["content"] for message in messages) + END_OF_TEXT for messages in conversations]
    batches = [texts[start : start + PRETRAINING_BATCH] for start in range(0, len(texts), PRETRAINING_BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model.train()
    for batch in batches:
        encoded = tokenizer(batch, padding=True, padding_side="right", return_tensors="pt")
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        model(**encoded, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    torch.set_num_threads(threads)


def make_toy(
    output: Path,
    *,
    rows: int = 1000,
    seed: int = 0,
    vocabulary: int = 512,
    hidden: int = 128,
    layers: int = 4,
    start: str = "pretrained",
) -> None:
    """Write `chat.jsonl` (`rows` rows), `validation.jsonl` (a tenth as many, all others) and `model/` into `output`.

    `model/` is a Hugging Face folder: configuration, weights, tokenizer. The weights have been trained on the text of twice as
    many other conversations; with `start` random they are as they were drawn. Equal arguments give equal files; those of an
    earlier call are replaced. Raises ValueError for numbers that cannot work.
    """
    for name, value, least in (("rows", rows, 10), ("layers", layers, 1)):
        if value < least:
            raise ValueError(f"--{name} {value} is too small: use {least} or more")
    if vocabulary < NUM_BYTES + len(SPECIAL_TOKENS):
        raise ValueError(f"--vocabulary {vocabulary} does not hold all bytes and special tokens: use 259 or more")
    if hidden < 1 or hidden % (2 * HEAD_DIM):
        raise ValueError(f"--hidden {hidden} is not a multiple of {2 * HEAD_DIM} (two heads of {HEAD_DIM}): use one")
    num_written = rows + rows // 10
    conversations = make_conversations(num_written + (2 * rows if start == "pretrained" else 0), seed)
    output.mkdir(parents=True, exist_ok=True)
    _write_rows(output / "chat.jsonl", conversations[:rows])
    _write_rows(output / "validation.jsonl", conversations[rows:num_written])
    tokenizer = make_tokenizer(conversations[:rows], vocabulary)
    tokenizer.save_pretrained(output / "model")
    model = make_model(tokenizer, hidden=hidden, layers=layers, seed=seed)
    pretrain(model, tokenizer, conversations[num_written:])
    model.save_pretrained(output / "model")


def _write_rows(path: Path, conversations: list[list[Message]]) -> None:
    rows = (json.dumps({"messages": messages}) + "\n" for messages in conversations)
    path.write_text("".join(rows), encoding="utf-8")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder to write into")
    parser.add_argument("--rows", type=int, default=1000, help="training conversations; a tenth as many for validation")
    parser.add_argument("--seed", type=int, default=0, help="decides conversations and weights")
    parser.add_argument("--vocabulary", type=int, default=512, help="most entries of the tokenizer")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument(
        "--start",
        choices=("pretrained", "random"),
        default="pretrained",
        help="weights of the model: trained on the text of other conversations, or as they were drawn",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = vars(parse_arguments(arguments))
    disable_progress_bar()  # writing a few megabytes
    try:
        make_toy(**options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {options['output']} (chat.jsonl, validation.jsonl, model/)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
