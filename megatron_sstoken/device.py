"""CUDA or CPU: the only place that adapts megatron-core to a machine without CUDA.

With CUDA present one name is added that megatron-core forgets, and nothing else changes. Without it, megatron-core still
asks for "cuda" in about thirty places; `adapt_megatron_to_cpu` answers those with the CPU. Each substitution stands with
its reason.
"""

import contextlib
import functools
import logging
import os

import torch
from torch.utils._device import _device_constructors


def have_cuda() -> bool:
    """Whether this process computes on a GPU. `SSTOKEN_DEVICE=cpu` hides GPUs."""
    return os.environ.get("SSTOKEN_DEVICE") not in ("cpu", "meta") and torch.cuda.is_available()


def compute_device() -> torch.device:
    """The device of this process: the GPU that torchrun's LOCAL_RANK names, or the CPU.

    `SSTOKEN_DEVICE=meta`: torch's meta device, on which models of any size are built without memory or values.
    """
    if have_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("meta" if os.environ.get("SSTOKEN_DEVICE") == "meta" else "cpu")


def communication_backend() -> str:
    """torch.distributed backend of tensors on `compute_device`."""
    return "nccl" if have_cuda() else "gloo"


def to_compute_device(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, from memory of the host, on the compute device; nobody waits for the copy.

    Only pinned memory is copied without waiting; torch keeps it until the copy is done.
    """
    if not have_cuda() or tensor.is_cuda:
        return tensor
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(compute_device(), non_blocking=True)


def synchronize() -> None:
    """Wait for the device, where there is something to wait for."""
    if have_cuda():
        torch.cuda.synchronize()


def device_name() -> str:
    """What CUDA calls the GPU of this process; "cpu" without one."""
    return torch.cuda.get_device_name(compute_device()) if have_cuda() else "cpu"


def peak_memory_bytes() -> int:
    """Largest memory so far: allocated on the GPU, or resident of this process on a CPU."""
    if have_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def import_megatron() -> None:
    """Import megatron-core; without CUDA, which alone runs its fused functions, without what would compile them.

    megatron gives some functions to torch.compile while it is imported, for which torch loads a compiler: 1.3 seconds. To be
    called before all that imports megatron-core.
    """
    if have_cuda():
        return
    compiled = torch.compile
    torch.compile = lambda function, **options: function  # type: ignore[assignment]
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compiled
    disable_jit_fuser()


@functools.lru_cache(maxsize=1)
def adapt_megatron_to_cpu() -> None:
    """Make megatron-core run on the CPU; with CUDA, on this process's GPU. Call it before megatron-core is first used."""
    if have_cuda():
        torch.cuda.set_device(compute_device())
        _define_matrix_product()
        return
    # megatron asks for the current device to place buffers on, and waits for it before it times or saves.
    torch.cuda.current_device = compute_device  # type: ignore[assignment]
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    # 0.19 lets gradient buffers wait for the current stream's CUDA graphs; a CPU's stream has nothing to wait for.
    torch.cuda.current_stream = torch.cpu.current_stream  # type: ignore[assignment]

    # The random state tracker (dropout, initialisation) forks the generator of "cuda": here the CPU's.
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)  # type: ignore[assignment]

    # Counters and norms are made by torch.zeros(..., device="cuda") and tensor.cuda(). `with torch.device(...)`, which
    # transformers loads models under, knows factories by identity from a list made at first use: make it from torch's own.
    _device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like"):
        setattr(torch, name, _instead_of_cuda(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    # Optimizers sort parameters by comparing type strings with 'torch.cuda.FloatTensor'.
    torch.Tensor.type = _type_as_on_cuda(torch.Tensor.type)  # type: ignore[method-assign]

    from megatron.core.tensor_parallel import random as megatron_random

    # These two reach into torch._C instead of calling the functions replaced above.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # It warns when the CPU's generator moves inside a fork of "cuda"'s; here the two are one.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)

    _define_matrix_product()

    from megatron.core.distributed import param_and_grad_buffer

    # gloo has neither of these, nor coalescing: torch makes a reduce-scatter of an all-reduce and three copies of all
    # gradients, and copies parameters even where nobody is there to exchange them with.
    param_and_grad_buffer._coalescing_manager = lambda group, async_ops: contextlib.nullcontext()
    param_and_grad_buffer.dist_reduce_scatter_func = _reduce_in_place
    param_and_grad_buffer.dist_all_gather_func = _gather_from_others
    _take_plain_optimizers()


def _take_plain_optimizers() -> None:
    """Let megatron's optimizers use torch's Adam and norms: those of Transformer Engine and apex, where installed, need a GPU.

    The same that they use where neither is installed.
    """
    from megatron.core import optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    optimizers.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = (
        distrib_optimizer.USING_APEX_OPTIMIZER
    ) = False
    optimizers.Adam, optimizers.SGD, distrib_optimizer.Adam = torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_tensor_impl = utils.local_multi_tensor_l2_norm, None
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def _define_matrix_product() -> None:
    """A mixture's router asks whether Transformer Engine's matrix product is there, by a name that exists only where it is."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _reduce_in_place(output, input, *, op, group, async_op):
    """A reduce-scatter whose `output` is this rank's part of `input`, as megatron's buffers are."""
    assert not async_op and output.untyped_storage().data_ptr() == input.untyped_storage().data_ptr()
    if group.size() > 1:
        torch.distributed.all_reduce(input, op=op, group=group)


def _gather_from_others(output, input, *, group, async_op):
    """An all-gather whose `input` is this rank's part of `output`."""
    assert not async_op and output.untyped_storage().data_ptr() == input.untyped_storage().data_ptr()
    if group.size() > 1:
        torch.distributed.all_gather_into_tensor(output, input, group=group)


def _instead_of_cuda(factory):
    @functools.wraps(factory)
    def make(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = compute_device()
        return factory(*args, **kwargs)

    return make


def _type_as_on_cuda(original):
    @functools.wraps(original)
    def type_(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return f"torch.cuda.{result.split('.')[-1]}" if isinstance(result, str) else result

    return type_
