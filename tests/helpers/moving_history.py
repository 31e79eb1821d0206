"""What tests of moving histories do on each rank."""

import torch

from megatron_sstoken.model.build import load_weights
from megatron_sstoken.model.lora_targets import is_adapter
from megatron_sstoken.parallel import reset_layout
from megatron_sstoken.passes import step
from megatron_sstoken.training import logger, loop
from tests.helpers.gradients import gather_whole
from tests.helpers.workbench import make_trainer


def begin_elsewhere(trainer):
    """Let the copy begin at the weights of the folder `<model>-history`, not at the starting ones."""
    path = trainer.settings.model.hf_path
    load_weights(trainer.model, f"{path}-history")
    trainer.history.attach(trainer.optimizer)
    load_weights(trainer.model, path)


def whole_weights(model):
    """What is trained: the weights by Hugging Face name, of all ranks; or the adapters, of which this rank has all."""
    if not model.has_adapters:
        return gather_whole(model, lambda parameter: parameter)
    (chunk,) = model.unwrapped
    return {name: value.detach().clone() for name, value in chunk.named_parameters() if is_adapter(name)}


def whole_copy(trainer):
    """The history weights as the pass sees them; afterwards every parameter is what it was."""
    trainer.model.gather_weights()
    parameters = [value for chunk in trainer.model.unwrapped for value in chunk.parameters()]
    before = [value.detach().clone() for value in parameters]
    with trainer.history.in_place(trainer.model):
        trainer.model.gather_weights()
        found = whole_weights(trainer.model)
    trainer.model.gather_weights()
    assert all(torch.equal(one, other) for one, other in zip(parameters, before, strict=True))
    return found


def count_passes():
    """A list that grows by a word with each pass through megatron's schedule."""
    passes, schedule = [], step.get_forward_backward_func

    def counted(**options):
        passes.append("forward" if options["forward_only"] else "training")
        return schedule()(**options)

    step.get_forward_backward_func = lambda: counted
    return passes


def follow(rank, settings, skipped=()):
    """Train with several settings; rank 0 gives for each: losses, passes, weights and history weights before each step and
    after the last. The gradient norm of the steps `skipped` is not finite."""
    results = []
    norm_of = loop.gradient_norm
    passes = count_passes()
    for one in settings:
        trainer = make_trainer(one)
        passes.clear()
        losses, weights, copies = [], [], []
        for number in range(trainer.plan.num_steps):
            copies.append(whole_copy(trainer))
            weights.append(whole_weights(trainer.model))
            loop.gradient_norm = lambda optimizer, number=number: (
                norm_of(optimizer) if number not in skipped else float("inf")
            )
            told, *_ = loop.training_step(trainer, number)
            losses.append(told.loss_selected)
        copies.append(whole_copy(trainer))
        weights.append(whole_weights(trainer.model))
        results.append((losses, list(passes), weights, copies))
        reset_layout()
    loop.gradient_norm = norm_of
    return results if rank == 0 else None


def train_to(rank, stop, settings):
    """Go on with several runs to step `stop`, and save there, but at the end. Each rank gives for each: losses, its part of
    the copy before the first and after the last, and what was told."""
    results = []
    for one in settings:
        told = []
        logger.StepLogger.say = lambda self, text, told=told: told.append(text)
        trainer = make_trainer(one)
        losses, copies = [], [copy_of(trainer)]
        for number in range(trainer.step, stop):
            losses.append(loop.training_step(trainer, number)[0].loss_selected)
            trainer.step = number + 1
        if stop < trainer.plan.num_steps:
            loop.save(trainer)
        results.append((losses, [*copies, copy_of(trainer)], told))
        reset_layout()
    return results


def copy_of(trainer):
    """What this rank holds of the history weights."""
    return [values.clone() for _, values in trainer.history.weights_copy()]
