#!/usr/bin/env python3
"""Load what the quickstart exported in transformers, check it against the run, and print what happened."""

import argparse
import json
import sys
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

TOLERANCE = 1e-3
"""Nats that the validation losses of the run and of the exported model may differ by."""

Message = dict[str, str]


def read_scalars(folder: Path) -> dict[str, list[ScalarEvent]]:
    """All TensorBoard points of a run: name → events in the order of steps."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def read_chats(path: Path) -> list[list[Message]]:
    """The conversations of a JSON-lines file."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def response_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: list[list[Message]]) -> float:
    """Mean loss in nats over all tokens inside the template's generation marks, each counting once."""
    total, count = 0.0, 0
    for messages in chats:
        rendered = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        ids, response = rendered["input_ids"], torch.as_tensor(rendered["assistant_masks"]).bool()
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total += float(losses[response.view(-1)[1:]].sum())
        count += int(response.view(-1)[1:].sum())
    return total / count


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What the model says to a question, greedily."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def report(work: Path) -> list[tuple[str, str]]:
    """The table of a quickstart in `work`. Raises ValueError if the exported model is not the one that was trained."""
    scalars = read_scalars(work / "run" / "logs")
    model = AutoModelForCausalLM.from_pretrained(work / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "exported")
    chats = read_chats(work / "toy" / "validation.jsonl")
    trained, exported = scalars["loss/validation"][-1].value, response_loss(model, tokenizer, chats)
    if not abs(trained - exported) < TOLERANCE:
        raise ValueError(
            f"{work / 'exported'}: validation loss {exported:.4f} in transformers, {trained:.4f} in the run"
        )
    question = next(message["content"] for message in chats[0] if message["role"] == "user")
    return [
        ("steps", f"{scalars['loss/all'][-1].step}"),
        ("loss, all responses", _from_to(scalars["loss/all"])),
        ("loss, selected", _from_to(scalars["loss/selected"])),
        ("share selected", f"{100 * scalars['selection/share'][-1].value:.1f} % (last step)"),
        (
            "validation loss",
            f"{_from_to(scalars['loss/validation'])}; the exported model's in transformers: {exported:.4f}",
        ),
        ("question", question),
        ("the model's answer", answer(model, tokenizer, question)),
        ("checkpoints", f"{work / 'run'}"),
        ("TensorBoard", f"{work / 'run' / 'logs'}"),
        ("token records", f"{work / 'run' / 'logs' / 'records'}"),
        ("history losses", f"{work / 'train' / 'history'}"),
        ("Hugging Face model", f"{work / 'exported'}"),
    ]


def _from_to(events: list[ScalarEvent]) -> str:
    first, last = events[0], events[-1]
    return f"{first.value:.4f} (step {first.step}) -> {last.value:.4f} (step {last.step})"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 the exported model is another one, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the quickstart")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    for folder in (options.work / "run" / "logs", options.work / "exported"):
        if not folder.is_dir():
            print(f"error: --work: {folder} does not exist: run pretrain_scripts/quickstart.sh first", file=sys.stderr)
            return 2
    try:
        rows = report(options.work)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in rows:
        print(f"{name:<22} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
