"""The validation loss."""

from collections import defaultdict

from megatron_sstoken.data.sources import Sources
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.scoring import scored_batches, sequential_loader
from megatron_sstoken.run_plan import DataPlan, RunPlan
from megatron_sstoken.training.metrics import summarize


def validation_losses(model: Model, data: DataPlan, plan: RunPlan, layout: Layout) -> dict[str, float]:
    """Mean loss in nats over all response tokens of the validation data, each counting once, as metrics: of all of it, and of
    each of its sources where it names several. All ranks call it."""
    loader, sources = sequential_loader(data, plan, layout), Sources.of(data.store)
    total: defaultdict[str, float] = defaultdict(float)
    count: defaultdict[str, int] = defaultdict(int)
    for _, reports in scored_batches(model, loader, layout, title="validation"):
        metrics = summarize(reports, model.architecture, layout, sources)
        sums = {f"loss/validation/{name}": sums for name, sums in metrics.of_sources.items()}
        sums["loss/validation"] = (metrics.loss_all * metrics.num_response, metrics.num_response)
        for name, (losses, number) in sums.items():
            if number:
                total[name] += losses
                count[name] += number
    model.train(True)
    return {name: total[name] / count[name] for name in total}
