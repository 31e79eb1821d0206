"""Which checkpoint a run goes on from, and what of it must be as it was."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_sstoken.checkpoint.harmless import require_whole
from megatron_sstoken.checkpoint.manifest import (
    Checkpoint,
    RunIdentity,
    check_identity,
    checkpoint_steps,
    differences,
    has_diverged,
    open_checkpoint,
    read_run_state,
    renamed,
    set_aside,
    without_description,
)
from megatron_sstoken.config import SettingsError
from megatron_sstoken.parallel import Layout, agree_on_problems, broadcast_object
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.validate.checkpoint_model import other_model
from megatron_sstoken.validate.whole import checkpoint_files

_NOT_OF_RESULTS = ("validate_every", "micro_batch_size", "timeout_minutes", "verify", "on_nonfinite")
"""Settings of the training loop that change nothing in what a run computes."""


def identity_of(plan: RunPlan) -> RunIdentity:
    """What a checkpoint must agree on to be resumed in this run."""
    data, training = plan.settings.data, plan.settings.training
    return RunIdentity(
        data_fingerprint=plan.train.store.manifest.data_fingerprint,
        sequence_length=data.sequence_length,
        too_long=data.too_long,
        packing=data.packing,
        shuffle=data.shuffle,
        seed=training.seed,
        global_batch_size=training.global_batch_size,
    )


def objective_of(plan: RunPlan, known: Mapping[str, str]) -> dict:
    """What decides what a run computes, besides its identity; told where a resumed run changes it.

    These are settings, and `known`: digests of what is known of tokens before training, such as the content of files.
    """
    settings = plan.settings
    return {
        "selection": asdict(settings.selection),
        "weights": {
            **asdict(settings.weights),
            "method": plan.weight_method,
            "alpha": plan.weight.exponent(settings.weights.alpha),
        },
        "history": asdict(settings.history),
        "known": dict(known),
        "model": asdict(settings.model),
        "optimizer": asdict(settings.optimizer),
        "training": {name: value for name, value in asdict(settings.training).items() if name not in _NOT_OF_RESULTS},
    }


def changes_since(checkpoint: Checkpoint, plan: RunPlan, known: Mapping[str, str] | None = None) -> list[str]:
    """What of `objective_of` a resumed run changes, as 'selection.rho: 0.6 → 0.9'; `known` is left out where it is None."""
    return differences(renamed(checkpoint.state.objective), objective_of(plan, known or {}))


def resumable_checkpoint(plan: RunPlan) -> Checkpoint | None:
    """The checkpoint that this run would go on from, or None.

    Raises SettingsError where it belongs to another run, is damaged, or is of a run that had diverged.
    """
    return _search(plan, {}).checkpoint


@dataclass
class _Search:
    """A checkpoint to go on from, and the newer ones that were passed over because they are damaged."""

    checkpoint: Checkpoint | None
    damaged: dict[int, str] = field(default_factory=dict)
    """Step → what is wrong."""


def _search(plan: RunPlan, damaged: dict[int, str]) -> _Search:
    """As `resumable_checkpoint`, with steps that are known to be damaged."""
    settings = plan.settings.checkpoint
    directory, wanted = settings.directory, settings.resume
    if not directory or wanted is False:
        return _Search(None)
    steps, damaged = checkpoint_steps(directory), dict(damaged)
    if not steps and (lost := without_description(directory)):
        raise SettingsError(
            [
                f"checkpoint.directory={directory}: {lost[-1]} has lost its sstoken.json, and no other checkpoint is there: "
                "remove the folder to start anew"
            ]
        )
    chosen = None if wanted is True else _of_branch(steps, wanted, directory)
    while candidates := [step for step in steps if step not in damaged]:
        step = max(candidates) if chosen is None else chosen
        try:
            found = open_checkpoint(str(steps[step]))
            if settings.on_damaged == "previous" or int(os.environ.get("RANK", "0")) == 0:
                require_whole(found.folder, found.metadata)
        except ValueError as error:
            if settings.on_damaged == "stop" or chosen is not None:
                raise _damaged(directory, str(error)) from error
            damaged[step] = str(error)
            continue
        _refuse_diverged(found, step == wanted and wanted is not True, steps)
        hf_path = plan.settings.model.hf_path or ""
        if problem := other_model(found, plan.architecture, hf_path):
            raise SettingsError(
                [f"cannot resume from {found.folder}: {problem}: use it, or another checkpoint.directory"]
            )
        check_identity(found, identity_of(plan), plan.settings)
        return _Search(found, damaged)
    if damaged:
        raise _damaged(directory, "all checkpoints are damaged: " + "; ".join(damaged.values()))
    return _Search(None)


def _damaged(directory: str, problem: str) -> SettingsError:
    return SettingsError(
        [
            f"checkpoint.directory={directory}: {problem}, or set checkpoint.on_damaged=previous (or remove that folder) to "
            "resume from the one before"
        ]
    )


def _of_branch(steps: dict[int, Path], wanted: int, directory: str) -> int:
    """The newest step that descends from a start with `checkpoint.resume=wanted`, or that step itself."""
    branch = [step for step, folder in steps.items() if step > wanted and _branch_of(folder) == wanted]
    if not branch and wanted not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise SettingsError(
            [
                f"checkpoint.resume={wanted} is not in checkpoint.directory={directory}, which has {there}: use one of these"
            ]
        )
    return max(branch, default=wanted)


def _branch_of(folder: Path) -> int | None:
    try:
        return read_run_state(folder).branch
    except ValueError:
        return None


def _refuse_diverged(found: Checkpoint, is_chosen: bool, steps: dict[int, Path]) -> None:
    """Raise SettingsError where a run had diverged, unless this very step was asked for."""
    if found.state.diverged is None or is_chosen:
        return
    sound = [step for step, folder in steps.items() if step < found.state.step and not has_diverged(folder)]
    before = f"checkpoint.resume={max(sound)}" if sound else "another checkpoint.directory"
    raise SettingsError(
        [
            f"checkpoint.directory: {found.folder} is of a run that had diverged ({found.state.diverged}): lower "
            f"optimizer.learning_rate and go on from before with {before}; checkpoint.resume={found.state.step} takes it "
            "nevertheless"
        ]
    )


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins."""

    plan: RunPlan
    """The run's, told by how many packs its batches lag."""
    checkpoint: Checkpoint | None
    branch: int | None = None
    """The step that `checkpoint.resume` chose, now or in a start before."""


def resume_point(plan: RunPlan, layout: Layout) -> ResumePoint:
    """Choose the checkpoint to go on from and put others out of its way. All ranks call it; one run at a time in a directory.

    What `resumable_checkpoint` found before may be outdated: another run may have saved until this one had the directory.
    Raises SettingsError, on all ranks, as `resumable_checkpoint`.
    """
    settings = plan.settings.checkpoint
    found = _agreed_search(plan, {})
    while found.checkpoint is not None and settings.on_damaged == "previous" and plan.settings.training.verify != "off":
        problems = _damage(found.checkpoint, layout)
        if not problems:
            break
        if settings.resume is not True:
            raise _damaged(settings.directory or "", problems[0])
        found = _agreed_search(plan, found.damaged | {found.checkpoint.state.step: problems[0]})
    if found.checkpoint is None:
        return ResumePoint(plan, None)
    state, wanted = found.checkpoint.state, settings.resume
    branch = state.branch if wanted is True else int(wanted)
    if layout.rank == 0:
        _clear_the_way(settings.directory or "", state.step, found.damaged)
    broadcast_object(None, source=0, group=layout.control)
    batch = plan.shape.global_batch_size
    done = min(state.step * batch - state.lag, state.num_packs)
    lag = state.step * batch - done
    num_packs = plan.num_packs
    if plan.settings.training.steps is not None:
        num_packs -= lag  # as many steps as were asked for
    return ResumePoint(replace(plan, lag=lag, num_packs=max(num_packs, 0)), found.checkpoint, branch)


def _agreed_search(plan: RunPlan, damaged: dict[int, str]) -> _Search:
    found, problems = _Search(None), []
    try:
        found = _search(plan, damaged)
    except SettingsError as error:
        problems = error.problems
    agree_on_problems(problems)
    return found


def _damage(checkpoint: Checkpoint, layout: Layout) -> list[str]:
    """What is wrong with a checkpoint's files, every rank comparing its share; the same answer on all ranks."""
    try:
        part = checkpoint_files("checkpoint.directory", checkpoint.folder, layout, remedy="name another checkpoint")
        agree_on_problems(part.damage())
    except SettingsError as error:
        return error.problems
    return []


def _clear_the_way(directory: str, step: int, damaged: dict[int, str]) -> None:
    """Rename the checkpoints that are newer than the one that is taken."""
    for newer, folder in checkpoint_steps(directory).items():
        if newer > step:
            why = "damaged" if newer in damaged else "aside"
            reason = f": {damaged[newer]}" if newer in damaged else ""
            print(f"note: {folder} is now {set_aside(folder, why).name}{reason}", flush=True)
