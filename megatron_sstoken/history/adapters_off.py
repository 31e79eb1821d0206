"""History of a LoRA run from the model itself, with its adapters switched off: one forward pass a step."""

from dataclasses import replace

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.model.build import Model
from megatron_sstoken.passes.step import score_batch


class AdaptersOff(HistorySource):
    """Scores each batch with the base under the adapters; no store, no second model."""

    name = "adapters_off"
    passes_per_step = 1

    @classmethod
    def problems(cls, settings: Settings) -> list[str]:
        rank, found = settings.lora.rank, []
        if rank == 0:
            found.append(
                f"history.source=adapters_off needs lora.rank > 0, which is {rank}: set it, or use history.source=frozen"
            )
        if settings.lora.train_whole:
            whole = settings.lora.train_whole
            found.append(
                f"history.source=adapters_off needs the base as it was, of which lora.train_whole={whole} trains a part: use "
                "history.source=frozen"
            )
        return found + super().problems(settings)

    def prepare(self, model: Model, batches: list[TokenBatch]) -> list[TokenBatch]:
        with model.evaluating(), model.adapters_off() as base:
            reports = score_batch(base, batches)
        return [replace(report.batch, history_loss=report.loss) for report in reports] or batches
