"""Rules that need only the settings; each broken one is a message that names setting, value, rule and remedy."""

from collections.abc import Callable

from megatron_sstoken.config import Settings
from megatron_sstoken.history.source import history_sources
from megatron_sstoken.selection.methods import METHODS, find_method
from megatron_sstoken.selection.topk import parse_rho


def problems_of(settings: Settings) -> list[str]:
    """What cannot work whatever the model, the data and the machine. Empty when all is well."""
    found: list[str] = []

    def require(holds: bool, message: str) -> None:
        if not holds:
            found.append(message)

    def at_least(name: str, value: float, least: float) -> None:
        require(value >= least, f"{name}={value} is too small: use {least} or more")

    def in_range(name: str, value: float, low: float, high: float) -> None:
        require(low <= value <= high, f"{name}={value} is outside [{low}, {high}]")

    require(settings.model.hf_path is not None, "model.hf_path is not set: name a Hugging Face folder")
    require(settings.data.train is not None, "data.train is not set: name a folder made by tools/prepare_data.py")
    for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert"):
        at_least(f"parallel.{name}", getattr(settings.parallel, name), 1)
    require(
        settings.parallel.virtual_pipeline == 1 or settings.parallel.pipeline > 1,
        f"parallel.virtual_pipeline={settings.parallel.virtual_pipeline} needs parallel.pipeline > 1, "
        f"which is {settings.parallel.pipeline}: use virtual_pipeline=1",
    )
    require(
        not settings.parallel.sequence or settings.parallel.tensor > 1,
        f"parallel.sequence=true needs parallel.tensor > 1, which is {settings.parallel.tensor}: use sequence=false",
    )
    at_least("model.vocabulary_multiple", settings.model.vocabulary_multiple, 1)
    at_least("data.sequence_length", settings.data.sequence_length, 2)
    for name in ("rho", "rho_min", "rho_max"):
        value = getattr(settings.selection, name)
        try:
            if value != "auto":
                parse_rho(value)
        except ValueError as error:
            found.append(f"selection.{str(error).replace('rho', name, 1)}")
    require(
        settings.selection.rho_min <= settings.selection.rho_max,
        f"selection.rho_min={settings.selection.rho_min} is above selection.rho_max={settings.selection.rho_max}: "
        "use a smaller rho_min",
    )
    layers = settings.selection.layer if isinstance(settings.selection.layer, list) else [settings.selection.layer]
    require(len(layers) > 0, "selection.layer=[] names no layer: use -1 for the last")
    in_range("selection.gamma", settings.selection.gamma, 0, 1)
    at_least("selection.rel_floor", settings.selection.rel_floor, 0)
    at_least("selection.warmup_samples", settings.selection.warmup_samples, 0)
    _check_lora(settings, require)
    found += _method_problems(settings)
    for name in ("learning_rate", "min_learning_rate", "weight_decay", "clip_grad"):
        at_least(f"optimizer.{name}", getattr(settings.optimizer, name), 0)
    require(
        settings.optimizer.min_learning_rate <= settings.optimizer.learning_rate,
        f"optimizer.min_learning_rate={settings.optimizer.min_learning_rate} is above "
        f"optimizer.learning_rate={settings.optimizer.learning_rate}: use a smaller one",
    )
    in_range("optimizer.warmup_fraction", settings.optimizer.warmup_fraction, 0, 1)
    for name in ("beta1", "beta2"):
        value = getattr(settings.optimizer, name)
        require(0 <= value < 1, f"optimizer.{name}={value} is outside [0, 1)")
    require(settings.optimizer.epsilon > 0, f"optimizer.epsilon={settings.optimizer.epsilon} must be above 0")
    for name in ("micro_batch_size", "global_batch_size", "epochs"):
        at_least(f"training.{name}", getattr(settings.training, name), 1)
    at_least("training.seed", settings.training.seed, 0)
    if settings.training.steps is not None:
        at_least("training.steps", settings.training.steps, 1)
    layers_choose = settings.training.precision == "fp8" and settings.training.fp8_recipe != "delayed"
    for name in ("fp8_first_bf16_layers", "fp8_last_bf16_layers"):
        value = getattr(settings.training, name)
        at_least(f"training.{name}", value, 0)
        require(
            value == 0 or layers_choose,
            f"training.{name}={value} needs training.precision=fp8 and a training.fp8_recipe other than delayed: use 0",
        )
    require(
        settings.model.backend != "transformer_engine" or settings.training.precision != "fp32",
        "model.backend=transformer_engine computes in bf16 and fp8, not in training.precision=fp32: use "
        "backend=auto, or another precision",
    )
    require(
        settings.model.backend != "torch" or settings.training.precision != "fp8",
        "model.backend=torch cannot compute in training.precision=fp8: use backend=auto",
    )
    for name, value in (
        ("training.validate_every", settings.training.validate_every),
        ("checkpoint.save_every", settings.checkpoint.save_every),
        ("checkpoint.keep", settings.checkpoint.keep),
        ("logging.records_every", settings.logging.records_every),
    ):
        at_least(name, value, 0)
    at_least("logging.every", settings.logging.every, 1)
    require(
        not settings.logging.entropy or settings.model.head == "selective",
        f"logging.entropy=true needs model.head=selective, which is {settings.model.head}: use entropy=false",
    )
    require(
        not settings.model.compiled_head or settings.model.head == "selective",
        f"model.compiled_head=true needs model.head=selective, which is {settings.model.head}: use compiled_head=false",
    )
    require(
        settings.checkpoint.save_every == 0 or settings.checkpoint.directory is not None,
        f"checkpoint.save_every={settings.checkpoint.save_every} needs checkpoint.directory",
    )
    require(
        settings.training.validate_every == 0 or settings.data.validation is not None,
        f"training.validate_every={settings.training.validate_every} needs data.validation",
    )
    require(
        settings.logging.records_every == 0 or settings.logging_directory is not None,
        f"logging.records_every={settings.logging.records_every} needs logging.directory (or checkpoint.directory)",
    )
    return found


def _check_lora(settings: Settings, require: Callable[[bool, str], None]) -> None:
    lora = settings.lora
    require(lora.rank >= 0, f"lora.rank={lora.rank} is too small: use 0 (no adapters) or more")
    require(lora.alpha > 0, f"lora.alpha={lora.alpha} must be above 0")
    require(0 <= lora.dropout < 1, f"lora.dropout={lora.dropout} is outside [0, 1)")
    require(len(lora.targets) > 0, "lora.targets=[] names no linear: leave it out for all, or use lora.rank=0")
    require(
        len(set(lora.targets)) == len(lora.targets), f"lora.targets={lora.targets} names a linear twice: use each once"
    )
    for name, value in (
        ("model.backend", settings.model.backend),
        ("training.precision", settings.training.precision),
    ):
        require(
            lora.rank == 0 or value not in ("transformer_engine", "fp8"),
            f"{name}={value} has no adapters, and lora.rank={lora.rank} asks for them: Transformer Engine fuses the norm into "
            "the linears they would sit on; use model.backend=auto and training.precision=bf16",
        )


def _method_problems(settings: Settings) -> list[str]:
    """What the chosen method and history source ask of the other settings."""
    name, head, sources = settings.selection.method, settings.model.head, history_sources()
    try:
        method = find_method(name)
    except ValueError as error:
        return [f"selection.{error}"]
    found = []
    if settings.selection.rho == "auto" and not method.bounded:
        bounded = [other for other, one in METHODS.items() if one.bounded]
        found.append(
            f"selection.rho=auto needs scores between 0 and 1, which selection.method={name} does not give: use "
            f"{' or '.join(bounded)}, or a number"
        )
    if head != "selective" and (wanted := {"entropy", "top1"} & method.needs):
        found.append(
            f"selection.method={name} scores by {' and '.join(sorted(wanted))}, which model.head={head} does not tell: "
            "use model.head=selective"
        )
    source = settings.history.source
    if source not in sources:
        return [*found, f"history.source={source} is unknown: use one of {', '.join(sources)}"]
    return found + sources[source].problems(settings)
