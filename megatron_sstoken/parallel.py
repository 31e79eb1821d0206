"""Process groups, and this process's place in them; the only reader of megatron's parallel_state."""

import datetime
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_sstoken import watchdog
from megatron_sstoken.config import ParallelSettings, SettingsError
from megatron_sstoken.device import adapt_megatron_to_cpu, communication_backend, compute_device, have_cuda

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """The process groups of this process and its place in each.

    `groups` is what megatron-core's modules and schedules take. `data` spans the data-parallel ranks (same slices of
    the model, other packs), `control` all processes over gloo (objects and error messages, never tensors in bulk).
    """

    groups: ProcessGroupCollection
    data: dist.ProcessGroup
    control: dist.ProcessGroup
    virtual_pipeline: int

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def data_rank(self) -> int:
        return self.data.rank()

    @property
    def data_size(self) -> int:
        return self.data.size()

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def tensor_size(self) -> int:
        return self.groups.tp.size()

    @property
    def context_size(self) -> int:
        return self.groups.cp.size()

    @property
    def context_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def expert_size(self) -> int:
        return self.groups.ep.size()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def pipeline_size(self) -> int:
        return self.groups.pp.size()

    @property
    def is_first_stage(self) -> bool:
        """Whether the embedding lies here."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the vocabulary head, the losses and the selection lie here."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage of this process's pipeline."""
        return dist.get_global_rank(self.groups.pp, self.pipeline_size - 1)

    @property
    def is_replica_leader(self) -> bool:
        """True on one process of each data-parallel replica: the first of the last stage's tensor and context ranks."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0

    @property
    def is_writer(self) -> bool:
        """True on exactly one process, which sees losses and writes files made from them."""
        return self.is_replica_leader and self.data_rank == 0


def start_processes(timeout_minutes: float = 30) -> None:
    """Join the other processes that torchrun started; alone, without torchrun, become a group of one.

    `timeout_minutes`: how long one waits for another before the watchdog, which begins here, ends the job with an error.
    """
    adapt_megatron_to_cpu()
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = compute_device()
    if have_cuda():
        torch.cuda.set_device(device)
        watchdog.prepare_flight_recorder()
    watchdog.start(timeout_minutes)
    # Without `device_id`: with it torch makes NCCL communicators of all groups at once, hundreds of them on large layouts,
    # of which a run uses a few, and a group's messages between stages wait for its other operations (NeMo-RL's 70B runs
    # became slower; others hung).
    dist.init_process_group(communication_backend(), timeout=watchdog.group_timeout(timeout_minutes))
    watchdog.start(timeout_minutes)


def create_layout(settings: ParallelSettings, seed: int, timeout_minutes: float = 30) -> Layout:
    """Create megatron's process groups and seed its random states. All processes call it, after `start_processes`.

    All groups wait `timeout_minutes`. Raises SettingsError if the sizes do not divide the number of processes.
    """
    groups = create_groups(settings, seed, timeout_minutes)
    return Layout(
        groups=groups,
        data=groups.dp,
        control=dist.new_group(backend="gloo", timeout=watchdog.group_timeout(timeout_minutes)),
        virtual_pipeline=settings.virtual_pipeline,
    )


def create_groups(settings: ParallelSettings, seed: int, timeout_minutes: float = 30) -> ProcessGroupCollection:
    """megatron's own process groups and random states; the part of `create_layout` that works on any backend."""
    model_processes = settings.tensor * settings.pipeline * settings.context
    if dist.get_world_size() % model_processes:
        raise SettingsError([processes_problem(settings, dist.get_world_size())])
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor,
        pipeline_model_parallel_size=settings.pipeline,
        virtual_pipeline_model_parallel_size=settings.virtual_pipeline if settings.virtual_pipeline > 1 else None,
        context_parallel_size=settings.context,
        expert_model_parallel_size=settings.expert,
        expert_tensor_parallel_size=1,  # experts are dealt out, never cut
        create_gloo_process_groups=have_cuda(),
        distributed_timeout_minutes=watchdog.group_timeout(timeout_minutes) / datetime.timedelta(minutes=1),
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Dropout draws anew on every pipeline stage and for every share of the tokens; alike on the tensor ranks, for which
    # megatron keeps a second generator.
    place = groups.pp.rank() + groups.pp.size() * groups.dp_cp.rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100_003 * place, force_reset_rng=True)
    return groups


def processes_problem(settings: ParallelSettings, world_size: int) -> str:
    """The message for a number of processes that the layout does not divide."""
    product = settings.tensor * settings.pipeline * settings.context
    return (
        f"{world_size} processes cannot be split into parallel.tensor={settings.tensor} × "
        f"parallel.pipeline={settings.pipeline} × parallel.context={settings.context} = {product}: "
        f"start a multiple of {product} processes, or use smaller sizes"
    )


def reset_layout() -> None:
    """Give up megatron's process groups, so that `create_layout` can be called again in this process.

    All processes call it. Groups that nobody destroys keep their threads and connections until the process ends.
    """
    parallel_state.destroy_model_parallel()
    barrier()  # nobody leaves a group that another is still using
    for group in [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]:
        dist.destroy_process_group(group)


def barrier() -> None:
    """Wait for all processes."""
    dist.barrier(device_ids=[compute_device().index] if have_cuda() else None)


def stop_processes() -> None:
    """Leave all process groups. All processes call it."""
    watchdog.stop()
    if dist.is_initialized():
        reset_layout()
        leave_groups()


def leave_groups() -> None:
    """Leave all process groups without waiting for anybody."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def agree_on_problems(problems: list[str]) -> None:
    """Raise SettingsError on all processes if any of them found a problem (a file missing on one node, say).

    Every process calls it; the union of the messages, in rank order, is raised everywhere.
    """
    gathered: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    union = list(dict.fromkeys(message for messages in gathered for message in messages or []))
    if union:
        raise SettingsError(union)


def any_of(layout: Layout, *flags: bool) -> list[bool]:
    """For each flag whether it is set on any process; the same answer on all of them, who all call it."""
    asked = torch.tensor(flags, dtype=torch.int)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=layout.control)
    return [bool(one) for one in asked]


def broadcast_object(value: T, source: int, group: dist.ProcessGroup | None = None) -> T:
    """`value` of global rank `source`, on every rank of `group`."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def gather_objects(value: T, layout: Layout) -> list[T]:
    """`value` of every rank, in their order, on every rank."""
    gathered: list[Any] = [None] * layout.world_size
    dist.all_gather_object(gathered, value, group=layout.control)
    return gathered


def writer_rank(layout: Layout) -> int:
    """Global rank of the process that writes results, known to all."""
    return gather_objects(layout.is_writer, layout).index(True)


def is_lost_connection(error: BaseException) -> bool:
    """Whether torch.distributed failed because of another process. gloo has no type for it but names its source file."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
