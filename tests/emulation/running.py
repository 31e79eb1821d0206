"""Runs a function on several processes that believe they have GPUs joined by NCCL; beneath, gloo moves CPU tensors."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_sstoken.device import have_cuda
from tests.emulation import pretended_device
from tests.emulation.connections import replace
from tests.helpers.distributed_runner import run_distributed


def run_pretended(function: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 240) -> list[Any]:
    """As `run_distributed`, each process on a pretended device of its own."""
    return run_distributed(function, num_ranks, *args, timeout=timeout, before=become_pretended)


def become_pretended(also: Callable[[], None] = lambda: None) -> None:
    """Turn this process into one with a pretended device. Before its process groups are made.

    `also` is called once the device is there, and before megatron-core is imported.
    """
    os.environ.pop("SSTOKEN_DEVICE", None)  # other tests hide what GPUs there are
    pretended_device.install()
    also()
    _use_gloo()
    _adapt_megatron()
    assert have_cuda()


def _use_gloo() -> None:
    """Groups that ask for NCCL get gloo, which has no device to be bound to; messages leave when they are sent.

    CUDA's streams keep a tensor's memory until its message has gone, whatever becomes of the tensor; gloo reads it later.
    """
    sent: list[torch.Tensor] = []
    real_init, real_new, real_isend = dist.init_process_group, dist.new_group, dist.isend

    def init_process_group(backend=None, *args, **kwargs):
        assert "device_id" not in kwargs, "NCCL would make communicators of all groups, of which a run uses few"
        return real_init("gloo" if backend == "nccl" else backend, *args, **kwargs)

    def new_group(*args, device_id=None, pg_options=None, **kwargs):
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return real_new(*args, **kwargs)

    @functools.wraps(real_isend)
    def isend(tensor, *args, **kwargs):
        copied = tensor.detach().clone()
        sent.append(copied)  # to live as long as the message, and a little longer
        del sent[:-100]
        return real_isend(copied, *args, **kwargs)

    dist.init_process_group, dist.new_group = init_process_group, new_group
    replace("isend", isend)


def _adapt_megatron() -> None:
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import layers, mappings, random

    from megatron_sstoken.device import _gather_from_others, _reduce_in_place

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(random.__name__).setLevel(logging.ERROR)  # the CPU's generator moves inside a fork of "cuda"'s

    class Done:
        def wait(self):
            pass

    gathers: list[Callable[[], None]] = []

    class Gathering(Done):
        """Weights come when they are waited for, no sooner: who does not wait sees old ones."""

        calls: list[Callable[[], None]] = []

        def wait(self):
            while self.calls:
                self.calls.pop()()

    @contextlib.contextmanager
    def together(group, async_ops):
        handle = Gathering()
        yield handle
        handle.calls, gathers[:] = gathers.copy(), []
        if not async_ops:
            handle.wait()

    def reduce_scatter(output, input, *, op, group, async_op):
        _reduce_in_place(output, input, op=op, group=group, async_op=False)
        return Done()

    def all_gather(output, input, *, group, async_op):
        gathers.append(functools.partial(_gather_from_others, output, input, group=group, async_op=False))

    def quiet(collective):
        @functools.wraps(collective)
        def call(*args, async_op=False, **kwargs):
            with pretended_device.unnoticed():  # gloo makes a reduce-scatter of copies, of memory that it takes itself
                collective(*args, **kwargs)
            return Done() if async_op else None

        return call

    for module in (mappings, layers):
        module.dist_reduce_scatter_func = quiet(module.dist_reduce_scatter_func)
    param_and_grad_buffer._coalescing_manager = together
    param_and_grad_buffer.dist_reduce_scatter_func = reduce_scatter
    param_and_grad_buffer.dist_all_gather_func = all_gather
