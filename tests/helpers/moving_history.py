"""What tests of moving histories do on each rank."""

from itertools import zip_longest

import torch

from megatron_sstoken.model.build import load_weights
from megatron_sstoken.parallel import gather_objects, reset_layout
from megatron_sstoken.passes import step
from megatron_sstoken.training import loop, metrics
from tests.helpers.gradients import gather_whole
from tests.helpers.workbench import make_trainer


def begin_elsewhere(trainer):
    """Let the copy begin at the weights of the folder `<model>-history`, not at the starting ones."""
    path = trainer.settings.model.hf_path
    load_weights(trainer.model, f"{path}-history")
    trainer.history.attach(trainer.optimizer)
    load_weights(trainer.model, path)


def whole_copy(trainer):
    """The history weights by Hugging Face name, as its pass sees them; afterwards every parameter is what it was."""
    parameters = [value for chunk in trainer.model.unwrapped for value in chunk.parameters()]
    before = [value.detach().clone() for value in parameters]
    with trainer.history.in_place(trainer.model):
        trainer.model.gather_weights()
        found = gather_whole(trainer.model, lambda parameter: parameter)
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
            weights.append(gather_whole(trainer.model, lambda parameter: parameter))
            loop.gradient_norm = lambda optimizer, number=number: (
                norm_of(optimizer) if number not in skipped else float("inf")
            )
            told, *_ = loop.training_step(trainer, number)
            losses.append(told.loss_selected)
        trainer.model.gather_weights()
        weights.append(gather_whole(trainer.model, lambda parameter: parameter))
        copies.append(whole_copy(trainer))
        results.append((losses, list(passes), weights, copies))
        reset_layout()
    loop.gradient_norm = norm_of
    return results if rank == 0 else None


def train_to(rank, settings, stops):
    """Go on with several runs, each to its step of `stops`, and save there. Rank 0 gives for each: losses, history weights
    and what was told."""
    results = []
    for one, stop in zip_longest(settings, stops):
        told = []
        metrics.StepLogger.say = lambda self, text, told=told: told.append(text)
        trainer = make_trainer(one)
        losses = []
        for number in range(trainer.step, stop):
            losses.append(loop.training_step(trainer, number)[0].loss_selected)
            trainer.step = number + 1
        loop.save(trainer)
        copy = {}
        if trainer.history.weights_copy():
            copy = gather_objects(
                {name: value for name, value in enumerate(values for _, values in trainer.history.weights_copy())},
                trainer.layout,
            )
        results.append((losses, copy, told))
        reset_layout()
    return results if rank == 0 else None
