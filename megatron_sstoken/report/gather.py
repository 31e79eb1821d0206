"""Everything that a page shows, as one mapping of plain values: None where undefined, numbers with 4 significant digits."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_sstoken.report import facts, verdict
from megatron_sstoken.report.figures import COLUMNS, KindFigures, StepFigures, edges_of, sample_figures
from megatron_sstoken.report.prepared import PreparedData
from megatron_sstoken.report.record_files import RecordFile, data_fingerprint, score_range, whole_samples
from megatron_sstoken.report.runs import Run, changed_settings, thinned
from megatron_sstoken.report.shown import Choice, as_lists, load, window_of
from megatron_sstoken.report.texts import GROUPS, Texts, group_of

POINTS = 500
"""Of a curve, at most."""
KINDS = 200
"""Most frequent kinds of tokens in the table; those dropped or drifting most come on top."""
GROUPED = 5000
"""Most frequent kinds of tokens whose texts are looked up to tell digits from words; the others are one more group."""
ROOM = 3_800_000
"""Bytes of JSON that 200 samples may take, so that the page stays below 5 MB."""
_TOKEN_BYTES, _STEP_BYTES = 18, 42
"""What a token takes, about, and what its figures of one step do."""
_LIMITS = (
    (4096, 64), (1024, 64), (512, 32), (512, 16),
    (384, 16), (256, 16), (256, 8), (192, 8), (128, 8), (128, 4), (64, 4), (32, 3),
)  # fmt: skip
"""Tokens of a sample, and steps of watched samples, that are shown at most: the first that has room."""


@dataclass
class Sums:
    """What one pass over the records gives."""

    steps: dict[int, StepFigures] = field(default_factory=dict)
    total: StepFigures = field(default_factory=StepFigures)
    kinds: KindFigures = field(default_factory=KindFigures)
    edges: np.ndarray | None = None
    num_samples: int = 0
    """Visits: a sample at two steps counts twice."""


def sum_up(files: Sequence[RecordFile], choice: Choice) -> Sums:
    """One pass. Sums are over the tokens of training's batches; over watched samples where nothing else was recorded."""
    counted = [file for file in files if not file.watched] or list(files)
    sums = Sums(edges=edges_of(score_range(counted)))
    for file in files:
        for columns, starts in whole_samples(file, COLUMNS):
            figures = sample_figures(columns, starts, file.step)
            choice.offer(figures, watched=file.watched)
            if file in counted:
                sums.num_samples += len(figures)
                sums.kinds.add(columns)
                for one in (sums.steps.setdefault(file.step, StepFigures()), sums.total):
                    one.add(columns, sums.edges)
    return sums


def gather(
    runs: Sequence[Run],
    files: Sequence[RecordFile],
    texts: Texts,
    data: PreparedData | None = None,
    *,
    num_samples: int = 200,
    seed: int = 0,
    title: str | None = None,
) -> dict[str, Any]:
    """The report of the first run, and of those it is compared with.

    `files` are its token records, ascending by step; `data`: what they are of. Memory does not grow with their tokens.
    """
    main, compared = (runs[0], runs[1:]) if runs else (None, [])
    choice = Choice(num_samples, seed)
    sums = sum_up(files, choice)
    notable = sums.kinds.notable(KINDS)
    kind_texts = dict(zip(notable.tolist(), texts.of(notable), strict=True))
    shown = choice.shown()
    samples, notes = _samples(files, shown, texts, data, ROOM * max(1.0, num_samples / 200))
    groups = _groups(sums.kinds, texts)
    of_main = main or Run(name="token records", folder=files[0].path.parent, logs=files[0].path.parent)
    num_validation = facts.num_samples(main, "validation") if main else None
    return {
        "title": title or of_main.name,
        "runs": [_describe_run(run, is_main=run is main) for run in runs],
        "facts": facts.facts(main, facts.num_samples(main, "train") if main else None, num_validation),
        "selection": {
            "scope": of_main.setting("selection", "scope"),
            "drift_bound": verdict.drift_bound(of_main),
        },
        "samples": samples,
        "scores": {} if sums.edges is None else {
            str(step): _histogram(one, sums.edges) for step, one in sorted(sums.steps.items())
        },
        "types": _kinds(sums.kinds, kind_texts),
        "groups": groups,
        "verdict": {
            "helps": verdict.helps(of_main, compared, num_validation) if main else verdict.NO_RUN,
            "dropping": verdict.dropping(of_main, sums.steps, sums.total, sums.kinds, kind_texts, groups),
            "drifting": verdict.drifting(of_main, sums.steps),
        },
        "notes": [
            *_notes(main, files, len(samples), choice.num_watched, sums, texts),
            *notes,
            *(note for run in runs for note in run.notes),
        ],
    }  # fmt: skip


def _notes(
    main: Run | None, files: Sequence[RecordFile], num_shown: int, num_watched: int, sums: Sums, texts: Texts
) -> list[str]:
    """What figures are of, and what else to know of the records."""
    if not files:
        return []
    steps = verdict.counted(len(sums.steps), "step")
    where = f" in the batches of {steps} (a sample that is in several counts in each)" if files[0].names_step else ""
    watched = f", {num_watched:,} of them watched" if num_watched else ""
    notes = [
        f"Scores and kinds of tokens are of what was recorded: {verdict.counted(sums.num_samples, 'sample')}{where}.",
        f"{verdict.counted(num_shown, 'sample')} can be looked at{watched}.",
    ]
    if main and main.curves:
        notes.insert(
            1, "Losses are of every step's whole batch, recorded or not; validation losses of all validation samples."
        )
    if all(file.watched for file in files):
        notes.append("There are no records of training's batches: figures are those of the watched samples.")
    if not all(file.names_step for file in files):
        notes.append("Files whose names have no step, such as those of `score`, are shown as step 0.")
    if not texts.is_known:
        notes.append("The records hold no text: tokens are shown by their ids. --tokenizer names a tokenizer.")
    return notes


def _describe_run(run: Run, *, is_main: bool) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": str(run.folder),
        "is_main": is_main,
        "method": run.method,
        "settings": run.settings,
        "changed": changed_settings(run.settings) if run.settings else {},
        "versions": run.versions,
        **{name: getattr(run, name) for name in ("commit", "command", "start", "end", "ended")},
        "curves": {
            name: [[step, significant(value)] for step, value in thinned(curve, POINTS)]
            for name, curve in sorted(run.curves.items())
        },
    }


def _samples(
    files: Sequence[RecordFile], shown: np.ndarray, texts: Texts, data: PreparedData | None, room: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """The samples in the order of `shown`, cut so that they take `room` bytes at most, and what to note of that."""
    sources = data.sources(shown["sample"]) if data else [None] * len(shown)
    watched = sorted({file.step for file in files if file.watched})
    first = next((n for n, limits in enumerate(_LIMITS) if _estimate(files, shown, *limits) <= room), len(_LIMITS) - 1)
    for longest, most in _LIMITS[first:]:
        steps = [step for step, _ in thinned([(step, 0.0) for step in watched], most)]
        loaded = load(files, shown, longest, steps)
        every = [columns["token"] for by_step in loaded.values() for columns in by_step.values()]
        texts.of(np.unique(np.concatenate(every)) if every else [])  # all at once, in one reading of the records
        samples = [
            _sample(one, source, loaded[int(one["sample"])], texts, longest)
            for one, source in zip(shown, sources, strict=True)
        ]
        del loaded
        if len(json.dumps(samples, separators=(",", ":"))) <= room:
            break
    notes = []
    if cut := sum(one["is_cut"] for one in samples):
        notes.append(
            f"{cut:,} long samples are cut to {longest} tokens, from shortly before their first response token."
        )
    if len(steps) < len(watched):
        notes.append(f"Watched samples are shown at {len(steps)} of the {len(watched)} steps that were recorded.")
    return samples, notes


def _estimate(files: Sequence[RecordFile], shown: np.ndarray, longest: int, most: int) -> float:
    """Bytes of JSON."""
    watched_files = [file for file in files if file.watched]
    # Watched samples come first, and there are as many rows in each of their files.
    rows = min(watched_files[-1].num_rows, int(shown["num_tokens"].sum())) if watched_files else 0
    is_watched = np.cumsum(shown["num_tokens"]) <= rows
    tokens = np.minimum(shown["num_tokens"], longest)
    steps = np.where(is_watched, min(most, len(watched_files)), 1)
    return float((tokens * (_TOKEN_BYTES + _STEP_BYTES * steps)).sum())


def _sample(figures: np.void, source: str | None, loaded: dict[int, Any], texts: Texts, longest: int) -> dict[str, Any]:
    start, stop = window_of(figures, longest)
    tokens = next(iter(loaded.values()))
    return {
        "sample": int(figures["sample"]),
        "step": int(figures["step"]),
        "source": source,
        "dropped_share": significant(figures["dropped_share"]),
        "drift": significant(figures["drift"]),
        "top_score": significant(figures["top_score"]),
        "num_response": int(figures["num_response"]),
        "first_position": int(tokens["position"][0]),
        "tokens": {
            "text": texts.of(tokens["token"]),
            "id": tokens["token"].tolist(),
            "role": tokens["role"].tolist(),
        },
        "at": {str(step): as_lists(columns) for step, columns in sorted(loaded.items())},
        "is_cut": stop - start < int(figures["num_tokens"]),
    }


def _histogram(figures: StepFigures, edges: np.ndarray) -> dict[str, Any]:
    return {
        "edges": [significant(edge) for edge in edges.tolist()],
        "selected": figures.selected.tolist(),
        "dropped": figures.dropped.tolist(),
        "threshold": significant(figures.threshold),
    }


def _kinds(kinds: KindFigures, texts: dict[int, str]) -> list[dict[str, Any]]:
    count, known = kinds["count"], kinds["with_history"]
    return [
        {
            "text": text,
            "id": one,
            "count": int(count[one]),
            "selected_share": significant(kinds["selected"][one] / count[one]),
            "loss": significant(kinds["loss"][one] / count[one]),
            "history_loss": significant(kinds["history_loss"][one] / known[one]) if known[one] else None,
            "change": significant(kinds["change"][one] / known[one]) if known[one] else None,
        }
        for one, text in texts.items()
    ]


def _groups(kinds: KindFigures, texts: Texts) -> list[dict[str, Any]]:
    """Digits, operators, words, others, and what is too rare to look at; [] where the records hold no text."""
    if not texts.is_known:
        return []
    frequent = kinds.frequent(GROUPED)
    names = np.array([group_of(text) for text in texts.of(frequent)])
    parts = {name: frequent[names == name] for name in GROUPS}
    rare = kinds["count"] > 0
    rare[frequent] = False
    parts["too rare to tell"] = np.flatnonzero(rare)
    every = kinds["count"].sum()
    found = []
    for name, ids in parts.items():
        count, selected = kinds["count"][ids].sum(), kinds["selected"][ids].sum()
        if count:
            found.append(
                {
                    "name": name,
                    "count": int(count),
                    "share": significant(count / every),
                    "dropped": int(count - selected),
                    "dropped_share": significant((count - selected) / count),
                    "loss": significant(kinds["loss"][ids].sum() / count),
                }
            )
    return found


def significant(value: float) -> float | None:
    """4 significant digits; None where undefined."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def check_data(files: Sequence[RecordFile], data: PreparedData) -> str | None:
    """Why `data` is not what the records are of; None: it is, or they do not say."""
    found = data_fingerprint(files)
    if found is None or found == data.manifest.data_fingerprint:
        return None
    return f"{data.path} is other data than the token records are of"
