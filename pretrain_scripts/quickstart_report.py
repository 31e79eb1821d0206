#!/usr/bin/env python3
"""Load what the quickstart exported in transformers, check it against the run, and print what happened beside other methods."""

import argparse
import itertools
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from megatron_sstoken.training.next_commands import commands_of_export, describe_commands
from megatron_sstoken.training.tags import metric_of

TOLERANCE = 1e-3
"""Nats that the validation losses of the run and of the exported model may differ by."""

RUNS = {"full": "full", "random": "random", "sstoken": "run"}
"""Method → folder of its run."""
SEEDS = "one seed says little: docs/selection.md has more"

Message = dict[str, str]


def read_scalars(folder: Path) -> dict[str, list[ScalarEvent]]:
    """All TensorBoard points of a run: metric → events in the order of steps."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {metric_of(tag): events.Scalars(tag) for tag in events.Tags()["scalars"]}


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


def chosen_tokens(records: Path, tokenizer: PreTrainedTokenizerBase, *, terminal: bool) -> tuple[int, str]:
    """The newest step with token records, and one of its conversations with the tokens marked that were trained on.

    The mark is bold green on a terminal, « » elsewhere.
    """
    path = max(records.glob("step_*.parquet"))
    table = pq.read_table(path, columns=["sample", "position", "token", "selected"]).to_pydict()
    rows = [row for row in zip(*table.values(), strict=True) if row[0] == min(table["sample"])]
    opening, closing = ("\033[1;32m", "\033[0m") if terminal else ("«", "»")
    text = ""
    for selected, part in itertools.groupby(sorted(rows), key=lambda row: row[3]):
        piece = tokenizer.decode([token for _, _, token, _ in part])
        text += f"{opening}{piece}{closing}" if selected else piece
    return int(path.stem.removeprefix("step_")), text


def comparison(losses: dict[str, float]) -> list[tuple[str, str]]:
    """Validation losses side by side, and what they say of ssToken; `losses` by method, in the order of the table."""
    best_first = sorted(losses, key=losses.__getitem__)
    rows = [(f"  {name}", f"{losses[name]:.4f}") for name in losses]
    is_better = losses["sstoken"] <= losses["random"]
    says = "is not above" if is_better else "IS ABOVE"
    verdict = f"ssToken's {says} that of as many tokens drawn at random; lowest: {best_first[0]}"
    return [("validation loss", ""), *rows, ("", verdict), ("", SEEDS)]


def report(work: Path, *, terminal: bool = False) -> list[tuple[str, str]]:
    """The table of a quickstart in `work`. Raises ValueError if the exported model is not the one that was trained."""
    scalars = {name: read_scalars(work / folder / "logs") for name, folder in RUNS.items()}
    run = scalars["sstoken"]
    before, model = (AutoModelForCausalLM.from_pretrained(work / name).eval() for name in ("toy/model", "exported"))
    tokenizer = AutoTokenizer.from_pretrained(work / "exported")
    chats = read_chats(work / "toy" / "validation.jsonl")
    trained, exported = run["loss/validation"][-1].value, response_loss(model, tokenizer, chats)
    if not abs(trained - exported) < TOLERANCE:
        raise ValueError(
            f"{work / 'exported'}: validation loss {exported:.4f} in transformers, {trained:.4f} in the run"
        )
    losses = {"before": response_loss(before, tokenizer, chats)}
    losses |= {name: of_run["loss/validation"][-1].value for name, of_run in scalars.items()}
    question = next(message["content"] for message in chats[0] if message["role"] == "user")
    step, text = chosen_tokens(work / "run" / "logs" / "records", tokenizer, terminal=terminal)
    return [
        ("steps", f"{run['loss/all'][-1].step}"),
        *comparison(losses),
        ("exported model", f"{exported:.4f} in transformers"),
        ("question", question),
        ("answer before", answer(before, tokenizer, question).replace("\n", " ⏎ ")),
        ("answer after", answer(model, tokenizer, question).replace("\n", " ⏎ ")),
        ("share selected", f"{100 * run['selection/share'][-1].value:.1f} % (last step)"),
        ("loss, selected", _from_to(run["loss/selected"])),
        ("loss, dropped", _from_to(run["loss/dropped"])),
        ("dropped − history", _from_to(run["loss/dropped_minus_history"])),
        (f"trained on in step {step}", ""),
        *[("", line) for line in text.splitlines()],
        ("page of the run", f"{work / 'report.html'}"),
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
    parser.add_argument("--seconds", type=int, help="that it has taken")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    for folder in (*(f"{name}/logs" for name in RUNS.values()), "exported"):
        if not (options.work / folder).is_dir():
            problem = f"{options.work / folder} does not exist: run pretrain_scripts/quickstart.sh first"
            print(f"error: --work: {problem}", file=sys.stderr)
            return 2
    try:
        rows = report(options.work, terminal=sys.stdout.isatty())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in rows:
        print(f"{name:<22} {value}".rstrip())
    if options.seconds is not None:
        print(f"{'time, set-up included':<22} {options.seconds // 60} min {options.seconds % 60:02d} s")
    print("\n" + describe_commands(what_next(options.work)))
    return 0


def what_next(work: Path) -> list[tuple[str, str]]:
    """Commands that go on from here, with the quickstart's paths."""
    return commands_of_export(
        str(work / "exported"),
        run=str(work / "run"),
        compare=[str(work / folder) for method, folder in RUNS.items() if method != "sstoken"],
        data=str(work / "toy" / "validation.jsonl"),
        before=str(work / "toy" / "model"),
    )


if __name__ == "__main__":
    sys.exit(main())
