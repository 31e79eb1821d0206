"""Fine-tune on selected tokens: `torchrun --nproc-per-node N -m megatron_sstoken.train --config FILE.yaml`."""

import os
import sys

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.config import Settings
from megatron_sstoken.tool import say_interrupted
from megatron_sstoken.validate.first import first_problems

DRY_RUN: dict[str, dict] = {
    "dry_run": {
        "action": "store_true",
        "help": "Check everything, print the plan and the batch arithmetic, train nothing.",
    },
    "world_size": {
        "type": int,
        "default": None,
        "help": "With --dry_run: number of processes to plan for, here or elsewhere: what this machine lacks for it is a note "
        "(default: those that torchrun started, on this machine).",
    },
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 for a mistake in the settings."""
    settings, options = parse_settings(
        arguments,
        program="python -m megatron_sstoken.train",
        description=Settings.__doc__ or "",
        extra=DRY_RUN,
        check=first_problems,
    )
    try:  # torch and megatron take seconds, which nobody waits for who has mistyped a name
        from megatron_sstoken.ending import run_to_exit_code
    except KeyboardInterrupt:
        return say_interrupted()

    if options["dry_run"]:
        return run_to_exit_code(lambda: dry_run(settings, options["world_size"]), debug=options["debug"])
    return run_to_exit_code(lambda: run(settings), debug=options["debug"])


def dry_run(settings: Settings, world_size: int | None) -> None:
    """Print what a run would do, from rank 0, without starting process groups."""
    from megatron_sstoken.training.resume import changes_since, resumable_checkpoint
    from megatron_sstoken.validate.describe import describe
    from megatron_sstoken.validate.run import plan_run

    number = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    plan = plan_run(settings, number, dry_run=world_size is not None)
    newest = resumable_checkpoint(plan)
    if int(os.environ.get("RANK", "0")) == 0:
        print(describe(plan))
        if newest is not None:
            print(f"would resume from {newest.folder}")
            for change in changes_since(newest, plan):
                print(
                    f"note: the run would go on with other settings: {change}; another checkpoint.directory begins anew"
                )


def run(settings: Settings) -> None:
    """History → model → trainer → training."""
    from megatron_sstoken.checkpoint.writer import prepare_writer
    from megatron_sstoken.history.source import open_history
    from megatron_sstoken.parallel import create_layout, start_processes
    from megatron_sstoken.training.known import open_known
    from megatron_sstoken.training.loop import create_trainer, model_to_train, train
    from megatron_sstoken.training.next_commands import describe_commands, next_commands
    from megatron_sstoken.training.resume import resumable_checkpoint, resume_point
    from megatron_sstoken.training.run_folder import RunFolder, sole_writer
    from megatron_sstoken.validate.agree import agreed_plan
    from megatron_sstoken.validate.describe import describe
    from megatron_sstoken.validate.whole import RunFiles

    start_processes(settings.training.timeout_minutes)
    plan = agreed_plan(settings, check=resumable_checkpoint)
    layout = create_layout(settings.parallel, settings.training.seed, settings.training.timeout_minutes)
    with sole_writer(settings.checkpoint.directory, layout):
        if settings.checkpoint.directory:
            prepare_writer()  # it takes seconds, which pass beside the rest
        resume = resume_point(plan, layout)
        plan = resume.plan
        if layout.rank == 0:
            print(describe(plan), flush=True)
        from_step = resume.checkpoint.state.step if resume.checkpoint is not None else 0
        with RunFolder(plan, layout, from_step=from_step) as folder:
            history = open_history(plan, layout)
            known = open_known(plan, layout, history)
            files = RunFiles(plan, layout, resumed=resume.checkpoint, history=history.folders() + known.folders())
            model = model_to_train(plan, layout)
            trainer = create_trainer(
                plan, layout, model, history, known=known, resume=resume, files=files, folder=folder
            )
            train(trainer)
    if trainer.step == plan.num_steps and layout.rank == 0 and (commands := describe_commands(next_commands(plan))):
        print(commands, flush=True)


if __name__ == "__main__":
    sys.exit(main())
