"""Checkpoints: megatron's `dist_checkpointing`, complete or absent, resumable on any layout.

A checkpoint is a folder `step_<number>` that appears by renaming, once everything in it is on disk.
"""

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sstoken.checkpoint.harmless import missing_parts, read_metadata, require_harmless, require_whole
from megatron_sstoken.checkpoint.manifest import (
    Checkpoint,
    RunState,
    drop,
    tidy,
    write_run_state,
)
from megatron_sstoken.checkpoint.optimizer_state import (
    HISTORY_WEIGHTS,
    load_copy,
    load_optimizer_state,
    sharded_copy,
    sharded_optimizer_state,
)
from megatron_sstoken.checkpoint.writer import Writing, prepare_writer
from megatron_sstoken.compat import load_options, save_options
from megatron_sstoken.config import SettingsError
from megatron_sstoken.device import compute_device
from megatron_sstoken.files import publish_folder, write_durably, write_failure
from megatron_sstoken.integrity import checksum_of, write_checksums
from megatron_sstoken.model.build import Model
from megatron_sstoken.model.lora_targets import is_adapter
from megatron_sstoken.model.optimizer import WeightsCopy
from megatron_sstoken.parallel import Layout, broadcast_object, gather_objects, is_lost_connection

_COPY = "history_weights"
"""The copy of the weights in the state that `dist_checkpointing` is given."""
NO_FILES: Mapping[str, str] = MappingProxyType({})
_EXTRA = "_extra_state"  # Transformer Engine's name for the scales and largest values of FP8 training


@dataclass
class UnfinishedSave:
    """A checkpoint that is being written beside training; it appears with `finish`."""

    directory: str
    state: RunState
    """What it will say of itself. May change until it is finished."""
    layout: Layout
    split: list
    partial: Path
    writing: Writing
    files: Mapping[str, str] = field(default_factory=dict)
    """Name → text of what else process 0 puts into the folder."""

    @property
    def is_written(self) -> bool:
        """Whether this rank's part is on disk, or will never be."""
        return self.writing.is_over

    def finish(self, keep: int | None) -> Path:
        """Wait until all parts are on disk, and publish the checkpoint; then drop all but the `keep` newest.

        0 keeps all, None drops nothing; of a run that has diverged only the newest stays, and does not count. All ranks call
        it. Raises OSError, on all ranks, where a part could not be written.
        """
        try:
            return self._finish(keep)
        finally:
            self.abandon()  # where something else went wrong, or Ctrl-C was pressed

    def _finish(self, keep: int | None) -> Path:
        layout, partial = self.layout, self.partial
        told = gather_objects(self.writing.wait(), layout)
        problems = [f"process {rank}: {one}" for rank, one in enumerate(told) if isinstance(one, str)]
        with _as_failure(partial, problems):
            self.writing.finalize()
            if problems:
                raise ChildProcessError
        dist.barrier(group=layout.control)
        _require_whole(self.directory, partial, layout)
        final = partial.with_suffix("")
        if dist.get_rank() == 0:
            for name, text in self.files.items():
                write_durably(partial / name, text)
            write_run_state(partial, replace(self.state, split=self.split))
            written = {name: checksum for one in told if not isinstance(one, str) for name, checksum in one.items()}
            others = [path for path in partial.iterdir() if path.name not in written]
            write_checksums(partial, written | {path.name: checksum_of(path) for path in others})
            drop(final)
            publish_folder(partial, final, overwrite=False)
            if keep is not None:
                tidy(self.directory, keep)
        dist.barrier(group=layout.control)
        return final

    def abandon(self) -> None:
        """Leave unfinished what is not, as a kill does: another process has failed, and nobody waits for anybody."""
        self.writing.abandon()


def begin_save(
    directory: str,
    state: RunState,
    model: Model,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    history: dict[str, Any] | None = None,
    copy: WeightsCopy = (),
    files: Mapping[str, str] = NO_FILES,
) -> UnfinishedSave:
    """Begin to save everything that resuming needs, as it is now: training may go on at once. All ranks call it.

    Without an optimizer only the weights are saved (conversion); of a model with adapters these alone. `history`: what the
    history source wants to find again, the same on every rank; `copy`: its copy of the weights. `files`: name → text of what
    else process 0 puts into the folder. One save at a time. Raises OSError where nothing can be written.
    """
    assert (state.adapters is not None) == model.has_adapters
    partial = Path(directory) / f"step_{state.step:07d}.partial"
    if dist.get_rank() == 0:
        drop(partial)
        partial.mkdir(parents=True)
    dist.barrier(group=model.layout.control)
    content = _sharded_state(model, optimizer, scheduler, copy, adapters=model.has_adapters, is_loading=False)
    content["random"] = _random_states(model)
    if history:
        content["history"] = history
    prepare_writer()
    with _as_failure(partial):
        request = dist_checkpointing.save(
            content, str(partial), validate_access_integrity=True, async_sharded_save=True, **save_options()
        )
        writing = Writing(request, partial, model.layout.rank)
    return UnfinishedSave(directory, state, model.layout, _split(model), partial, writing, files)


def save_checkpoint(
    directory: str,
    state: RunState,
    model: Model,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    keep: int | None,
    history: dict[str, Any] | None = None,
    copy: WeightsCopy = (),
) -> Path:
    """`begin_save` and `finish` in one. All ranks call it."""
    return begin_save(directory, state, model, optimizer, scheduler, history, copy).finish(keep)


@contextmanager
def _as_failure(partial: Path, problems: Sequence[str] = ()) -> Iterator[None]:
    """Within, what goes wrong with files is an OSError, which says the first of the `problems`, if there are any."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # the second is no Exception
        if is_lost_connection(error):
            raise
        failure = OSError(errno.ECHILD, problems[0], str(partial)) if problems else write_failure(error, partial)
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what is in the way of room
        raise failure from error


def load_checkpoint(
    checkpoint: Checkpoint,
    model: Model,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    copy: WeightsCopy = (),
) -> dict[str, Any]:
    """Load weights and, where given, optimizer and scheduler, on any layout. All ranks call it.

    A checkpoint of adapters fills the adapters of a model and what is trained whole beside them, and nothing else; any other
    checkpoint all but the adapters. Random states belong to processes: they come back where the layout is as it was. `copy`:
    that of the history source, filled where it is given, which a checkpoint must then hold (`holds_copy`). Returns the state of
    the history source, which may be empty.
    """
    folder, adapters = checkpoint.folder, checkpoint.state.adapters is not None
    stored = _require_readable(checkpoint, model.layout)
    wanted = _sharded_state(model, optimizer, scheduler, copy, adapters=adapters, is_loading=True)
    same_split = checkpoint.state.split == _split(model)
    if optimizer is not None and same_split:
        wanted["random"] = _random_object(model) if _OBJECT in stored else _random_states(model)
    state, _, absent = dist_checkpointing.load(
        wanted, str(folder), strict=StrictHandling.RETURN_UNEXPECTED, **load_options(folder)
    )
    _require_only_extra(absent, folder)
    for name, chunk in zip(_chunk_names(model), model.unwrapped, strict=True):
        _load_chunk(chunk, state[name], _belongs(model, adapters=adapters))
    if optimizer is not None:
        model.needs_calibration = False  # the scales of the run are in its checkpoint
        load_optimizer_state(optimizer, state["optimizer"])
    if copy:
        load_copy(copy, state[_COPY])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if "random" in wanted:
        _set_random_states(state["random"])
    return state.get("history", {})


def holds_copy(checkpoint: Checkpoint, layout: Layout) -> bool:
    """Whether a checkpoint holds a copy of the weights that history losses are scored with. All ranks call it."""
    found = layout.rank == 0 and any(
        name.startswith(HISTORY_WEIGHTS) for name in checkpoint.metadata.state_dict_metadata
    )
    return broadcast_object(found, source=0, group=layout.control)


def _require_whole(directory: str, partial: Path, layout: Layout) -> None:
    """Raise SettingsError on all ranks unless rank 0 sees every file that the ranks say they wrote, with its length."""
    missing = missing_parts(partial, read_metadata(partial)) if dist.get_rank() == 0 else []
    if missing := broadcast_object(missing, source=0, group=layout.control):
        raise SettingsError(
            [
                f"checkpoint.directory={directory}: process 0 does not see {len(missing)} of the files that other processes "
                f"wrote ({', '.join(missing[:3])}): name a folder that all nodes share"
            ]
        )


def _require_readable(checkpoint: Checkpoint, layout: Layout) -> set[str]:
    """The names of what a checkpoint stores, without the numbers of processes behind objects.

    Raises SettingsError on all ranks where rank 0 finds it damaged, or what could run code.
    """
    folder, problem, names = checkpoint.folder, None, set()
    if dist.get_rank() == 0:
        try:
            require_harmless(folder, checkpoint.metadata)
            require_whole(folder, checkpoint.metadata)
            names = {name.split("/shard_")[0] for name in checkpoint.metadata.state_dict_metadata}
        except ValueError as error:
            problem = str(error)
    problem, names = broadcast_object((problem, names), source=0, group=layout.control)
    if problem:
        raise SettingsError([problem])
    return names


def _belongs(model: Model, *, adapters: bool) -> Callable[[str], bool]:
    """Which names a checkpoint holds: of adapters, or of weights."""
    return model.is_tuned if adapters else lambda name: not is_adapter(name)


def _load_chunk(chunk: torch.nn.Module, state: dict[str, Any], belongs: Callable[[str], bool]) -> None:
    """Load the weights of a chunk that belong to the checkpoint.

    Transformer Engine's state of FP8 scaling is taken where it is there.
    """
    keys = chunk.load_state_dict(state, strict=False)
    needed = [name for name in keys.missing_keys if belongs(name) and not name.endswith(_EXTRA)]
    wrong = [*keys.unexpected_keys, *needed]
    assert not wrong, f"weights that do not fit the model: {wrong}"


def _require_only_extra(absent: set[str], folder: Path) -> None:
    """Raise SettingsError where a checkpoint lacks more than state of FP8 scaling, which not every run has."""
    if lacking := sorted(name for name in absent if not name.endswith(_EXTRA)):
        names = ", ".join(lacking[:5])
        raise SettingsError([f"{folder} lacks {names}, so it is of another model, or damaged: name another checkpoint"])


def _chunk_names(model: Model) -> list[str]:
    return [f"model{index}" for index in range(len(model.unwrapped))]


def _sharded_state(
    model, optimizer, scheduler, copy: WeightsCopy, *, adapters: bool, is_loading: bool
) -> dict[str, Any]:
    """The state to save or load: of the adapters with what is trained beside them, or of all weights but adapters."""
    belongs = _belongs(model, adapters=adapters)
    metadata = {"dp_cp_group": model.layout.groups.dp_cp}
    chunks = {
        name: {key: value for key, value in chunk.sharded_state_dict(metadata=metadata).items() if belongs(key)}
        for name, chunk in zip(_chunk_names(model), model.unwrapped, strict=True)
    }
    state: dict[str, Any] = dict(chunks)
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer_state(optimizer, chunks, metadata, is_loading=is_loading)
    if copy:
        state[_COPY] = sharded_copy(copy, chunks)
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    return state


def _split(model: Model) -> list:
    """What random states depend on: the layout, and the kind of device."""
    layout = model.layout
    return [layout.tensor_size, layout.pipeline_size, layout.groups.dp_cp.size(), compute_device().type]


_OBJECT = "random"
"""Where checkpoints of versions before kept random states, as an object of each process."""


def _random_states(model: Model) -> dict[str, Any]:
    """The generators that dropout draws from, as tensors: one set for each process."""
    sizes, place = _places(model)
    states = {"torch": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    trackers = tensor_parallel.get_cuda_rng_tracker().get_states()

    def sharded(name: str, state: torch.Tensor) -> ShardedTensor:
        offsets = [(axis, index, size) for axis, (index, size) in enumerate(zip(place, sizes, strict=True))]
        whole = state.reshape(1, 1, 1, -1)
        return ShardedTensor.from_rank_offsets(f"random.{name}", whole, *offsets)

    return {name: sharded(name, state) for name, state in states.items()} | {
        "tracker": {name: sharded(f"tracker.{name}", state) for name, state in trackers.items()}
    }


def _random_object(model: Model) -> ShardedObject:
    """The same as checkpoints of versions before hold it."""
    sizes, place = _places(model)
    return ShardedObject(_OBJECT, None, sizes, place)


def _places(model: Model) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Over how many processes random states are dealt out, and which of them this one is."""
    layout = model.layout
    return (
        (layout.tensor_size, layout.pipeline_size, layout.groups.dp_cp.size()),
        (layout.tensor_rank, layout.pipeline_rank, layout.groups.dp_cp.rank()),
    )


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].flatten())
    torch.cuda.set_rng_state(states["device"].flatten())
    trackers = {name: state.flatten() for name, state in states["tracker"].items()}
    tensor_parallel.get_cuda_rng_tracker().set_states(trackers)
