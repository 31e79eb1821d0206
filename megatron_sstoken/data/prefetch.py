"""Makes global batches ahead, in a thread beside the training."""

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from megatron_sstoken.data.batches import BatchLoader, TokenBatch
from megatron_sstoken.device import have_cuda


@dataclass(frozen=True)
class GlobalBatch:
    """One global batch, as a step takes it."""

    micro_batches: list[TokenBatch]
    """This rank's, in pinned memory of the host where there is a GPU: such memory is copied there without a wait."""
    num_samples_before: int
    """Samples in all batches before this one."""


class Prefetcher:
    """Gives the batches of a loader, and makes the one after while its caller computes. The loader is its own from now on."""

    def __init__(self, loader: BatchLoader):
        self._loader = loader
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[GlobalBatch]] = {}

    def take(self, number: int) -> GlobalBatch:
        """Global batch `number`. Raises what making it raised."""
        wanted = self._ahead.pop(number, None) or self._thread.submit(self._make, number)
        self._ahead.clear()  # a caller that jumps
        if number + 1 < self._loader.num_batches:
            self._ahead[number + 1] = self._thread.submit(self._make, number + 1)
        return wanted.result()

    def settle(self) -> None:
        """Wait for the batch in the making: before a fork, which must not find the thread with a lock in its hands."""
        wait(self._ahead.values())

    def close(self) -> None:
        """Make no more; waits for the one in the making."""
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def _make(self, number: int) -> GlobalBatch:
        batches = self._loader.load(number)
        if have_cuda():
            batches = [batch.mapped(torch.Tensor.pin_memory) for batch in batches]
        return GlobalBatch(batches, self._loader.num_samples_before(number))
