"""The validation loss."""

from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.scoring import scored_batches, sequential_loader
from megatron_sstoken.run_plan import DataPlan, RunPlan
from megatron_sstoken.training.metrics import summarize


def validation_loss(model: Model, data: DataPlan, plan: RunPlan, layout: Layout) -> float:
    """Mean loss in nats over all response tokens of the validation data, each counting once. All ranks call it."""
    loader = sequential_loader(data, plan, layout)
    total, count = 0.0, 0
    for _, reports in scored_batches(model, loader, layout, title="validation"):
        metrics = summarize(reports, model.architecture, layout)
        if metrics.num_response:
            total += metrics.loss_all * metrics.num_response
            count += metrics.num_response
    model.train(True)
    return total / count
