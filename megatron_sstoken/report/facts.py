"""What a reader needs to know before any figure: the run in a few facts, and what the page's words mean."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_sstoken.data.store import StoreManifest
from megatron_sstoken.report.runs import Run

HISTORIES = {
    "frozen": "the starting weights, which stay as they are",
    "adapters_off": "the model with its adapters switched off",
    "previous_visit": "the model as it was when it last saw the sample",
    "snapshot": "a copy of the weights, renewed every {every} steps",
    "ema": "a moving average of the weights (decay {decay})",
}
SCORES = {
    "rel": "rel_norm",
    "attention": "attention",
    "rho1": "loss − history loss",
    "probability": "probability of the token, exp(−loss)",
    "history_probability": "probability of the token under the history, exp(−history loss)",
    "entropy": "entropy",
    "cleaning": "history loss − reference loss",
    "external": "read from a file (selection.external)",
    "random": "a number drawn at random",
}
"""By methods; that of `sstoken` holds the run's own γ."""
COMPETE = {"sample": "each sample", "microbatch": "each micro-batch", "batch": "each batch", "dataset": "all data"}
REL = ("sstoken", "rel")
ATTENTION = ("sstoken", "attention")
NO_HISTORY = ("full", "random", "attention", "probability", "entropy", "external")

WORDS = {
    "Nats": "The unit of a loss, −log p with the natural logarithm; 0 is certain.",
    "Response, context": "Response tokens are the answer, which the model learns; context is the prompt, which it only reads.",
    "Kept, dropped": "Kept response tokens count in the training loss; dropped ones are read and not trained on.",
    "Watched": "Samples recorded every time, trained on or not, so that the same tokens can be followed (logging.watch).",
    "History loss": "The loss of the same token under the history's weights.",
    "REL": "History loss − loss: above 0, the model has become better at the token than the history is.",
    "Change": "Loss − history loss, which is −REL: above 0, it has become worse.",
    "Drift": "The mean change of the dropped tokens; in the chart, a running mean of about 10 steps.",
    "Entropy": "How undecided the model was before the token, in nats; 0 is certain.",
    "Weight": "What a kept token's loss is multiplied by (weights.method); shown where tokens do not count alike.",
    "Newly kept, newly dropped": "It was dropped, or kept, in the record of the sample before the one that is shown.",
}
"""What the page's words mean that no setting has a value for."""


@dataclass(frozen=True)
class Fact:
    """A word, what it stands for in this run (None: a word alone), and what it means in one or two sentences."""

    name: str
    value: str | None
    meaning: str


def facts(run: Run | None, num_train: int | None, num_validation: int | None) -> list[dict[str, Any]]:
    """Of the run, as far as its folder tells, then the words: name, value and meaning of each."""
    known = [] if run is None else [*_of_run(run, num_train, num_validation), *_of_selection(run)]
    words = [Fact(name, None, meaning) for name, meaning in WORDS.items()]
    return [asdict(one) for one in (*known, *words)]


def num_samples(run: Run, part: str) -> int | None:
    """Samples of the prepared data that the run calls `part`; None where that is gone, or is other data by now."""
    said = run.data.get(part) or run.setting("data", part)
    if not said:
        return None
    try:
        manifest = StoreManifest.load(run.path(str(said)))
    except (ValueError, OSError):
        return None
    fingerprint = run.data.get(f"{part}_fingerprint")
    return manifest.num_samples if fingerprint in (None, manifest.data_fingerprint) else None


def _of_run(run: Run, num_train: int | None, num_validation: int | None) -> list[Fact]:
    found = []
    if path := run.setting("model", "hf_path"):
        known = [_layers_text(run), _parameters_text(run.path(str(path)))]
        value = ", ".join(["/".join(Path(str(path)).parts[-2:]), *(one for one in known if one)])
        found.append(Fact("Model", value, "What is fine-tuned."))
    steps = max((curve[-1][0] for curve in run.curves.values() if curve), default=run.setting("training", "steps"))
    batch = run.setting("training", "global_batch_size")
    parts = [
        f"{num_train:,} samples" if num_train else None,
        f"{steps:,} steps" + (f" of {batch:,}" if isinstance(batch, int) else "") if isinstance(steps, int) else None,
    ]
    if any(parts):
        meaning = "A sample is one conversation or text; a step trains on one batch of them."
        found.append(Fact("Training", ", ".join(part for part in parts if part), meaning))
    if num_validation:
        meaning = "Held out and never trained on: their loss tells whether selection helps."
        found.append(Fact("Validation", f"{num_validation:,} samples", meaning))
    if (seed := run.setting("training", "seed")) is not None:
        found.append(Fact("Seed", str(seed), "Of the order of samples, and of whatever else is drawn at random."))
    return found


def _of_selection(run: Run) -> list[Fact]:
    """The method and its settings, those that it reads."""
    method, settings = run.method, run.settings.get("selection", {})
    meaning = {
        "full": "Every response token is kept and trained on.",
        "random": "Tokens are kept by chance: what a method of selection has to beat.",
    }.get(method, "The tokens with the highest scores are kept, the others dropped.")
    found = [Fact("Method", method, meaning)]
    if not settings or method == "full":
        return found
    score = SCORES.get(method, f"that of {method}")
    gamma = settings.get("gamma") if method == "sstoken" else None
    if gamma is not None:
        score = f"{gamma:g} · rel_norm + {1 - gamma:g} · attention"
    found.append(Fact("Score", score, _score_meaning(method, settings)))
    found.append(_kept(settings))
    if gamma is not None:
        found.append(Fact("γ", f"{gamma:g}", "Weight of rel_norm in the score; 1 − γ is that of attention."))
    if method in ATTENTION:
        meaning = "The part of a token's attention that goes to the prompt, from 0 to 1: the mean over a layer's heads."
        found.append(Fact("Attention", _attention_layer(run), meaning))
    if method not in NO_HISTORY and run.settings.get("history"):
        found.append(Fact("History", _history_text(run.settings["history"]), "What a token's loss is compared with."))
        if settings.get("drift_bound") is not None:
            found.append(_drift_bound(settings))
    return found


def _score_meaning(method: str, settings: Mapping[str, Any]) -> str:
    meaning = "What tokens are ranked by."
    if method in REL:
        floor = settings.get("rel_floor")
        meaning += " rel_norm is REL, scaled over the sample's response: (REL − lowest) ÷ (highest − lowest)"
        meaning += f"; 0 where highest − lowest is below rel_floor = {floor} nats."
    return meaning


def _kept(settings: Mapping[str, Any]) -> Fact:
    if settings.get("rule") == "threshold":
        return Fact("Threshold", f"{settings.get('threshold')}", "Tokens with this score or a higher one are kept.")
    rho, of = settings.get("rho"), COMPETE.get(str(settings.get("scope")), "what competes")
    if rho == "auto":
        rho = f"auto, {settings.get('rho_min')} to {settings.get('rho_max')},"
    return Fact("ρ", f"{rho} of {of}", "The share of the response tokens that is kept.")


def _drift_bound(settings: Mapping[str, Any]) -> Fact:
    steps, what = settings.get("drift_steps"), settings.get("on_drift")
    meaning = f"Drift above it for {steps} steps in a row is noticed by the run (selection.on_drift = {what})."
    return Fact("Drift bound", f"{settings.get('drift_bound')} nats", meaning)


def _history_text(settings: Mapping[str, Any]) -> str:
    if other := settings.get("hf_path"):
        return f"the weights of {Path(str(other)).name}"
    source = str(settings.get("source"))
    text = HISTORIES.get(source, source).format_map({name: settings.get(name) for name in ("every", "decay")})
    return text if source not in HISTORIES else f"{source}: {text}"


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _num_layers(run: Run) -> int | None:
    number = _json(run.path(str(run.setting("model", "hf_path"))) / "config.json").get("num_hidden_layers")
    return number if isinstance(number, int) else None


def _layers_text(run: Run) -> str | None:
    number = _num_layers(run)
    return f"{number} layers" if number else None


def _attention_layer(run: Run) -> str:
    """In words."""
    chosen, number = run.setting("selection", "layer"), _num_layers(run)
    layers = chosen if isinstance(chosen, list) else [chosen]
    if layers == [-1]:
        return f"last of {number} layers" if number else "last layer"
    if number and all(isinstance(one, int) for one in layers):
        names = [str(one % number) for one in layers]
        return f"layer{'s' if len(names) > 1 else ''} {', '.join(names)} of {number}, counted from 0"
    return f"selection.layer = {chosen}"


def _parameters_text(folder: Path) -> str | None:
    """As the headers of the weights' files have them."""
    index, total = _json(folder / "model.safetensors.index.json").get("weight_map"), 0
    names = set(map(str, index.values())) if isinstance(index, dict) else {"model.safetensors"}
    try:
        for name in names:
            with safe_open(folder / Path(name).name, framework="numpy") as tensors:
                total += sum(math.prod(tensors.get_slice(one).get_shape()) for one in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if total >= unit:
            return f"{total / unit:.3g} {name} parameters"
    return f"{total} parameters" if total else None
