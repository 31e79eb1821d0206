"""Token records without training: `torchrun … -m megatron_sstoken.score --config FILE.yaml --output PATH.parquet`."""

import os
import sys
from dataclasses import replace

from megatron_sstoken.command_line import parse_settings
from megatron_sstoken.config import CheckpointSettings, LoggingSettings, Settings, SettingsError
from megatron_sstoken.folders import writing_problem
from megatron_sstoken.tool import say_interrupted
from megatron_sstoken.validate.first import first_problems


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 for a mistake in the settings."""
    settings, options = parse_settings(
        arguments,
        program="python -m megatron_sstoken.score",
        description="Scores data.train with the starting weights, forward only, and writes one Parquet row per token. Of the "
        "settings of checkpoints and logs it uses logging.entropy, .context_loss and .record_text alone: it writes neither.",
        extra={"output": {"type": str, "required": True, "help": "Parquet file to write."}},
        check=lambda settings: first_problems(_of_scoring(settings)),
    )
    try:  # torch and megatron take seconds
        from megatron_sstoken.ending import run_to_exit_code
    except KeyboardInterrupt:
        return say_interrupted()

    return run_to_exit_code(lambda: run(settings, options["output"]), debug=options["debug"])


def run(settings: Settings, output: str) -> None:
    """History → model → records. Nothing else is written: what the settings say of checkpoints and logs is not used."""
    from megatron_sstoken.history.source import open_history
    from megatron_sstoken.parallel import agree_on_problems, create_layout, start_processes
    from megatron_sstoken.training.known import open_known
    from megatron_sstoken.training.loop import model_to_train
    from megatron_sstoken.training.records import texts_for, write_records
    from megatron_sstoken.training.selector import selector_of
    from megatron_sstoken.validate.agree import agreed_plan
    from megatron_sstoken.validate.whole import RunFiles

    if moving := history_that_moves(settings):
        raise SettingsError([moving])
    settings = _of_scoring(settings)
    start_processes(settings.training.timeout_minutes)
    problem = writing_problem("output", output)
    if os.path.isdir(output):
        problem = f"output={output} is a folder: name a file, as {output.rstrip('/')}/records.parquet"
    agree_on_problems([problem] if problem else [])
    plan = agreed_plan(settings)
    plan = replace(plan, num_packs=plan.train.order.num_packs(1))  # every sample once
    layout = create_layout(settings.parallel, settings.training.seed, settings.training.timeout_minutes)
    history = open_history(plan, layout)
    known = open_known(plan, layout, history)
    model = model_to_train(plan, layout, trainable=False)
    selector = selector_of(settings, layout, gamma=settings.selection.gamma, step=0, history=history)
    files = RunFiles(plan, layout, history=history.folders() + known.folders())
    texts = texts_for(plan, always=True) if layout.is_writer else None
    write_records(
        model, plan, layout, selector, output, known=known, texts=texts, before_publishing=files.require_whole
    )
    if layout.rank == 0:
        print(f"token records: {output}", flush=True)


def _of_scoring(settings: Settings) -> Settings:
    """The settings without those of what is not written."""
    said = settings.logging
    logging = LoggingSettings(entropy=said.entropy, context_loss=said.context_loss, record_text=said.record_text)
    return replace(settings, checkpoint=CheckpointSettings(), logging=logging)


def history_that_moves(settings: Settings) -> str | None:
    """Why there are no history losses without training."""
    from megatron_sstoken.history.source import source_of

    name = settings.history.source
    try:
        moves = source_of(settings).needs_training
    except (KeyError, ValueError):  # the source or the method does not exist, which is told with all else
        return None
    if not moves:
        return None
    return (
        f"history.source={name} compares with what training has gone through, and scoring trains nothing: "
        "use history.source=frozen, and name the weights with history.hf_path"
    )


if __name__ == "__main__":
    sys.exit(main())
