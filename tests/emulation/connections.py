"""NCCL's rule for the first message between two processes: both must be there, or the first waits on the host for the other.

A single `isend` or `irecv` makes a communicator of two ranks, a batch one of the whole group, as pytorch's ProcessGroupNCCL
does. Over gloo, which lets a sender go on, a program that breaks the rule ends well all the same; here it does not.
"""

import datetime
import inspect
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

PATIENCE = datetime.timedelta(seconds=30)


def connect_on_first_use() -> None:
    """Let this process keep the rule from now on; it raises where a peer does not come within `PATIENCE`."""
    met: set[str] = set()
    in_batch = False

    def meet(group: dist.ProcessGroup | None, peers: list[int]) -> None:
        name = f"{c10d._get_process_group_name(group or c10d.GroupMember.WORLD)}/{'-'.join(map(str, sorted(peers)))}"
        if name not in met:
            met.add(name)
            store = c10d._get_default_store()
            store.set(f"connect/{name}/{dist.get_rank()}", "here")
            store.wait([f"connect/{name}/{peer}" for peer in peers], PATIENCE)

    def single(real: Callable) -> Callable:
        def call(tensor, *args, **kwargs):
            given = inspect.signature(real).bind(tensor, *args, **kwargs).arguments
            group = given.get("group")
            in_group = given.get("group_dst", given.get("group_src"))
            other = given.get("dst", given.get("src"))
            if other is None:
                other = dist.get_global_rank(group, in_group)
            if not in_batch:
                meet(group, [dist.get_rank(), other])
            return real(tensor, *args, **kwargs)

        return call

    def batch(operations):
        nonlocal in_batch
        meet(operations[0].group, dist.get_process_group_ranks(operations[0].group))
        in_batch = True
        try:
            return real_batch(operations)
        finally:
            in_batch = False

    real_batch = dist.batch_isend_irecv
    for name in ("isend", "irecv", "send", "recv"):
        replace(name, single(getattr(dist, name)))
    replace("batch_isend_irecv", batch)


def replace(name: str, function: Callable) -> None:
    """Put `function` in the place of one of torch.distributed, which knows its own by two names."""
    setattr(dist, name, function)
    setattr(c10d, name, function)
