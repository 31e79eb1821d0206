"""A CUDA device that is pretended: tensors lie on the CPU, and a mark on their storage says that they are "on the GPU".

So the code that runs with CUDA runs on a machine without, and what it would do there can be counted: where the host waits for
the device, and which operations mix devices. What this cannot show: the numbers of kernels, NCCL, memory, time.

`install` replaces parts of torch for good: only in a process of its own (`tests/emulation/running.py`).
"""

import contextlib
import sys
import threading
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
_OURS = ("megatron_sstoken", "megatron/core", "transformer_engine")

_READS_A_SIZE = {
    "nonzero",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "is_nonzero",
}
"""Operations whose result has a size that the host learns from the device."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


@dataclass(frozen=True)
class Wait:
    """One time that the host waited for the device."""

    kind: str
    """`item`, `size` (of a result), `to device` or `to host` (a copy), or `synchronize`."""
    operation: str
    frames: tuple[str, ...]
    """`file:line function` of the innermost frames of this project, megatron or Transformer Engine."""

    def __str__(self) -> str:
        return f"{self.kind} {self.operation} at {' < '.join(self.frames)}"


@dataclass
class Recorded:
    """What happened while recording."""

    waits: list[Wait] = field(default_factory=list)
    mixed: Counter[str] = field(default_factory=Counter)
    """Operations that were given tensors of both devices, with their place."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Operations on the device that would launch a kernel, by name."""


_marks: dict[tuple[int, int, int], str] = {}
"""Storage → `gpu` or `pinned`; all others are pageable memory of the host."""
_recorded: Recorded | None = None


@contextlib.contextmanager
def recording() -> Iterator[Recorded]:
    """Within, waits, mixed devices and kernels of this process are written down."""
    global _recorded
    _recorded = found = Recorded()
    try:
        yield found
    finally:
        _recorded = None


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Within, nothing is recorded: for stand-ins of kernels, which may look at values."""
    global _recorded
    before, _recorded = _recorded, None
    try:
        yield
    finally:
        _recorded = before


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor is marked as lying on the device."""
    return _mark_of(tensor) == "gpu"


def mark(tensor: torch.Tensor, kind: str | None) -> torch.Tensor:
    """Say where a tensor lies: `gpu`, `pinned`, or None for pageable memory."""
    with contextlib.suppress(NotImplementedError):  # a tensor without storage
        if kind is None:
            _marks.pop(_key(tensor), None)
        else:
            _marks[_key(tensor)] = kind
    return tensor


def _key(tensor: torch.Tensor) -> tuple[int, int, int]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.data_ptr(), storage.nbytes()


def _mark_of(tensor: torch.Tensor) -> str | None:
    try:
        return _marks.get(_key(tensor))
    except (NotImplementedError, RuntimeError):
        return None


def _frames() -> tuple[str, ...]:
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < 3:
        name = frame.f_code.co_filename
        if any(part in name for part in _OURS) and "/emulation/" not in name:
            found.append(f"{name.split('site-packages/')[-1]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)


def _wait(kind: str, operation: str) -> None:
    if _recorded is not None:
        _recorded.waits.append(Wait(kind, operation, _frames()))


def _wants_cuda(device: object) -> bool:
    return (isinstance(device, int) and not isinstance(device, bool)) or str(device).startswith("cuda")


def _note_copy(source: torch.Tensor, *, to_gpu: bool, non_blocking: bool) -> None:
    """A copy between host and device makes the host wait unless it is asked not to and the host's memory is pinned.

    A copy to the host that does not wait is as well: whoever reads it must wait for an event, which is recorded.
    """
    if non_blocking and (not to_gpu or _mark_of(source) == "pinned"):
        return
    _wait("to device" if to_gpu else "to host", f"copy {tuple(source.shape)} {source.dtype}")


class _Dispatch(TorchDispatchMode):
    """Carries the marks from arguments to results, and records."""

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[-1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        gpu = [is_on_gpu(tensor) for tensor in tensors]
        device = kwargs.get("device")
        kwargs.pop("pin_memory", None)
        if device is not None and not str(device).startswith("meta"):
            kwargs["device"] = torch.device("cpu")
        if name == "_to_copy":
            return self._copy(func, args, kwargs, device, gpu[0])
        # Autograd's C++ makes tensors on the device that it sees, the CPU: within a backward pass they count as the device's.
        in_backward = torch._C._current_graph_task_id() != -1
        result_on_gpu = any(gpu) if device is None else _wants_cuda(device) or in_backward
        if any(gpu):
            _inspect(func, name, args, kwargs, tensors, gpu)
        if name in ("mm", "addmm") and func._schema.overload_name.startswith("dtype"):
            return _product_of_another_type(name, args, kwargs)
        before = {_key(tensor) for tensor in tensors if tensor.layout is torch.strided}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            fresh = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and _key(tensor) not in before
            if fresh:
                mark(tensor, "gpu" if result_on_gpu else None)
        return result

    @staticmethod
    def _copy(func, args, kwargs, device, from_gpu):
        # Autograd asks for the device that C++ sees, which is always the CPU; `Tensor.to` does not come here with one.
        to_gpu = from_gpu or _wants_cuda(device)
        if from_gpu != to_gpu:
            _note_copy(args[0], to_gpu=to_gpu, non_blocking=kwargs.get("non_blocking", False))
        return mark(func(*args, **kwargs), "gpu" if to_gpu else None)


adds_products_in_place = True
"""Whether `torch.addmm` takes an fp32 matrix beside factors in bf16, as newer versions of torch do on GPUs."""


def _product_of_another_type(name, args, kwargs):
    """CPUs have no product whose result has another type than its factors."""
    if name == "mm":
        return mark(args[0].float() @ args[1].float(), "gpu")
    if not adds_products_in_place and args[0].dtype != args[1].dtype:
        raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
    return kwargs["out"].copy_(args[0] + args[1].float() @ args[2].float())


def _inspect(func, name, args, kwargs, tensors, gpu) -> None:
    """Record what an operation with a tensor on the device makes the host wait for."""
    if _recorded is None:
        return
    if name == "_local_scalar_dense":
        _wait("item", name)
    elif name in _READS_A_SIZE:
        _wait("size", name)
    elif name in _INDEXING:
        index = [one for one in args[1] if one is not None]
        masked = any(one.dtype in (torch.bool, torch.uint8) for one in index)
        if masked and len(args) > 2 and args[2].numel() == 1:
            pass  # a number of the host's: torch fills where the mask says so
        elif masked:
            _wait("size", f"{name} by a mask")
        elif any(one.dim() and not is_on_gpu(one) for one in index):
            _wait("to device", f"{name} by an index on the host")
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        _wait("size", name)
    elif name == "copy_" and gpu[0] != gpu[1]:
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        _note_copy(args[1], to_gpu=gpu[0], non_blocking=non_blocking)
        return
    _recorded.kernels[name] += 1
    if any(not on and tensor.dim() > 0 for on, tensor in zip(gpu, tensors, strict=True)) and name not in _INDEXING:
        _recorded.mixed[f"{name} at {' < '.join(_frames())}"] += 1


class _Stream:
    cuda_stream, device = 0, CUDA

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self):
        _wait("synchronize", "stream")

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class _Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        _wait("synchronize", "event")

    def elapsed_time(self, other):
        return 1.0


def install(num_devices: int = 1) -> None:
    """Let torch say that it has CUDA devices, in this process from now on. Call it before anything asks."""
    _replace_cuda(num_devices)
    _replace_tensor_methods()
    _replace_factories()
    _follow_threads()
    _Dispatch().__enter__()


def _follow_threads() -> None:
    """Modes belong to threads: without its own, another's new tensors would keep the marks of freed ones in their place."""
    run = threading.Thread.run

    def run_with_marks(self):
        with _Dispatch():
            run(self)

    threading.Thread.run = run_with_marks  # type: ignore[method-assign]


def _replace_cuda(num_devices: int) -> None:
    properties = types.SimpleNamespace(
        name="pretended H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32
    )
    replacements = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: num_devices,
        "current_device": lambda: CUDA,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: _wait("synchronize", "device"),
        "get_device_capability": lambda *args: (9, 0),
        "get_device_name": lambda *args: properties.name,
        "get_device_properties": lambda *args: properties,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "max_memory_allocated": lambda *args: 0,
        "memory_allocated": lambda *args: 0,
        "reset_peak_memory_stats": lambda *args: None,
        "mem_get_info": lambda *args: (80 << 30, 80 << 30),
        "empty_cache": lambda: None,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: False,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = torch.version.cuda or "13.0"
    # Optimizers ask a build for GPUs whether their stream is being captured.
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None  # type: ignore


def _replace_tensor_methods() -> None:
    kind = torch.Tensor
    real_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
    real_to, real_type, real_tolist, real_numpy = kind.to, kind.type, kind.tolist, kind.numpy

    def to(self, *args, **kwargs):
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for one in args:
            if isinstance(one, torch.dtype):
                dtype = one
            elif isinstance(one, torch.Tensor):
                device, dtype = one.device, one.dtype
            elif isinstance(one, torch.device | str) or (isinstance(one, int) and not isinstance(one, bool)):
                device = one
        if device is None or str(device).startswith("meta"):
            return real_to(self, *args, **kwargs)
        to_gpu, dtype = _wants_cuda(device), dtype or self.dtype
        if to_gpu == is_on_gpu(self):
            copy = kwargs.get("copy", False)
            return self if dtype == self.dtype and not copy else real_to(self, dtype, copy=copy)
        _note_copy(self, to_gpu=to_gpu, non_blocking=kwargs.get("non_blocking", False))
        return mark(real_to(self, dtype, copy=True), "gpu" if to_gpu else None)

    def type_(self, *args, **kwargs):
        found = real_type(self, *args, **kwargs)
        return f"torch.cuda.{found.split('.')[-1]}" if isinstance(found, str) and is_on_gpu(self) else found

    def tolist(self):
        if is_on_gpu(self):
            _wait("to host", f"tolist {tuple(self.shape)}")
        with unnoticed():
            return real_tolist(self)

    def numpy(self, *args, **kwargs):
        if is_on_gpu(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return real_numpy(self, *args, **kwargs)

    def new_tensor(self, data, *, dtype=None, device=None, **kwargs):
        on_gpu = is_on_gpu(self) if device is None else _wants_cuda(device)
        return torch.tensor(data, dtype=dtype or self.dtype, device=CUDA if on_gpu else "cpu", **kwargs)

    def device(self):
        try:
            return CUDA if is_on_gpu(self) else real_device(self)
        except RuntimeError:  # torch's ShardedTensor has no storage, and says the device of its process group
            return CUDA

    kind.device = property(device)  # type: ignore
    kind.is_cuda = property(is_on_gpu)  # type: ignore
    kind.to, kind.type, kind.tolist, kind.numpy, kind.new_tensor = to, type_, tolist, numpy, new_tensor  # type: ignore
    kind.cpu = lambda self, *args, **kwargs: self.to("cpu")  # type: ignore
    kind.cuda = lambda self, device=None, non_blocking=False, **kwargs: self.to(CUDA, non_blocking=non_blocking)  # type: ignore
    kind.pin_memory = lambda self, *args: mark(self.clone(), "pinned")  # type: ignore
    kind.is_pinned = lambda self, *args: _mark_of(self) == "pinned"  # type: ignore
    kind.record_stream = lambda self, *args: None  # type: ignore
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self.to(CUDA)  # type: ignore


def _replace_factories() -> None:
    def wrapped(name: str, *, from_host: bool):
        real = getattr(torch, name)

        def make(*args, **kwargs):
            on_gpu = kwargs.get("device") is not None and _wants_cuda(kwargs["device"])
            pinned = kwargs.pop("pin_memory", False)
            if on_gpu:
                kwargs["device"] = "cpu" if from_host else CUDA
            made = real(*args, **kwargs)
            if pinned:
                mark(made, "pinned")
            if from_host:
                shared = isinstance(args[0], torch.Tensor) if args else False  # `as_tensor` of a tensor
                mark(made, "gpu" if on_gpu else _mark_of(made) if shared else None)
                if on_gpu:
                    _wait("to device", f"torch.{name} {tuple(made.shape)}")
            return made

        make.__name__ = name
        return make

    for name in ("tensor", "as_tensor", "from_numpy", "frombuffer"):
        setattr(torch, name, wrapped(name, from_host=True))
    for name in ("empty", "zeros", "ones", "full", "arange", "linspace", "randn", "rand"):
        setattr(torch, name, wrapped(name, from_host=False))
    for name in ("empty_like", "zeros_like", "ones_like", "full_like"):
        setattr(torch, name, wrapped(name, from_host=False))
