"""The first thing that programs do together: work out the plan, and agree that it works."""

from collections.abc import Callable

import torch.distributed as dist

from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.parallel import agree_on_problems
from megatron_sstoken.plan import RunPlan, plan_run


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
    return plan
