"""The optimizer and the learning-rate schedule of a model; a new schedule is an entry of `OptimizerSettings.schedule`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sstoken.config import OptimizerSettings
from megatron_sstoken.device import have_cuda
from megatron_sstoken.model.build import Model


def build_optimizer(
    model: Model, settings: OptimizerSettings, num_steps: int
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """megatron's distributed AdamW and its learning-rate scheduler, which counts optimizer steps.

    Matrices decay, vectors do not (megatron's convention). Made after the weights are in place: the fp32 copies that
    the optimizer holds in bf16 runs are taken from them.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=any(getattr(chunk.ddp_config, "overlap_param_gather", False) for chunk in model.chunks),
        **memory_options(settings),
    )
    optimizer = get_megatron_optimizer(config, model.chunks, use_gloo_process_groups=have_cuda(), pg_collection=None)
    fuse_adamw(optimizer)
    warmup = round(settings.warmup_fraction * num_steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(num_steps, warmup + 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
        # A resumed run follows the settings it is given, not those of the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer, scheduler


_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def memory_options(settings: OptimizerSettings) -> dict[str, Any]:
    """What megatron's OptimizerConfig takes for moments that are not fp32, and for state in the host's memory."""
    offloads = settings.offload_fraction > 0
    if not (offloads or settings.is_precision_aware):
        return {}
    return {
        "use_precision_aware_optimizer": True,  # for state in the host's memory as well: megatron moves it only so
        "exp_avg_dtype": _MOMENTS[settings.first_moment_dtype],
        "exp_avg_sq_dtype": _MOMENTS[settings.second_moment_dtype],
        # As their lower 16 bits alone, fp32 weights would take half the memory and stand so in checkpoints, which no other
        # optimizer could read then.
        "store_param_remainders": False,
        "optimizer_cpu_offload": offloads,
        "optimizer_offload_fraction": settings.offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": offloads,
    }


def follow_settings(
    optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler, settings: OptimizerSettings
) -> None:
    """Let a resumed optimizer do as the settings say: what its checkpoint brought back of them is replaced.

    megatron takes the learning rate's bounds from the parameter groups, which a checkpoint holds.
    """
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = settings.learning_rate, settings.min_learning_rate
        group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.epsilon
    scheduler.step(0)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The gradients' norm before clipping, the same on all ranks, who all call it: the one wait for the device in a step.

    `step` follows, or nothing. megatron tells the norm after the step, when a gradient that is not finite has gone into all
    weights.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def step(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip gradients of this norm, which `gradient_norm` has just told, and update the weights."""
    optimizer.prepare_grads, optimizer.get_grad_norm = lambda: False, lambda: norm
    try:
        optimizer.step()
    finally:  # the class's own again
        del optimizer.prepare_grads, optimizer.get_grad_norm


@dataclass(frozen=True)
class OwnedRange:
    """A range of a trained parameter's flattened elements, whose fp32 weights and state this rank's optimizer holds.

    Of the data-parallel and context parallel ranks each owns other ranges; together they own all.
    """

    parameter: torch.nn.Parameter
    start: int
    stop: int
    part: Any
    """The one of megatron's distributed optimizers (`parts_of`) that holds it."""

    @property
    def values(self) -> torch.Tensor:
        """This range of the parameter itself, [stop − start] in its type: to be written to as well."""
        return self.parameter.detach().view(-1)[self.start : self.stop]

    @property
    def weights(self) -> torch.Tensor:
        """fp32 [stop − start] as the last update left it, where it lies. With weights in fp32 it is `values`."""
        group, place = self.part.model_param_group_index_map[self.parameter]
        held = self.part.optimizer.param_groups[group]["params"][place]
        # The precision-aware optimizer, and that with state in the host's memory, keep fp32 weights in their state.
        return self.part.optimizer.state.get(held, {}).get("master_param", held).detach()


WeightsCopy = Sequence[tuple[OwnedRange, torch.Tensor]]
"""A copy of the trained weights, dealt out as the optimizer's: for each range that this rank owns, fp32 of its length."""


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """megatron's distributed optimizers: one, or one more for experts."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def owned_ranges(part: Any) -> Iterator[OwnedRange]:
    """What this rank owns of the parameters of one of `parts_of`."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield OwnedRange(parameter, ranges["param"].start, ranges["param"].end, part)


def fuse_adamw(optimizer: MegatronOptimizer) -> None:
    """Let torch's AdamW, which runs for want of Transformer Engine's or apex's, pass over its state once, not a dozen times."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True
