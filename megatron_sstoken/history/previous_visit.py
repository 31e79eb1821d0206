"""History from the run itself: the loss of each token when its sample was last trained on, one epoch ago.

Nothing is computed for it. One process writes the losses of every step into a token column of the epoch, below the checkpoint
directory; a column for each epoch, so that a run which goes on from an older checkpoint finds what that one saw.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.data.column import VALUES, WRITTEN, TokenColumn, TokenColumnWriter
from megatron_sstoken.device import have_cuda
from megatron_sstoken.files import format_bytes, naming
from megatron_sstoken.history.frozen import Frozen, response_losses_missing, write_losses
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.integrity import differing_stretches, keep_stretches, read_stretches
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout, agree_on_problems, broadcast_object, writer_rank
from megatron_sstoken.passes.columns import gather_losses
from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.run_plan import RunPlan

FOLDER = "history"
"""Below `checkpoint.directory`."""


class PreviousVisit(HistorySource):
    """Reads what the latest earlier epoch has recorded of a sample; of a first visit what `history.first_visit` says.

    A sample has no record of a step that was skipped, nor of one before in the same global batch, where epochs meet: then
    the epoch before that counts, or it is a first visit.
    """

    name = "previous_visit"
    uses = frozenset({"first_visit", "hf_path", "store"})
    needs_training = True

    def __init__(self, plan: RunPlan, layout: Layout, first: Frozen | None, writer: int):
        """`first`: history of first visits; None: they are trained in full. `writer`: global rank of who writes."""
        self._store, self._layout, self._first, self._writer = plan.train.store, layout, first, writer
        self._directory = Path(plan.settings.checkpoint.directory or "") / FOLDER
        self._columns: dict[int, TokenColumn] = {}
        """Epoch → what was recorded until the last time that `_publish` or `load_state_dict` opened it."""
        self._writers: dict[int, TokenColumnWriter] = {}
        """On the process that writes: the columns that this start has written to."""
        self._resumed: set[int] = set()
        """Epochs of starts before that count."""
        self._open_from: int | None = None
        """The first epoch of the batch before: columns from there on may have grown."""
        self._epoch = 0
        """The last epoch of the batch before."""

    @classmethod
    def problems(cls, settings: Settings) -> list[str]:
        found = super().problems(settings)
        if settings.checkpoint.directory is None:
            found.append(
                "history.source=previous_visit keeps the losses of every epoch in checkpoint.directory, which is not set: name "
                "one, or use history.source=frozen"
            )
        history = settings.history
        for name in ("hf_path", "store"):
            if history.first_visit == "full" and (value := getattr(history, name)) is not None:
                found.append(
                    f"history.{name}={value} is not used with history.first_visit=full, which scores nothing: leave it out, or "
                    "use first_visit=frozen"
                )
        return found

    @classmethod
    def describe(cls, settings: Settings) -> str:
        first = "full" if settings.history.first_visit == "full" else Frozen.describe(settings)
        return f"{cls.name}, at first {first}"

    @classmethod
    def describe_work(cls, plan: RunPlan) -> str:
        first = plan.settings.history.first_visit
        scored = "first visits are trained in full" if first == "full" else Frozen.describe_work(_first_epoch(plan))
        epochs = plan.train.order.epoch(max(plan.num_packs - 1, 0)) + 1
        if epochs == 1:
            alone = "nothing is selected" if first == "full" else "this is history.source=frozen"
            return f"{scored}; no sample is visited twice in this run: {alone}"
        size = format_bytes(4 * int(plan.train.store.offsets[-1]))
        return f"{scored}; then losses of the visit before, {size} on disk for each of {epochs} epochs"

    @classmethod
    def open(cls, plan: RunPlan, layout: Layout) -> "PreviousVisit":
        """Raises SettingsError as `Frozen.open` where first visits need a store."""
        frozen = plan.settings.history.first_visit == "frozen"
        first = Frozen.open(_first_epoch(plan), layout) if frozen else None
        return cls(plan, layout, first, writer_rank(layout))

    def folders(self) -> list[Path]:
        return self._first.folders() if self._first is not None else []

    def prepare(self, model: Model, batches: list[TokenBatch]) -> list[TokenBatch]:
        """All ranks meet where this batch may need what the one before has recorded: where epochs meet."""
        assert batches[0].visits is not None, "made by a loader"
        first, last = batches[0].visits.epochs
        if self._open_from is not None and self._open_from < last:
            self._publish(self._open_from, last)
        self._open_from, self._epoch = first, last
        return [self._with_history(batch) for batch in batches] if self._layout.is_last_stage else batches

    def consult(self, model: Model, batches: list[TokenBatch]) -> list[TokenBatch]:
        """As at a visit in the epoch that the run is in."""
        if not self._layout.is_last_stage:
            return batches
        found = []
        for batch in batches:
            assert batch.visits is not None, "made by a loader"
            epochs = [self._epoch] * len(batch.visits.index)
            found.append(self._with_history(replace(batch, visits=replace(batch.visits, epoch=epochs))))
        return found

    def observe(self, reports: list[TokenReport]) -> None:
        """Losses are written at once, and are on disk when others need them or a checkpoint does."""
        losses = gather_losses(reports, self._layout) if reports else None
        if losses is None:
            return
        # A loss that is not finite says nothing, and an unselected token may have one.
        known = [one for one in losses if not response_losses_missing(one, self._store).any()]
        for epoch in sorted({one.epoch for one in known}):
            column = self._writer_of(epoch)
            with naming(column.path / VALUES):
                write_losses(column, self._store, [one for one in known if one.epoch == epoch])

    def state_dict(self) -> dict[str, Any]:
        """Which stretches of which epochs belong to a checkpoint of this step: their number and a checksum of their list."""
        state: dict[str, Any] = {}
        if self._layout.is_writer:
            self._commit()
            for epoch in sorted({*self._resumed, *self._writers}):
                stretches = read_stretches(self._path(epoch) / WRITTEN)
                state[str(epoch)] = {"stretches": len(stretches), "xxh3_128": _digest(stretches)}
        return {"epochs": broadcast_object(state, source=self._writer, group=self._layout.control)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Forget what was recorded after the checkpoint. Raises SettingsError, on all ranks, where its records are lost."""
        known = {int(epoch): described for epoch, described in state.get("epochs", {}).items()}
        problems = []
        if self._layout.is_writer:
            for epoch, described in known.items():
                try:
                    self._rewind(epoch, described)
                except (ValueError, OSError) as error:
                    problems.append(
                        f"checkpoint.directory: {error}: losses of epoch {epoch + 1} that this checkpoint compares with are "
                        "lost: resume from another one, or set history.source=frozen"
                    )
        agree_on_problems(problems)
        self._resumed = set(known)
        self._columns = {epoch: TokenColumn(self._path(epoch)) for epoch in known}

    def _with_history(self, batch: TokenBatch) -> TokenBatch:
        """A batch with the losses of earlier visits; samples without are exempt from selection."""
        visits, facts = batch.visits, batch.facts
        assert visits is not None
        history = np.full(len(facts.response), np.nan, dtype=np.float32)
        exempt = np.zeros(len(facts.response), dtype=bool)
        starts = np.flatnonzero((batch.segment >= 0).numpy() & (batch.position == 0).numpy())
        counts = [0] * batch.num_segments
        for number, (start, length) in enumerate(zip(starts, facts.sample_lengths, strict=True)):
            here = slice(start, start + length)
            past = self._recorded(visits.index[number], visits.epoch[number])
            if past is None:
                exempt[here] = facts.response[here]
                counts[number] = facts.response_counts[number]
            else:
                history[here] = past[:length]
        return replace(
            batch,
            history_loss=_like(batch.segment, torch.from_numpy(history)),
            exempt=_like(batch.segment, torch.from_numpy(exempt)) if any(counts) else None,
            facts=replace(facts, exempt_counts=counts if any(counts) else None),
        )

    def _recorded(self, index: int, epoch: int) -> np.ndarray | None:
        """fp32 [its length in the store]: losses of a sample at the latest visit before `epoch`; None where there are none."""
        start, stop = self._store.offsets[index : index + 2]
        earlier = [self._columns[one] for one in range(epoch - 1, -1, -1) if one in self._columns]
        for column in [*earlier, *([self._first.column] if self._first is not None else [])]:
            if column.holds(start[None], stop[None])[0]:
                return column.values(int(start), int(stop))
        return None

    def _publish(self, first: int, stop: int) -> None:
        """Bring what was recorded of the epochs [first, stop) to all processes, who all call it, on whatever nodes they are.

        Files are opened anew, after they are on disk: a network file system then shows them as they are.
        """
        if self._layout.is_writer:
            self._commit()
        there = sorted({*self._resumed, *self._writers})
        there = broadcast_object(there, source=self._writer, group=self._layout.control)
        for epoch in range(first, stop):
            if epoch in there:
                self._columns[epoch] = TokenColumn(self._path(epoch))

    def _path(self, epoch: int) -> Path:
        return self._directory / f"epoch_{epoch + 1:04d}"

    def _writer_of(self, epoch: int) -> TokenColumnWriter:
        if epoch not in self._writers:
            path = self._path(epoch)
            if epoch not in self._resumed:  # of a start that this one does not go on from
                shutil.rmtree(path, ignore_errors=True)
            identity = {"data": self._store.manifest.data_fingerprint, "losses_of_epoch": epoch + 1}
            self._writers[epoch] = TokenColumnWriter(path, identity, int(self._store.offsets[-1]))
        return self._writers[epoch]

    def _commit(self) -> None:
        for writer in self._writers.values():
            with naming(writer.path / VALUES):
                writer.commit()

    def _rewind(self, epoch: int, described: dict[str, Any]) -> None:
        """Cut an epoch's stretches to those of a checkpoint. Raises ValueError or OSError where these are not as they were."""
        path, number = self._path(epoch), int(described["stretches"])
        stretches = read_stretches(path / WRITTEN)[:number]
        if len(stretches) != number or _digest(stretches) != described["xxh3_128"]:
            raise ValueError(f"{path} is not as it was when the checkpoint was saved")
        for problem in differing_stretches(path / VALUES, stretches):
            raise ValueError(problem)
        keep_stretches(path / WRITTEN, number)


def _first_epoch(plan: RunPlan) -> RunPlan:
    """The plan of a run that ends where `plan` begins its second epoch."""
    return replace(plan, num_packs=min(plan.num_packs, plan.train.order.num_packs(1)))


def _digest(stretches: np.ndarray) -> str:
    return xxhash.xxh3_128(stretches.tobytes()).hexdigest()


def _like(other: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values in pinned memory where `other` is."""
    return values.pin_memory() if have_cuda() and other.is_pinned() else values
