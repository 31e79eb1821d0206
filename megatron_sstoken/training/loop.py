"""The training loop: batch, step, report; checkpoints and validation in between."""

import gc
import math
import os
from dataclasses import dataclass

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging

from megatron_sstoken import watchdog
from megatron_sstoken.checkpoint.manifest import AdapterIdentity, RunState
from megatron_sstoken.checkpoint.save_load import holds_copy, load_checkpoint
from megatron_sstoken.checkpoint.weights_source import adapter_identity, require_base, starting_weights
from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import BatchLoader
from megatron_sstoken.data.prefetch import Prefetcher
from megatron_sstoken.data.sources import NO_SOURCES, Sources
from megatron_sstoken.device import device_name
from megatron_sstoken.gpus import peak_flops
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.model.build import Model, build_model
from megatron_sstoken.model.optimizer import build_optimizer, follow_settings, gradient_norm
from megatron_sstoken.model.optimizer import step as optimizer_step
from megatron_sstoken.parallel import Layout, any_of
from megatron_sstoken.passes.step import TokenReport, calibrate
from megatron_sstoken.run_plan import DataPlan, RunPlan
from megatron_sstoken.training.drift import DriftMonitor
from megatron_sstoken.training.evaluate import validation_losses
from megatron_sstoken.training.interrupt import StopRequest
from megatron_sstoken.training.known import NOTHING, Known
from megatron_sstoken.training.logger import StepLogger
from megatron_sstoken.training.metrics import StepMetrics, begin_summary
from megatron_sstoken.training.resume import ResumePoint, changes_since, identity_of, objective_of
from megatron_sstoken.training.run_folder import RunFolder
from megatron_sstoken.training.saving import Saver
from megatron_sstoken.training.selector import Selector, selector_of, train_on_selected
from megatron_sstoken.training.token_log import TokenLog
from megatron_sstoken.validate.whole import RunFiles

_MOST_SKIPPED = 20
"""Steps in a row that are skipped before the run ends: nothing would come of it any more."""


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
    prefetcher: Prefetcher
    saver: Saver
    drift: DriftMonitor
    token_log: TokenLog
    adapters: AdapterIdentity | None = None
    """What is trained and saved, where that is adapters."""
    known: Known = NOTHING
    sources: Sources = NO_SOURCES
    """Of the training data, where it names more than one."""
    folder: RunFolder | None = None
    """What describes the run."""
    files: RunFiles | None = None
    """The comparison of the run's files with their checksums."""
    branch: int | None = None
    """The step that `checkpoint.resume` chose."""
    selector: Selector | None = None
    """Of the newest step."""
    step: int = 0
    skipped: int = 0
    """Steps of this start that were skipped, because something was not finite."""
    skipped_in_a_row: int = 0
    diverged: str | None = None
    """What says that the weights are of a run that has diverged."""

    @property
    def settings(self) -> Settings:
        return self.plan.settings

    @property
    def has_damaged_files(self) -> bool:
        """Whether this rank has found a file of the run damaged by now."""
        return self.files is not None and self.files.is_damaged

    def require_whole_files(self) -> None:
        """Wait for the comparison of the run's files. Raises SettingsError, on all ranks, where one is damaged."""
        if self.files is not None:
            self.files.require_whole()


def model_to_train(plan: RunPlan, layout: Layout, *, trainable: bool = True) -> Model:
    """The model of the run with its starting weights."""
    model = build_model(
        plan.architecture,
        plan.settings,
        layout,
        captured_layers=plan.captured_layers,
        signals=plan.head_signals,
        trainable=trainable,
    )
    starting_weights(plan.settings).load(model)
    return model


def create_trainer(
    plan: RunPlan,
    layout: Layout,
    model: Model,
    history: HistorySource,
    *,
    known: Known = NOTHING,
    resume: ResumePoint | None = None,
    files: RunFiles | None = None,
    folder: RunFolder | None = None,
) -> Trainer:
    """Optimizer, data and logger around a model that holds its starting weights; goes on from `resume`, whose plan it is."""
    newest = resume.checkpoint if resume is not None else None
    optimizer, scheduler = build_optimizer(model, plan.settings.optimizer, plan.num_steps)
    history.attach(optimizer)
    loader = BatchLoader(
        plan.train.store,
        plan.train.order,
        plan.shape,
        data_rank=layout.data_rank,
        num_packs=plan.num_packs,
        lag=plan.lag,
        history=history.token_values(),
        weighted=plan.weighted,
        weights=known.weights,
        known=known.values,
    )
    said = plan.settings.logging
    resumed = newest.state.step if newest is not None else None
    peak = peak_flops(device_name(), plan.settings.training.precision)
    logger = StepLogger(plan.settings.logging_directory, said.every, plan.num_steps, layout, resumed=resumed, peak=peak)
    start = starting_weights(plan.settings)
    adapters = adapter_identity(plan.settings.lora, start, layout)
    prefetcher, saver = Prefetcher(loader), Saver(plan.settings.checkpoint, layout, logger)
    drift = DriftMonitor(
        plan.settings.selection,
        newest.state.drift if newest is not None else None,
        own_history=plan.settings.history.hf_path is None,
    )
    trainer = Trainer(
        plan,
        layout,
        model,
        history,
        optimizer,
        scheduler,
        loader,
        logger,
        prefetcher,
        saver,
        drift,
        TokenLog(plan, layout, history, known, logger),
        adapters=adapters,
        known=known,
        sources=Sources.of(plan.train.store),
        folder=folder,
        files=files,
    )
    if folder is not None:
        folder.show(logger)
    if resume is not None and newest is not None:
        state = newest.state
        if state.adapters is not None:
            require_base(str(newest.folder), state.adapters, start.base, layout)
        copy = history.weights_copy() if holds_copy(newest, layout) else ()
        history.load_state_dict(load_checkpoint(newest, model, optimizer, scheduler, copy))
        follow_settings(optimizer, scheduler, plan.settings.optimizer)
        trainer.step, saver.newest, trainer.branch = state.step, state.step, resume.branch
        logger.say(f"resumed from {newest.folder}: {trainer.step} of {plan.num_steps} steps are done")
        for change in changes_since(newest, plan, known.digests):
            logger.say(f"note: the run goes on with other settings: {change}")
        if history.weights_copy() and not copy:
            logger.say(f"note: {newest.folder} holds no weights of the history: they are the starting weights")
    return trainer


def train(trainer: Trainer) -> None:
    """Run the remaining steps; validate, write records and save as the settings say. All ranks call it.

    Asked to stop by SIGTERM or SIGUSR1, it ends after the step it is in, with a checkpoint of it.
    """
    # megatron collects garbage in every save: it need not walk each time through all that stays.
    gc.collect()
    gc.freeze()
    try:
        with StopRequest() as stop, trainer.saver:
            _train_until_asked_to_stop(trainer, stop)
    finally:
        gc.unfreeze()
        trainer.prefetcher.close()
        trainer.logger.close()


def _train_until_asked_to_stop(trainer: Trainer, stop: StopRequest) -> None:
    settings, plan = trainer.settings, trainer.plan
    trainer.model.train(True)
    if trainer.step == 0:
        _before_the_first_step(trainer)
    trainer.logger.pause()
    for number in range(trainer.step, plan.num_steps):
        rate = get_canonical_lr_for_logging(trainer.optimizer.param_groups) or 0.0
        metrics, gradient_norm, reports = training_step(trainer, number)
        trainer.step = done = number + 1
        if trainer.folder is not None:
            trainer.folder.step = done
        trainer.drift.observe(metrics.dropped_excess)
        trainer.logger.step(done, metrics, gradient_norm, rate, _points_of_selection(trainer))
        last = done == plan.num_steps
        saver = trainer.saver
        asked, damaged, is_writing, minutes_are_over, drifts = any_of(
            trainer.layout,
            stop.received is not None,
            trainer.has_damaged_files,
            saver.is_writing,
            saver.minutes_are_over,
            trainer.drift.is_due,
        )
        if drifts:
            trainer.logger.say(f"warning: step {done}: {trainer.drift.act()}")
        if damaged or last:
            trainer.require_whole_files()
        if not is_writing:
            saver.finish()
        stopping = asked and not last
        assert trainer.selector is not None
        trainer.token_log.after_step(done, reports, trainer.model, trainer.selector)
        if plan.validation and not stopping and (last or is_due(done, settings.training.validate_every)):
            _validate(trainer, plan.validation)
        trainer.logger.step_is_over()
        is_time = minutes_are_over or is_due(done, settings.checkpoint.save_every)
        if settings.checkpoint.directory and (last or stopping or is_time):
            save(trainer, stopping=stopping, wait=not settings.checkpoint.asynchronous)
        if stopping:
            trainer.logger.say(f"asked to stop: ended after step {done} of {plan.num_steps}; start again to go on")
            return
        trainer.logger.pause()


def _before_the_first_step(trainer: Trainer) -> None:
    """What later steps are compared with."""
    plan = trainer.plan
    if trainer.model.needs_calibration:  # as the first step would, with its batch
        calibrate(trainer.model, trainer.prefetcher.take(0).micro_batches)
    if plan.validation and trainer.settings.training.validate_first:
        _validate(trainer, plan.validation)
    trainer.token_log.before_training(trainer.model, _selector(trainer, 0, 0))
    trainer.logger.step_is_over()


def _validate(trainer: Trainer, data: DataPlan) -> None:
    when = f"after step {trainer.step}" if trainer.step else "before the first step"
    watchdog.arrived(f"validation {when}")
    losses = validation_losses(trainer.model, data, trainer.plan, trainer.layout)
    trainer.logger.say(f"validation {when}: loss {losses['loss/validation']:.4f}")
    trainer.logger.scalars(trainer.step, losses)


def _points_of_selection(trainer: Trainer) -> dict[str, float]:
    """How dropped tokens do, and what was raised or begun because of it in the step before."""
    selection, points = trainer.settings.selection, {"loss/dropped_minus_history": trainer.drift.value}
    if selection.on_drift == "raise_rho":
        points["selection/rho"] = float(selection.after_drift(trainer.drift.times).rho)
    if selection.on_drift == "explore" or selection.explore:
        points["selection/explore"] = selection.after_drift(trainer.drift.times).explore
    return points


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0: never) is done after `step`."""
    return every > 0 and step % every == 0


def training_step(trainer: Trainer, number: int) -> tuple[StepMetrics, float, list[TokenReport]]:
    """One optimizer step on global batch `number`. Returns its metrics, the gradient norm and this rank's reports.

    A batch of which no token is selected changes nothing but the learning rate; so does one whose loss or gradient is not
    finite, with `training.on_nonfinite: skip`. Raises FloatingPointError, on all ranks, for these with `stop`, or where many
    in a row had to be skipped.
    """
    model = trainer.model
    watchdog.arrived(f"step {number + 1}")
    batch = trainer.prefetcher.take(number)
    trainer.selector = selector = _selector(trainer, number, batch.num_samples_before)
    model.zero_gradients()
    trainer.optimizer.zero_grad()
    reports = train_on_selected(model, batch.micro_batches, selector)
    pending = begin_summary(reports, model.architecture, trainer.layout, trainer.sources)
    norm = gradient_norm(trainer.optimizer)
    metrics = pending.read()
    if math.isfinite(metrics.loss_selected):  # it is NaN where no token is selected
        trainer.diverged = _divergence(metrics.loss_selected, model, number)
        _judge_checkpoint(trainer, number)
    updated = False
    if not metrics.num_selected:
        norm = 0.0
        trainer.history.observe(reports)
        trainer.logger.say(f"step {number + 1}: no token is selected, the weights stay as they are")
    elif not math.isfinite(metrics.loss_selected):
        norm = 0.0
        _not_finite(trainer, number, "the loss", metrics.loss_selected)
    elif not math.isfinite(norm):
        _not_finite(trainer, number, "the gradient norm", norm)
    else:
        trainer.history.observe(reports)
        optimizer_step(trainer.optimizer, norm)
        trainer.skipped_in_a_row, updated = 0, True
    trainer.history.after_step(number + 1, updated=updated)
    trainer.scheduler.step(1)
    return metrics, norm, reports


def _selector(trainer: Trainer, number: int, num_samples_before: int) -> Selector:
    """How step `number`, from 0, selects."""
    settings = trainer.settings
    gamma = 0.0 if num_samples_before < settings.selection.warmup_samples else settings.selection.gamma
    drifted = trainer.drift.times
    return selector_of(settings, trainer.layout, gamma=gamma, step=number, history=trainer.history, drifted=drifted)


def _not_finite(trainer: Trainer, number: int, name: str, value: float) -> None:
    """Count a step that is skipped, or raise FloatingPointError once the checkpoint that leads to it says so."""
    settings = trainer.settings
    problem = f"{name} of step {number + 1} is {value}"
    if settings.training.on_nonfinite == "skip" and trainer.skipped_in_a_row < _MOST_SKIPPED:
        trainer.skipped_in_a_row += 1
        trainer.skipped += 1
        trainer.logger.say(
            f"step {number + 1}: {problem}: skipped, the weights stay as they are ({trainer.skipped} so far)"
        )
        trainer.logger.scalars(number + 1, {"training/skipped_steps": trainer.skipped})
        return
    if name == "the loss":  # a gradient may be the fault of its batch, a loss is that of the weights
        trainer.diverged = problem
        _judge_checkpoint(trainer, number)
    if settings.training.on_nonfinite == "skip":
        problem += f", and so were the {_MOST_SKIPPED} before, which were skipped"
    raise FloatingPointError(
        f"{problem}: try a lower optimizer.learning_rate (now {settings.optimizer.learning_rate}), training.precision=fp32, "
        "or training.on_nonfinite=skip; the checkpoints so far are untouched"
    )


def _judge_checkpoint(trainer: Trainer, number: int) -> None:
    """The loss of a step is that of the weights before it."""
    trainer.saver.judge(number, trainer.diverged)


def _divergence(loss: float, model: Model, number: int) -> str | None:
    """Why the weights are of a run that has diverged: they do worse than twice the loss of guessing among all words."""
    limit = 2 * math.log(model.architecture.vocabulary_size)
    return f"the loss of step {number + 1} was {loss:.4g}, above {limit:.3g}" if loss > limit else None


def save(trainer: Trainer, *, stopping: bool = False, wait: bool = True) -> None:
    """Save a checkpoint of the steps done, once the files that they come from are known to be whole.

    Without `wait` it is written while training goes on, unless the run ends after it.
    """
    plan, settings = trainer.plan, trainer.settings
    trainer.require_whole_files()
    trainer.model.gather_weights()
    trainer.prefetcher.settle()
    state = RunState(
        step=trainer.step,
        identity=identity_of(plan),
        hf_path=os.path.abspath(settings.model.hf_path or ""),
        train=os.path.abspath(settings.data.train or ""),
        num_packs=plan.num_packs,
        lag=plan.lag,
        branch=trainer.branch,
        diverged=trainer.diverged,
        drift=trainer.drift.state_dict(),
        objective=objective_of(plan, trainer.known.digests),
        adapters=trainer.adapters,
        chat_template=plan.train.store.manifest.chat_template,
    )
    final = trainer.step == plan.num_steps or stopping
    described = trainer.folder.files() if trainer.folder is not None else {}
    trainer.saver.begin(
        state, trainer.model, trainer.optimizer, trainer.scheduler, trainer.history, files=described, final=final
    )
    if wait or final:
        trainer.saver.finish()
