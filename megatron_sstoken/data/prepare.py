"""Data preparation: files of rows → a prepared folder, by several processes; their number changes no byte."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

from tqdm import tqdm

from megatron_sstoken.data.inputs.chunks import Chunk
from megatron_sstoken.data.inputs.files import InputFile, find_files
from megatron_sstoken.data.mixing import Placer, Plan
from megatron_sstoken.data.output import SKIPPED, check_output, sole_maker
from megatron_sstoken.data.recipe import DEFAULT_RECIPE, Recipe
from megatron_sstoken.data.store import NO_TEMPLATE, StoreManifest
from megatron_sstoken.data.text.limits import memory_limit
from megatron_sstoken.data.text.templates import find_template, require_arguments, require_tokens
from megatron_sstoken.data.tokenizer import RESERVED, TextTokenizer
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.data.workers import BadPlace, TokenizedChunk, default_workers, start_ahead, tokenize_chunks
from megatron_sstoken.files import naming, source_inside, whole_folder

NUM_SHOWN = 10  # bad rows in an error message
NUM_REASONS = 100  # that are counted apart
MOST_LABELS = 1000
"""That rows themselves may name: more are no sources, but addresses of single rows."""
SKIPPED_NOTE = "skipped: "
"""Begins the notes that say why rows were left out."""
NO_PLAN = Plan()


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    chat_template: str | Path | None = None,
    recipe: Recipe = DEFAULT_RECIPE,
    plan: Plan = NO_PLAN,
    workers: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    overwrite: bool = False,
    progress: bool = True,
) -> StoreManifest:
    """Tokenise files of rows into the prepared folder `output`, which appears complete or not at all.

    `inputs` are files, folders, patterns, or any of these as `name=PATH`. `chat_template`, a file or the name of a
    template that comes with the package, replaces the tokenizer's. `plan` says which samples are kept, and where:
    with `plan.split` the output holds `train` and `validation`, and the manifest returned is of `train`. `workers`
    processes tokenise (1: this one; default `default_workers()`). Bad rows are an error that lists the first ones, or
    are left out and written to `skipped.jsonl`. Raises `ValueError` for these, for unusable paths and for an existing
    `output` without `overwrite`.
    """
    output = Path(output)
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"--workers: {workers} must be at least 1")
    check_output(output, overwrite)
    sources = find_files(inputs)
    template_files = [chat_template] if chat_template and Path(chat_template).is_file() else []
    read = [*(source.path for source in sources), tokenizer_path, *template_files]
    if source_read := source_inside(output, read):
        raise ValueError(f"--output: {output} is, or holds, what is read ({source_read}): choose another folder")
    _check_names(plan, sources)
    start_ahead(workers)
    tokenizer = load_tokenizer(tokenizer_path, find_template(chat_template) if chat_template else None)
    require_tokens(tokenizer)
    require_arguments(tokenizer.template, recipe.template_arguments.keys() - RESERVED)
    with (
        sole_maker(output),
        naming(output),
        memory_limit() if workers == 1 else nullcontext(),
        whole_folder(output, overwrite=overwrite) as partial,
        Placer(partial, plan) as placer,
        tqdm(
            total=sum(one.size for one in sources), unit="B", unit_scale=True, desc="prepare", disable=not progress
        ) as bar,
    ):
        check_output(output, overwrite)  # another run may have made it since
        results = tokenize_chunks(tokenizer, recipe, _chunks(sources), workers)
        with open(partial / SKIPPED, "w", encoding="utf-8") if on_bad_row == "skip" else nullcontext() as skipped:
            rows = _place(results, placer, bar, skipped)
        rows.require_usable(sources, skip=on_bad_row == "skip")
        if on_bad_row == "skip" and not rows.num_bad:
            (partial / SKIPPED).unlink()
        return placer.finalize(
            notes={**rows.notes, **{f"{SKIPPED_NOTE}{reason}": count for reason, count in rows.reasons.most_common()}},
            vocabulary_size=tokenizer.vocabulary_size,
            eos_token_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer_path=os.path.abspath(tokenizer.path),
            template=tokenizer.template,
            template_source=_template_source(tokenizer, chat_template),
            num_skipped=rows.num_bad,
            sources=[source.describe() for source in sources],
        )


def _check_names(plan: Plan, sources: Sequence[InputFile]) -> None:
    """Where every input has a name, names without a share, and shares without an input, are told before any work."""
    names = {source.label for source in sources}
    if plan.shares is None or None in names:
        return
    wanted = {name for name, share in plan.shares.items() if share > 0}
    if wanted - names or names - plan.shares.keys():
        listed = [", ".join(sorted(map(str, some))) for some in (plan.shares.keys(), names)]
        raise ValueError(
            f"--mix: has the names {listed[0]}, and --input {listed[1]}: they must be the same (share 0: left out)"
        )


def _template_source(tokenizer: TextTokenizer, chat_template: str | Path | None) -> str:
    if tokenizer.template is None:
        return NO_TEMPLATE
    roles = "roles by generation marks" if tokenizer.marked else "roles by the text around each answer"
    return f"{chat_template or 'of the tokenizer'}, {roles}"


@dataclass(frozen=True)
class _Mark:
    """Goes with a chunk: where it is from, and bytes on disk that were read for it."""

    source: InputFile
    num_bytes: int


def _chunks(sources: Sequence[InputFile]) -> Iterator[tuple[_Mark, Chunk]]:
    for source in sources:
        before = 0
        for chunk in source.chunks():
            yield _Mark(source, source.position - before), chunk
            before = source.position


@dataclass
class _Rows:
    """What has been seen of the input."""

    num_rows: int = 0
    num_samples: int = 0
    num_bad: int = 0
    shown: list[BadPlace] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    """Of bad rows, with their numbers left out."""
    labels: set[str] = field(default_factory=set)
    """That rows have named."""

    def label(self, source: InputFile, named: str | None) -> str:
        """Label of a row's sample: the one given to the file, else what the row names as its source, else the file's stem."""
        if source.label or not named:
            return source.label or source.stem
        if named not in self.labels and len(self.labels) == MOST_LABELS:
            self.notes[f"rows name more than {MOST_LABELS:,} sources: the others have the name of their file"] += 1
            return source.stem
        self.labels.add(named)
        return named

    def refuse(self, bad: BadPlace) -> None:
        self.num_bad += 1
        if len(self.shown) < NUM_SHOWN:
            self.shown.append(bad)
        reason = re.sub(r"\d+", "…", bad.reason.partition("\n")[0])[:200]
        self.reasons[reason if reason in self.reasons or len(self.reasons) < NUM_REASONS else "other reasons"] += 1

    def require_usable(self, sources: Sequence[InputFile], *, skip: bool) -> None:
        """Raise ValueError, with the first bad rows, if there are any and they are an error, or nothing else is left."""
        if self.num_samples and (skip or not self.num_bad):
            return
        listed = "".join(f"\n  {bad.where}: {bad.reason}" for bad in self.shown)
        more = f"\n  … and {self.num_bad - len(self.shown):,} more" if self.num_bad > len(self.shown) else ""
        if not self.num_rows:
            raise ValueError(f"--input: {', '.join(one.path for one in sources[:3])}: there is no row: check the input")
        remedy = "correct them" if skip or not self.num_samples else "correct them or pass --on_bad_row skip"
        count = (
            f"none of {self.num_rows:,}" if self.num_bad == self.num_rows else f"{self.num_bad:,} of {self.num_rows:,}"
        )
        verb = "can" if self.num_bad == self.num_rows else "cannot"
        raise ValueError(f"{count} rows {verb} be prepared: {remedy}{listed}{more}")


def _place(results: Iterable[tuple[_Mark, TokenizedChunk]], placer: Placer, bar: tqdm, skipped: TextIO | None) -> _Rows:
    """Hand on the samples in order. All of the input is looked at before an error, so that it can say how many are bad."""
    seen = _Rows()
    for mark, chunk in results:
        labels = [seen.label(mark.source, named) for named in chunk.labels]
        rows = (seen.num_rows + chunk.rows).tolist()
        placer.extend(chunk.samples, rows, labels)
        for bad in chunk.bad:
            if skipped:
                skipped.write(json.dumps(bad.describe()) + "\n")
            seen.refuse(bad)
        seen.num_rows += chunk.num_rows
        seen.num_samples += len(chunk.labels)
        seen.notes += chunk.notes
        bar.update(mark.num_bytes)
        bar.set_postfix(rows=seen.num_rows, bad=seen.num_bad, refresh=False)
    return seen
