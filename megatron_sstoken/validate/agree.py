"""The first thing that programs do together: work out the plan, and agree that it works and is the same for all."""

import os
import platform
import uuid
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sstoken.checkpoint.manifest import PROBE, Checkpoint
from megatron_sstoken.checkpoint.weights_source import starting_weights
from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.model.backend import numerics_of
from megatron_sstoken.parallel import agree_on_problems, barrier, broadcast_object
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.validate.run import plan_run


def agreed_plan(settings: Settings, check: Callable[[RunPlan], Checkpoint | None] | None = None) -> RunPlan:
    """The plan of this run on every process, or SettingsError on every process with all problems of all of them.

    Everything that decides a run must be the same on all processes: settings, versions, data, weights, how layers round,
    and the checkpoint that `check` finds to resume from (it may raise SettingsError).
    """
    _require_equal(_facts_of_programs(settings))
    plan, newest, problems = None, None, []
    try:
        plan = plan_run(settings, dist.get_world_size())
        newest = check(plan) if check is not None else None
    except SettingsError as error:
        problems = error.problems
    agree_on_problems(problems)
    assert plan is not None
    _require_equal(_facts_of_plan(plan, newest))
    _require_shared("checkpoint.directory", settings.checkpoint.directory)
    return plan


def _facts_of_programs(settings: Settings) -> dict[str, Any]:
    """Setting → value, and what computes them."""
    facts = {f"{section}.{name}": value for section, group in asdict(settings).items() for name, value in group.items()}
    versions = {name: metadata.version(name) for name in ("torch", "megatron-core")}
    return facts | {f"the version of {name}": value for name, value in versions.items()} | {
        "the version of Python": ".".join(platform.python_version_tuple()[:2])
    }  # fmt: skip


def _facts_of_plan(plan: RunPlan, newest: Checkpoint | None) -> dict[str, Any]:
    """What lies in the files that the settings name, as far as it decides the run."""
    settings = plan.settings
    facts = {
        "the arithmetic of the layers (set model.backend; auto takes what a node has)": numerics_of(settings),
        "the content of data.train": plan.train.store.manifest.data_fingerprint,
        "the content of data.validation": plan.validation and plan.validation.store.manifest.data_fingerprint,
        "the architecture of model.hf_path": repr(plan.architecture),
        "the newest checkpoint of checkpoint.directory": newest and newest.state.step,
    }
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each node
        facts["the content of the starting weights"] = starting_weights(settings).fingerprint()
    return facts


def _require_equal(facts: dict[str, Any]) -> None:
    """SettingsError on every process, with both sides, for each fact of process 0 that another one states otherwise."""
    found: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, facts)
    problems = []
    for name, first in found[0].items():
        others = [(rank, one[name]) for rank, one in enumerate(found) if name in one and one[name] != first]
        for rank, other in others[:1]:
            problems.append(
                f"{name} is {first} on process 0 and {other} on process {rank}: give all nodes the same settings, packages "
                "and files"
            )
    if problems:
        raise SettingsError(problems)


def _require_shared(setting: str, directory: str | None) -> None:
    """SettingsError on every process unless all of them see what process 0 writes to a folder."""
    if directory is None or dist.get_world_size() == 1:
        return
    folder = Path(directory)
    problem, made = None, not folder.exists()
    probe = broadcast_object(folder / f"{PROBE}{uuid.uuid4().hex}", source=0)
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            problem = f"{setting}={directory} cannot be written: {error}: name another folder"
    barrier()
    if problem is None and not probe.exists():
        problem = f"{setting}={directory} of process {dist.get_rank()} is not that of process 0: name one that all nodes share"
    try:
        agree_on_problems([problem] if problem else [])
    finally:
        if dist.get_rank() == 0:
            probe.unlink(missing_ok=True)
            if made and not any(folder.iterdir()):
                folder.rmdir()
