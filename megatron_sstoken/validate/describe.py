"""The plan of a run and its batch arithmetic, for people."""

import math
from typing import Any

from megatron_sstoken.checkpoint.size import describe_checkpoint
from megatron_sstoken.config import Settings
from megatron_sstoken.history.source import source_of
from megatron_sstoken.model.backend import backend_of, numerics_of, transformer_engine_problem
from megatron_sstoken.model.lora_places import describe_trained
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.selection.methods import find_method


def describe(plan: RunPlan) -> str:
    """A line for each thing to know before a run."""
    s, a, shape = plan.settings, plan.architecture, plan.shape
    parallel = s.parallel
    samples = plan.train.samples
    used = samples.lengths[samples.indices]
    packs_per_epoch = plan.train.order.num_packs(1)
    rows: list[tuple[str, Any]] = [
        ("model", f"{a.family}, {a.num_parameters():,} parameters, {a.num_layers} layers ({s.model.hf_path})"),
        (
            "vocabulary",
            f"{a.vocabulary_size:,}, padded to {a.padded_vocabulary(s.model.vocabulary_multiple, parallel.tensor):,}",
        ),
        (
            "processes",
            f"{plan.world_size} = tensor {parallel.tensor} × pipeline {parallel.pipeline}"
            + (f" (× {parallel.virtual_pipeline} chunks)" if parallel.virtual_pipeline > 1 else "")
            + f" × context {parallel.context} × data {shape.data_size}"
            + (", sequence parallel" if parallel.sequence else ""),
        ),
        (
            "data",
            f"{len(used):,} samples, {int(used.sum()):,} tokens, longest {int(used.max())} "
            f"({samples.num_truncated} truncated, {samples.num_dropped} dropped, "
            f"{samples.num_without_response} left without response)",
        ),
        (
            "batch",
            f"{shape.global_batch_size} packs = micro-batch {shape.micro_batch_size} × data {shape.data_size} × "
            f"accumulation {shape.num_micro_batches}; about "
            f"{math.ceil(used.sum() / packs_per_epoch * shape.global_batch_size):,} real tokens a step",
        ),
        (
            "packs",
            f"{packs_per_epoch:,} of up to {s.data.sequence_length} tokens an epoch, "
            + (
                f"packed {len(used) / packs_per_epoch:.1f} samples each, "
                f"{100 * used.sum() / packs_per_epoch / s.data.sequence_length:.1f} % full"
                if s.data.packing
                else "one sample each, padded to the longest of its batch"
            ),
        ),
        ("steps", f"{plan.num_steps:,} ({plan.num_packs / packs_per_epoch:.3g} epochs)"),
        ("selection", _describe_selection(plan)),
        *([("history", work)] if (work := source_of(s).describe_work(plan)) else []),
        ("weights", _describe_weights(plan)),
        ("trained", describe_trained(a, s.lora)),
        ("layers", _describe_layers(s)),
        ("precision", numerics_of(s)),
        ("checkpoints", _describe_checkpoints(plan)),
    ]
    rows += [("note", note) for note in plan.notes]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _describe_checkpoints(plan: RunPlan) -> str:
    """Where, when and how large."""
    s = plan.settings
    if not s.checkpoint.directory:
        return "none"
    when = [
        *([f"every {s.checkpoint.save_every} steps"] if s.checkpoint.save_every else []),
        *([f"every {s.checkpoint.save_minutes:g} minutes"] if s.checkpoint.save_minutes else []),
        "at the end",
    ]
    size = describe_checkpoint(plan.architecture, s, plan.world_size, with_copy=source_of(s).copies_weights)
    return f"{s.checkpoint.directory}, {' and '.join(when)}: {size}"


def _describe_layers(settings: Settings) -> str:
    """What the layers are made of and, where nobody said, why."""
    backend = backend_of(settings)
    if settings.model.backend != "auto":
        return backend
    if settings.training.precision == "fp32":
        return f"{backend} (fp32)"
    return f"{backend} ({transformer_engine_problem() or 'transformer_engine can run'})"


def _describe_weights(plan: RunPlan) -> str:
    """How much selected tokens count."""
    number = "the number of {} tokens".format
    divisors = {"selected": number("selected"), "response": number("response"), "weight": "their sum"}
    held, weight, weights = plan.train.store.manifest.weighted, plan.weight, plan.settings.weights
    divided = f", divided by {divisors[weights.divisor]}"
    if weight.weigh is None and not plan.weighted:
        ignored = f" (the data's weights are ignored: weights.method={plan.weight_method})" if held else ""
        return "none: all selected tokens alike" + ignored + divided * (weights.divisor == "response")
    if weight.weigh is None:
        given = plan.settings.selection.external if "weight" in plan.external_values else "the data"
        return f"external: those of {given}{divided}"
    exponent = weight.exponent(weights.alpha)
    alpha = "" if exponent is None else f", alpha {exponent:g}"
    return f"{plan.weight_method}{alpha}" + ", times those of the data" * plan.weighted + divided


def _describe_rule(plan: RunPlan) -> str:
    """What becomes of the scores."""
    selection = plan.settings.selection
    if plan.ranks_all_data:
        return f"rho {selection.rho} of all data, chosen before training"
    if selection.rule_in_force == "chosen":
        return f"the tokens that {selection.external} marks as selected"
    if selection.rule_in_force == "threshold":
        return f"scores of {selection.threshold} and above"
    return f"rho {selection.rho}, scope {selection.scope}"


def _describe_selection(plan: RunPlan) -> str:
    settings, selection = plan.settings, plan.settings.selection
    method = find_method(selection.method)
    if not method.selects:
        return f"{selection.method}: every response token"
    text = f"{selection.method}, {_describe_rule(plan)}, loss averaged by {selection.loss_average}"
    if "attention" in method.needs:
        text += f", gamma {selection.gamma}, layer {selection.layer}"
    if share := selection.after_drift(0).explore:
        text += f", {share} of it drawn at random"
    if "history_loss" in method.needs:
        text += f", history {source_of(settings).describe(settings)}"
        if selection.on_drift != "warn":
            text += f", on drift {selection.on_drift}"
    if "reference_loss" in method.needs:
        text += f", reference {settings.history.reference_hf_path}"
    if "score" in plan.external_values:
        text += f", scores of {selection.external}"
    return text
