"""How a run tells people of its steps: printed lines, TensorBoard, `metrics.jsonl`."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from megatron_sstoken.device import peak_memory_bytes
from megatron_sstoken.files import write_failure
from megatron_sstoken.folders import METRICS
from megatron_sstoken.parallel import Layout
from megatron_sstoken.training.metrics import QUANTILES, StepMetrics
from megatron_sstoken.training.metrics_file import MetricsFile
from megatron_sstoken.training.tags import tag_of


class StepLogger:
    """Prints a line every `every` steps and writes TensorBoard points; rank 0 does, the others hold their peace."""

    def __init__(
        self,
        directory: str | None,
        every: int,
        num_steps: int,
        layout: Layout,
        *,
        resumed: int | None = None,
        peak: float | None = None,
    ):
        """`resumed`: steps done before this start. TensorBoard shows no later points of starts before, and `metrics.jsonl`
        loses them. `peak`: FLOP a second that one process could do at most, where that is known."""
        self._active = layout.rank == 0
        purge = None if resumed is None else resumed + 1
        self._lost: set[str] = set()
        self._writer: SummaryWriter | None = None
        self._file: MetricsFile | None = None
        if directory is not None and self._active:
            with self.outlive(directory):
                self._writer = SummaryWriter(directory, purge_step=purge)
            path = os.path.join(directory, METRICS)
            with self.outlive(path):
                self._file = MetricsFile(path, resumed=resumed)
        self._every, self._num_steps, self._world_size, self._peak = every, num_steps, layout.world_size, peak
        self._last = time.monotonic()
        self._begun, self._done = self._last, 0

    def step(
        self,
        number: int,
        metrics: StepMetrics,
        gradient_norm: float,
        learning_rate: float,
        further: dict[str, float] | None = None,
    ) -> None:
        """Tell of the optimizer step `number` (from 1); `further`: more points."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._done += 1
        if not self._active or (number % self._every and number != self._num_steps):
            return
        eta = (now - self._begun) / self._done * (self._num_steps - number)
        speed = metrics.num_tokens / seconds
        tflops = metrics.model_flops / seconds / 1e12
        self.say(
            f"step {number}/{self._num_steps} | loss {metrics.loss_selected:.4f} (all {metrics.loss_all:.4f}, dropped "
            f"{metrics.loss_dropped:.4f}) | selected {100 * metrics.share_selected:.1f} % | grad norm "
            f"{gradient_norm:.3f} | lr {learning_rate:.3e} | {speed:,.0f} tokens/s | {tflops:.3g} TFLOP/s | "
            f"ETA {_clock(eta)}"
        )
        if self._writer is None and self._file is None:
            return
        points = {
            "loss/all": metrics.loss_all,
            "loss/selected": metrics.loss_selected,
            "loss/dropped": metrics.loss_dropped,
            "loss/history": metrics.loss_history,
            "selection/share": metrics.share_selected,
            "selection/rho": metrics.rho,
            "weights/mean": metrics.weight_mean,
            "weights/effective_share": metrics.weight_share,
            "optimizer/learning_rate": learning_rate,
            "optimizer/gradient_norm": gradient_norm,
            "speed/tokens_per_second": speed,
            "speed/mfu": 1e12 * tflops / self._world_size / self._peak if self._peak else math.nan,
            "speed/model_tflops": tflops,
            "speed/model_tflops_per_process": tflops / self._world_size,
            "speed/step_seconds": seconds,
            "data/real_share": metrics.num_tokens / metrics.num_positions,
            "memory/peak_gib": peak_memory_bytes() / 2**30,
        }
        points |= {f"loss/source/{name}": loss for name, loss in metrics.source_losses.items()}
        for name, values in (("rel", metrics.rel_quantiles), ("attention", metrics.attention_quantiles)):
            points |= {f"{name}/q{round(100 * q):02d}": v for q, v in zip(QUANTILES, values, strict=True)}
        self.scalars(number, points | (further or {}))

    def scalars(self, number: int, points: dict[str, float]) -> None:
        """Write points of a step, leaving out what is undefined."""
        if self._writer is not None:
            with self.outlive(self._writer.log_dir):
                for name, value in points.items():
                    if not math.isnan(value):
                        self._writer.add_scalar(tag_of(name), value, number)
        if self._file is not None:
            with self.outlive(self._file.path):
                self._file.add(number, points)

    def step_is_over(self) -> None:
        """Have all that was said of the step in `metrics.jsonl`."""
        if self._file is not None:
            with self.outlive(self._file.path):
                self._file.write()

    def text(self, number: int, tag: str, markdown: str) -> None:
        """Show a text in TensorBoard."""
        if self._writer is not None:
            with self.outlive(self._writer.log_dir):
                self._writer.add_text(tag, markdown, number)

    def comparable(self, values: dict[str, bool | int | float | str]) -> None:
        """Let TensorBoard's page of hyperparameters compare the run with others by these, and by its validation loss."""
        # Not `add_hparams`, which begins a folder of its own for them.
        if self._writer is not None and self._writer.file_writer is not None:
            with self.outlive(self._writer.log_dir):
                for summary in hparams(values, {tag_of("loss/validation"): 0.0}):
                    self._writer.file_writer.add_summary(summary)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._active:
            print(text, flush=True)

    @contextmanager
    def outlive(self, path: str | Path) -> Iterator[None]:
        """Within, nothing that goes wrong with a log ends the run: it goes on, saying so once for each kind of log."""
        try:
            yield
        except OSError as error:
            reason = write_failure(error, Path(path)).strerror
            kind = os.path.dirname(path) if str(path).endswith(".parquet") else str(path)
            if kind not in self._lost:
                self._lost.add(kind)
                print(f"warning: {kind}: {reason}: the run goes on without this log", file=sys.stderr, flush=True)
            if self._writer is not None and kind == self._writer.log_dir:
                self._writer = None
            if self._file is not None and kind == str(self._file.path):
                self._file = None

    def pause(self) -> None:
        """Leave out the time since the last step: what comes next is timed from here."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Flush what is not yet on disk."""
        self.step_is_over()
        if self._writer is not None:
            with self.outlive(self._writer.log_dir):
                self._writer.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
