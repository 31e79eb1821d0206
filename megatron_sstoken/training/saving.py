"""When a run saves, what its checkpoints are worth, and that each is whole before the run ends."""

import time
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sstoken import watchdog
from megatron_sstoken.checkpoint.manifest import RunState, mark_diverged, tidy
from megatron_sstoken.checkpoint.save_load import NO_FILES, UnfinishedSave, begin_save
from megatron_sstoken.config import CheckpointSettings, SettingsError
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout
from megatron_sstoken.training.logger import StepLogger


class Saver:
    """The checkpoints of a run: one at a time is written, beside training or not.

    While entered, a checkpoint that is being written is finished before anything else happens, also where the run ends
    because of what all processes know alike; where one process fails alone, nobody waits for the checkpoint.
    """

    def __init__(self, settings: CheckpointSettings, layout: Layout, logger: StepLogger):
        self._settings, self._is_first, self._logger = settings, layout.rank == 0, logger
        self._unfinished: UnfinishedSave | None = None
        self._keep: int | None = None
        """What is kept of the older ones once it is finished; None: all of them, until it has proved to be sound."""
        self._begun = time.monotonic()
        self.newest: int | None = None
        """The step of the newest checkpoint: saved last, or gone on from."""

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, SettingsError | FloatingPointError):
            self.finish()
        elif self._unfinished is not None:
            self._unfinished.abandon()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._unfinished is not None and not self._unfinished.is_written

    @property
    def minutes_are_over(self) -> bool:
        """On process 0: whether `checkpoint.save_minutes` have passed since it last began to save, or the run began."""
        minutes = self._settings.save_minutes
        return self._is_first and minutes > 0 and time.monotonic() - self._begun >= 60 * minutes

    def begin(
        self,
        state: RunState,
        model: Model,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        history: HistorySource,
        *,
        files: Mapping[str, str] = NO_FILES,
        final: bool,
    ) -> None:
        """Begin to save a step, once the one before is finished. All ranks call it.

        `files`: what process 0 puts into the checkpoint besides.
        `final`: no step comes after it that could tell whether it is sound.
        """
        self.finish()
        watchdog.arrived(f"saving step {state.step}")
        self._begun = time.monotonic()
        directory = self._settings.directory or ""
        self._unfinished = begin_save(
            directory, state, model, optimizer, scheduler, history.state_dict(), history.weights_copy(), files
        )
        self._keep = self._settings.keep if final else None
        self.newest = state.step

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole. All ranks call it. Raises OSError where it failed."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return
        watchdog.arrived(f"finishing the checkpoint of step {unfinished.state.step}")
        path = unfinished.finish(self._keep)
        self._logger.say(f"saved {path}")
        if diverged := unfinished.state.diverged:
            self._logger.say(f"warning: the run has diverged ({diverged}): no run goes on from {path} unless told to")

    def judge(self, step: int, diverged: str | None) -> None:
        """Tell what the loss of the next step says of the weights after `step`: if they were saved, they are good or marked.

        Good ones take the place of older ones only now. All ranks call it.
        """
        if self.newest != step:
            return
        directory, unfinished = self._settings.directory, self._unfinished
        if unfinished is not None:
            unfinished.state = replace(unfinished.state, diverged=diverged or unfinished.state.diverged)
            self._keep = self._settings.keep if diverged is None else None
        elif directory and self._is_first:
            if diverged is not None:
                mark_diverged(directory, step, diverged)
            else:
                tidy(directory, self._settings.keep)
