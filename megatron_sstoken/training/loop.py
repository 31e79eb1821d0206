"""The training loop: batch, step, report; checkpoints and validation in between."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron_sstoken.checkpoint.harmless import read_metadata, require_whole
from megatron_sstoken.checkpoint.manifest import (
    AdapterIdentity,
    Checkpoint,
    RunIdentity,
    RunState,
    check_identity,
    checkpoint_steps,
    differences,
    open_checkpoint,
    renamed,
)
from megatron_sstoken.checkpoint.save_load import load_checkpoint, save_checkpoint
from megatron_sstoken.checkpoint.weights_source import adapter_identity, require_base, starting_weights
from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.data.batches import BatchLoader
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.lock import Lock
from megatron_sstoken.model.build import Model, build_model
from megatron_sstoken.model.optimizer import build_optimizer, follow_settings
from megatron_sstoken.parallel import Layout, broadcast_object
from megatron_sstoken.passes.columns import gather_columns
from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.training.evaluate import validation_loss
from megatron_sstoken.training.interrupt import StopRequest
from megatron_sstoken.training.metrics import StepLogger, StepMetrics, summarize
from megatron_sstoken.training.records import RecordWriter
from megatron_sstoken.training.selector import selector_of, train_on_selected


@dataclass
class Trainer:
    """Everything a training step needs, and the number of steps done."""

    plan: RunPlan
    layout: Layout
    model: Model
    history: HistorySource
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    loader: BatchLoader
    logger: StepLogger
    adapters: AdapterIdentity | None = None
    """What is trained and saved, where that is adapters."""
    step: int = 0

    @property
    def settings(self) -> Settings:
        return self.plan.settings


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


_NOT_OF_RESULTS = ("validate_every", "micro_batch_size", "timeout_minutes")
"""Settings of the training loop that change nothing in what a run computes."""


def objective_of(plan: RunPlan) -> dict:
    """The settings that decide what a run computes, besides its identity; told where a resumed run changes them."""
    settings = plan.settings
    return {
        "selection": asdict(settings.selection),
        "history": asdict(settings.history),
        "model": asdict(settings.model),
        "optimizer": asdict(settings.optimizer),
        "training": {name: value for name, value in asdict(settings.training).items() if name not in _NOT_OF_RESULTS},
    }


def resumable_checkpoint(plan: RunPlan) -> Checkpoint | None:
    """The newest complete checkpoint of this run, or None. Raises SettingsError if it belongs to another run."""
    checkpoint = plan.settings.checkpoint
    steps = checkpoint_steps(checkpoint.directory) if checkpoint.directory and checkpoint.resume else {}
    if not steps:
        return None
    folder = steps[max(steps)]
    try:
        newest = open_checkpoint(str(folder))
        if int(os.environ.get("RANK", "0")) == 0:
            require_whole(folder, read_metadata(folder))
    except ValueError as error:
        told = (
            f"checkpoint.directory={checkpoint.directory}: {error}, or remove that folder to resume from the one before"
        )
        raise SettingsError([told]) from error
    check_identity(newest, identity_of(plan), plan.num_packs, plan.settings.lora)
    return newest


@contextmanager
def sole_writer(directory: str | None, layout: Layout) -> Iterator[None]:
    """Within, this run alone writes to its checkpoint directory. Raises SettingsError on all ranks if another one does."""
    if directory is None:
        yield
        return
    with Lock(Path(directory) / "run.lock") as lock:
        holder = broadcast_object(lock.take_or_wait() if layout.rank == 0 else None, source=0, group=layout.control)
        if holder is not None:
            raise SettingsError(
                [
                    f"checkpoint.directory={directory} is in use by another run ({holder}): name another one, or stop that run"
                ]
            )
        yield


def model_to_train(plan: RunPlan, layout: Layout, *, trainable: bool = True) -> Model:
    """The model of the run with its starting weights."""
    model = build_model(
        plan.architecture,
        plan.settings,
        layout,
        captured_layers=plan.captured_layers,
        with_entropy=plan.needs_entropy,
        trainable=trainable,
    )
    starting_weights(plan.settings).load(model)
    return model


def create_trainer(plan: RunPlan, layout: Layout, model: Model, history: HistorySource) -> Trainer:
    """Optimizer, data and logger around a model that holds its starting weights; resumes where there is a checkpoint."""
    optimizer, scheduler = build_optimizer(model, plan.settings.optimizer, plan.num_steps)
    loader = BatchLoader(
        plan.train.store,
        plan.train.order,
        plan.shape,
        data_rank=layout.data_rank,
        num_packs=plan.num_packs,
        history=history.token_values(),
    )
    logger = StepLogger(plan.settings.logging_directory, plan.settings.logging.every, plan.num_steps, layout)
    adapters = adapter_identity(plan.settings, layout)
    trainer = Trainer(plan, layout, model, history, optimizer, scheduler, loader, logger, adapters)
    newest = resumable_checkpoint(plan)
    if newest is not None:
        state = newest.state
        if state.adapters is not None:
            require_base(str(newest.folder), state.adapters, starting_weights(plan.settings).base, layout)
        history.load_state_dict(load_checkpoint(newest, model, optimizer, scheduler))
        follow_settings(optimizer, scheduler, plan.settings.optimizer)
        trainer.step = state.step
        logger.say(f"resumed from {newest.folder}: {trainer.step} of {plan.num_steps} steps are done")
        if changes := differences(renamed(state.objective), objective_of(plan)):
            logger.say("note: the run goes on with other settings: " + "; ".join(changes))
    return trainer


def train(trainer: Trainer) -> None:
    """Run the remaining steps; validate, write records and save as the settings say. All ranks call it.

    Asked to stop by SIGTERM or SIGUSR1, it ends after the step it is in, with a checkpoint of it.
    """
    with StopRequest() as stop:
        _train_until_asked_to_stop(trainer, stop)
    trainer.logger.close()


def _train_until_asked_to_stop(trainer: Trainer, stop: StopRequest) -> None:
    settings, plan = trainer.settings, trainer.plan
    trainer.model.train(True)
    trainer.logger.pause()
    for number in range(trainer.step, plan.num_steps):
        rate = get_canonical_lr_for_logging(trainer.optimizer.param_groups) or 0.0
        metrics, gradient_norm, reports = training_step(trainer, number)
        trainer.step = done = number + 1
        trainer.logger.step(done, metrics, gradient_norm, rate)
        last = done == plan.num_steps
        stopping = stop.agreed(trainer.layout) and not last
        if is_due(done, settings.logging.records_every):
            _write_step_records(trainer, reports, done)
        if plan.validation and not stopping and (last or is_due(done, settings.training.validate_every)):
            loss = validation_loss(trainer.model, plan.validation, plan, trainer.layout)
            trainer.logger.say(f"validation after step {done}: loss {loss:.4f}")
            trainer.logger.scalars(done, {"loss/validation": loss})
        if settings.checkpoint.directory and (last or stopping or is_due(done, settings.checkpoint.save_every)):
            save(trainer)
        if stopping:
            trainer.logger.say(f"asked to stop: ended after step {done} of {plan.num_steps}; start again to go on")
            return
        trainer.logger.pause()


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is done after `step`."""
    return every > 0 and step % every == 0


def training_step(trainer: Trainer, number: int) -> tuple[StepMetrics, float, list[TokenReport]]:
    """One optimizer step on global batch `number`. Returns its metrics, the gradient norm and this rank's reports.

    A batch of which no token is selected changes nothing but the learning rate. Raises FloatingPointError, on all
    ranks, where the loss or the gradient norm is not finite.
    """
    settings, model = trainer.settings, trainer.model
    warming_up = trainer.loader.num_samples_before(number) < settings.selection.warmup_samples
    gamma = 0.0 if warming_up else settings.selection.gamma
    selector = selector_of(settings, trainer.layout, gamma=gamma, step=number, history=trainer.history)
    model.zero_gradients()
    trainer.optimizer.zero_grad()
    reports = train_on_selected(model, trainer.loader.load(number), selector)
    trainer.history.observe(reports)
    metrics = summarize(reports, model.architecture, trainer.layout)
    gradient_norm = 0.0
    if metrics.num_selected:
        _require_finite(metrics.loss_selected, "the loss", number, settings)
        _, norm, _ = trainer.optimizer.step()
        gradient_norm = float(norm)
        _require_finite(gradient_norm, "the gradient norm", number, settings)
    else:
        trainer.logger.say(f"step {number + 1}: no token is selected, the weights stay as they are")
    trainer.scheduler.step(1)
    return metrics, gradient_norm, reports


def _require_finite(value: float, name: str, number: int, settings: Settings) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name} of step {number + 1} is {value}: try a lower optimizer.learning_rate "
            f"(now {settings.optimizer.learning_rate}) or training.precision=fp32; the checkpoints so far are untouched"
        )


def save(trainer: Trainer) -> None:
    """Save a checkpoint of the steps done."""
    plan, settings = trainer.plan, trainer.settings
    state = RunState(
        step=trainer.step,
        identity=identity_of(plan),
        hf_path=os.path.abspath(settings.model.hf_path or ""),
        num_packs=plan.num_packs,
        objective=objective_of(plan),
        adapters=trainer.adapters,
    )
    directory, keep = settings.checkpoint.directory or "", settings.checkpoint.keep
    history = trainer.history.state_dict()
    path = save_checkpoint(directory, state, trainer.model, trainer.optimizer, trainer.scheduler, keep, history)
    trainer.logger.say(f"saved {path}")


def _write_step_records(trainer: Trainer, reports: list[TokenReport], done: int) -> None:
    columns = gather_columns(reports, trainer.layout)
    if columns is not None:
        path = Path(trainer.settings.logging_directory or "") / "records" / f"step_{done:07d}.parquet"
        with RecordWriter(path) as writer:
            writer.write(columns)
