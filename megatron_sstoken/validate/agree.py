"""The first thing that programs do together: work out the plan, and agree that it works."""

from collections.abc import Callable

import torch.distributed as dist

from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.model.backend import numerics_of
from megatron_sstoken.parallel import agree_on_problems
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.validate.run import plan_run


def agreed_plan(settings: Settings, check: Callable[[RunPlan], object] | None = None) -> RunPlan:
    """The plan of this run on every process, or SettingsError on every process with all problems of all of them.

    `check` looks at the plan too and may raise SettingsError.
    """
    plan, problems = None, []
    try:
        plan = plan_run(settings, dist.get_world_size())
        if check is not None:
            check(plan)
    except SettingsError as error:
        problems = error.problems
    agree_on_problems(problems)
    assert plan is not None
    _require_equal(numerics_of(settings))
    return plan


def _require_equal(numerics: str) -> None:
    """SettingsError on every process if their layers would round differently: `auto` depends on what a node has installed."""
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, numerics)
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise SettingsError(
            [
                f"layers would compute in {found[0]} on process 0 and in {found[other]} on process {other}: give all nodes the "
                "same settings and packages, or set model.backend (auto takes what a node has)"
            ]
        )
