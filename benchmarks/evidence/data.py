"""The data of a seed: GSM8K with faults for training, clean held-out problems, problems half of which are faulty, and prose."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from benchmarks.evidence.faults import Answer, with_faults
from benchmarks.evidence.scale import Scale
from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.store import SampleStore

PROBE_SHARE = 0.5
"""Of the probe's problems are faulty: as many tokens of either side as can be, for narrow intervals."""
_NOISE_WEIGHT = 2.0
"""By which noise is told from clean tokens in a second preparation of the probe; nothing trains with it. Of several weights in
a token the largest counts, so that a token with any character of noise is noise."""


@dataclass(frozen=True)
class Folders:
    """Prepared folders of a seed and a share of faulty problems."""

    train: Path
    validation: Path
    probe: Path
    prose: Path
    clean_tenth: Path
    """Clean problems, a tenth as many as there are for training, none of them among those: for RHO-1's reference."""


def make_data(work: Path, gsm8k: Path, tokenizer: Path, scale: Scale, noise: float, seed: int) -> Folders:
    """Write rows and prepare them, unless they are there.

    Problems of training, probe and clean tenth are drawn by `seed` from GSM8K's training file and are disjoint; validation
    and prose are the same for all seeds.
    """
    folder = work / f"noise_{noise:g}_seed_{seed}"
    shared = work / "shared"
    folders = Folders(
        folder / "train", shared / "validation", folder / "probe", shared / "prose", folder / "clean_tenth"
    )
    problems = _problems(gsm8k / "train.jsonl", scale.longest)
    random.Random(f"problems {seed}").shuffle(problems)
    tenth = max(1, scale.train // 10)
    parts = np.split(np.arange(scale.train + scale.probe + tenth), [scale.train, scale.train + scale.probe])
    train, probe, clean = ([problems[place] for place in part] for part in parts)
    held_out = _problems(gsm8k / "test.jsonl", scale.longest)
    for path, rows, share in (
        (folders.train, train, noise),
        (folders.probe, probe, PROBE_SHARE),
        (folders.clean_tenth, clean, 0.0),
        (folders.validation, held_out[: scale.validation], 0.0),
    ):
        answers = with_faults([row["answer"] for row in rows], share, seed)
        _prepare([row["question"] for row in rows], answers, path, tokenizer)
    passages = _prose(scale.prose, scale.longest)
    questions = [f"Tell me about {name}." for name in passages]
    _prepare(questions, [Answer(text) for text in passages.values()], folders.prose, tokenizer)
    return folders


def noise_of(folder: Path) -> dict[int, np.ndarray]:
    """Sample (input row) of the probe → bool [tokens]: which response tokens hold a character of noise."""
    store = SampleStore(_marked(folder))
    return {int(store.rows[index]): store.weights(index) == _NOISE_WEIGHT for index in range(len(store))}


def kinds_of(folder: Path) -> list[str]:
    """The kind of fault of every sample, `clean` where it has none."""
    return [row["kind"] for row in _read(_rows_of(folder))]


def _marked(folder: Path) -> Path:
    """The same tokens, prepared with a weight of its own for noise."""
    return folder.with_name(f"{folder.name}_marked")


def plain_rows_of(folder: Path) -> Path:
    """The conversations of a prepared folder, as JSON lines."""
    return folder.with_name(f"{folder.name}_plain.jsonl")


def _rows_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.jsonl")


def _problems(path: Path, longest: int) -> list[dict]:
    return [row for row in _read(path) if len(row["question"]) + len(row["answer"]) <= longest]


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _prose(number: int, longest: int) -> dict[str, str]:
    """Subject → passage, from Python's own help: another kind of text than sums in words."""
    passages = {}
    for name, text in sorted(topics.items()):
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
        plain = [part for part in paragraphs if len(part) > 200 and part[0].isupper() and "|" not in part]
        if plain:
            passages[name] = plain[0][:longest]
    return dict(list(passages.items())[:number])


def _prepare(questions: Sequence[str], answers: Sequence[Answer], folder: Path, tokenizer: Path) -> None:
    """A prepared folder of the rows and, where there are faults, another one with their places marked."""
    if (folder / "manifest.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    plain = plain_rows_of(folder)
    with open(_rows_of(folder), "w", encoding="utf-8") as rows, open(plain, "w", encoding="utf-8") as plain_rows:
        for question, answer in zip(questions, answers, strict=True):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
            plain_rows.write(json.dumps({"messages": messages}) + "\n")
            spans = [{"start": start, "stop": stop, "weight": _NOISE_WEIGHT} for start, stop in answer.noise]
            told = [messages[0], {**messages[1], "spans": spans} if spans else messages[1]]
            rows.write(json.dumps({"messages": told, "kind": answer.kind}) + "\n")
    if any(answer.noise for answer in answers):
        prepare([_rows_of(folder)], tokenizer, _marked(folder), workers=1, overwrite=True, progress=False)
    prepare([plain], tokenizer, folder, workers=1, overwrite=True, progress=False)
