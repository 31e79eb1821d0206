"""Rules that need more than one section of the settings; each broken one names setting, value, rule and remedy."""

from megatron_sstoken.config import Settings
from megatron_sstoken.history.source import history_sources
from megatron_sstoken.model.backend import preferred_backend
from megatron_sstoken.selection.methods import METHODS, find_method
from megatron_sstoken.selection.signals import PREDICTION_SIGNALS
from megatron_sstoken.selection.weights import WEIGHTS, find_weight
from megatron_sstoken.words import did_you_mean


def problems_of(settings: Settings) -> list[str]:
    """What cannot work whatever the model, the data and the machine. Empty when all is well."""
    return [
        *settings.problems(),
        *_method_problems(settings),
        *_rule_problems(settings),
        *_weight_problems(settings),
        *_history_problems(settings),
        *_drift_problems(settings),
        *_backend_problems(settings),
        *_memory_problems(settings),
        *_output_problems(settings),
    ]


def _method_problems(settings: Settings) -> list[str]:
    """What the selection method asks of the head."""
    name, head, found = settings.selection.method, settings.model.head, []
    try:
        method = find_method(name)
    except ValueError as error:
        return [f"selection.{error}"]
    if head != "selective" and (wanted := method.needs & set(PREDICTION_SIGNALS)):
        found.append(
            f"selection.method={name} scores by {' and '.join(sorted(wanted))}, which model.head={head} does not tell: "
            "use model.head=selective"
        )
    return found


def _weight_problems(settings: Settings) -> list[str]:
    """What the weights of tokens ask of their exponent and of the head."""
    name, alpha, head, found = settings.weights.method, settings.weights.alpha, settings.model.head, []
    try:
        weight = find_weight(name or "external")
    except ValueError as error:
        return [f"weights.{error}"]
    if alpha is not None and weight.alpha is None:
        with_alpha = " or ".join(other for other, one in WEIGHTS.items() if one.alpha is not None)
        found.append(
            f"weights.alpha={alpha} is the exponent of weights.method={with_alpha}, and the method is {name or 'not set'}: "
            "leave it out, or use one of these"
        )
    if head != "selective" and weight.needs:
        found.append(
            f"weights.method={name} weighs by {' and '.join(sorted(weight.needs))}, which model.head={head} does not tell: "
            "use model.head=selective"
        )
    return found


def _rule_problems(settings: Settings) -> list[str]:
    """What becomes of the scores of the method: rule, scope, and what is known before training."""
    selection, history, found = settings.selection, settings.history, []
    name, scope, sources = selection.method, selection.scope, history_sources()
    try:
        method, rule = find_method(name), selection.rule_in_force
    except ValueError:  # told by _method_problems
        return []
    if rule == "threshold" and not method.selects:
        found.append(f"selection.rule=threshold needs scores, and selection.method={name} has none: use another method")
    as_given = selection.rule_or_default == "chosen"
    if as_given and selection.rho != type(selection).rho:
        found.append(
            f"selection.rho={selection.rho} is not used by selection.method={name}, which takes the tokens that are marked as "
            "selected: leave it out, or rank their score with selection.rule=top"
        )
    if rule == "chosen" and not as_given:  # scope dataset
        known = [other for other, one in METHODS.items() if one.before_training]
        if not method.before_training:
            found.append(
                f"selection.scope={scope} needs scores that are known before training, which those of selection.method={name} "
                f"are not: use {' or '.join(known)}, or scope=batch"
            )
        elif "history_loss" in method.needs and (one := sources.get(history.source)) and not one.before_training:
            found.append(
                f"selection.scope={scope} needs history losses before training, which history.source={history.source} does not "
                f"have: use {' or '.join(other for other, source in sources.items() if source.before_training)}"
            )
        if selection.rho == "auto":
            found.append(
                f"selection.rho=auto chooses for a global batch, not for selection.scope={scope}: use a number"
            )
    if "reference_loss" in method.needs and history.reference_hf_path is None:
        found.append(f"selection.method={name} needs history.reference_hf_path: name the folder of the reference model")
    if "external" in method.needs and selection.external is None:
        found.append(f"selection.method={name} needs selection.external: name a Parquet file")
    if selection.external and "external" not in method.needs and settings.weights.method != "external":
        found.append(
            f"selection.external={selection.external} is not used: set selection.method=external or weights.method=external, "
            "or leave it out"
        )
    return found


def _history_problems(settings: Settings) -> list[str]:
    source, sources = settings.history.source, history_sources()
    if source not in sources:
        return [f"history.source={source} is unknown: {did_you_mean(source, sources)}use one of {', '.join(sources)}"]
    return sources[source].problems(settings)


def _drift_problems(settings: Settings) -> list[str]:
    """What would be done about drift, and cannot be noticed or done."""
    selection, path, found = settings.selection, settings.history.hf_path, []
    what = selection.on_drift
    if what != "warn" and path is not None:
        found.append(
            f"selection.on_drift={what} compares the model with its own past, and history.hf_path={path} names another one: "
            "leave one of them out (selection.explore alone explores from the start)"
        )
    try:
        rule = selection.rule_in_force
    except ValueError:  # told by _method_problems
        return found
    if what == "raise_rho" and rule != "top":
        found.append(
            "selection.on_drift=raise_rho needs a share to raise, and no share selects here: use warn or explore"
        )
    if rule == "chosen" and (selection.explore or what == "explore"):
        found.append(
            f"selection.explore={selection.explore} with on_drift={what}: tokens that were chosen before training give way to "
            "none: use explore=0 and on_drift=warn"
        )
    return found


def _backend_problems(settings: Settings) -> list[str]:
    """Backend, precision and adapters that do not go together."""
    backend, precision, rank, found = settings.model.backend, settings.training.precision, settings.lora.rank, []
    if backend == "transformer_engine" and precision == "fp32":
        found.append(
            "model.backend=transformer_engine computes in bf16 and fp8, not in training.precision=fp32: use backend=auto, or "
            "another precision"
        )
    if backend == "torch" and precision == "fp8":
        found.append("model.backend=torch cannot compute in training.precision=fp8: use backend=auto")
    if precision == "fp8" and rank > 0:
        found.append(
            f"training.precision=fp8 has no adapters, and lora.rank={rank} asks for them: use training.precision=bf16"
        )
    return found


def _memory_problems(settings: Settings) -> list[str]:
    """What would save memory and cannot, for want of weights in bf16, of a single stage, or of fused layers."""
    optimizer, training, found = settings.optimizer, settings.training, []
    for name in ("gradient_dtype", "first_moment_dtype", "second_moment_dtype", "offload_fraction"):
        value, plain = getattr(optimizer, name), 0 if name == "offload_fraction" else "fp32"
        if value != plain and training.precision == "fp32":
            found.append(
                f"optimizer.{name}={value} is for weights in bf16, and training.precision=fp32 has them in fp32: use "
                f"{name}={plain}, or training.precision=bf16"
            )
    if training.offload_layers and settings.parallel.pipeline > 1:
        found.append(
            f"training.offload_layers={training.offload_layers} needs parallel.pipeline=1, which is "
            f"{settings.parallel.pipeline}: use offload_layers=0"
        )
    if training.offload_layers and preferred_backend(settings) == "torch":
        found.append(
            f"training.offload_layers={training.offload_layers} is Transformer Engine's, and the layers of this run are "
            "torch's (model.backend, or training.precision=fp32): use offload_layers=0"
        )
    return found


def _output_problems(settings: Settings) -> list[str]:
    """What is asked for and has no place, or nothing to be made of."""
    logging, training, found = settings.logging, settings.training, []
    if logging.entropy and settings.model.head != "selective":
        found.append(
            f"logging.entropy=true needs model.head=selective, which is {settings.model.head}: use entropy=false"
        )
    if training.validate_every > 0 and settings.data.validation is None:
        found.append(
            f"training.validate_every={training.validate_every} needs data.validation: name a prepared folder, or use 0"
        )
    for name in ("records_every", "watch"):
        if (value := getattr(logging, name)) > 0 and settings.logging_directory is None:
            found.append(
                f"logging.{name}={value} needs logging.directory (or checkpoint.directory): name one, or use 0"
            )
    return found
