"""ssToken (arXiv 2510.18250) in plain Hugging Face transformers: slow, obvious, independent of the package.

One sample at a time, no padding, no packing, dropout off. The model decides the precision: float32, or
float64 after `model.double()` (transformers still normalises, rotates and takes the attention softmax in
float32 then, so float64 results of a transformer agree with exact ones to float32 accuracy only).
Numbers leave as Python floats; differences, scores and norms are taken in double precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

CONTEXT, RESPONSE = 0, 1
REL_NORM_EPSILON = 1e-8

Record = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A tokenised conversation.

    `tokens`: n ids; `roles`: n entries, 0 context, 1 response. Raises ValueError if they do not fit together.
    """

    tokens: list[int]
    roles: list[int]
    weights: list[float] | None = None
    """How much the loss of each token counts; None: all alike."""

    def __post_init__(self) -> None:
        _check_roles(self.tokens, self.roles)


Batch = Sequence[Sample] | Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Objective:
    """What a training step minimises.

    `method`: "full" (every response token), "sstoken" (the selected ones; needs `history`), another of `SCORES`, or "chosen"
    (those of `chosen`). `threshold`: in place of the top k, every token with at least this score.
    `scope`: "sample", "microbatch" or "batch": the set of response tokens that the top k are taken from.
    `loss_average`: "token" (sum / number over the global batch), "sample" (mean per sample, then over all
    samples; paper Eq. 11) or "microbatch" (mean of micro-batch means; official code). A sample or micro-batch
    without a selected token counts as a mean of 0.
    """

    method: str = "full"
    history: PreTrainedModel | None = None
    gamma: float = 0.5
    rho: str = "0.6"
    rel_floor: float = 1e-3
    layer: int | Sequence[int] = -1
    scope: str = "sample"
    loss_average: str = "token"
    divisor: str = "selected"
    """What a sum of weighted losses is divided by: the number of "selected" or "response" tokens, or the "weight" of the
    selected."""
    weight: str = "none"
    """"power", "deft" or "entropy": `prediction_weights`, times the samples' own."""
    alpha: float = 1.0
    reference: PreTrainedModel | None = None
    threshold: float | None = None
    chosen: Sequence[Sequence[bool]] | None = None
    """Of every sample of the batch, in order: which tokens are trained on."""

    def __post_init__(self) -> None:
        _check_choice("method", self.method, ("full", "sstoken", "chosen", *SCORES))
        _check_choice("scope", self.scope, ("sample", "microbatch", "batch"))
        _check_choice("loss_average", self.loss_average, ("token", "sample", "microbatch"))
        if self.method == "sstoken" and self.history is None:
            raise ValueError("method is 'sstoken' but history is None: pass the history model")


# Signals


def token_losses(model: PreTrainedModel, tokens: Sequence[int]) -> list[float | None]:
    """Loss of each token given the earlier ones: -log p(x_i | x_<i), natural log.

    `tokens`: n ids. Returns n values; None at position 0, which nothing predicts.
    """
    with torch.no_grad():
        return [None, *_losses(model, tokens).tolist()]


def attention_mass(
    model: PreTrainedModel, tokens: Sequence[int], roles: Sequence[int], layer: int | Sequence[int] = -1
) -> list[float]:
    """Attention to earlier context: mean over query heads of Σ_{j<i, x_j context} softmax_j.

    `tokens`, `roles`: n entries. `layer`: an index (negative from the end), or several to average over.
    Returns n values in [0, 1]; the query is token i itself. Raises ValueError for a layer the model lacks.
    """
    _check_roles(tokens, roles)
    with torch.no_grad():
        attentions = _forward(model, tokens, output_attentions=True).attentions  # per layer (1, heads, n, n)
    layers = [layer] if isinstance(layer, int) else list(layer)
    num_layers = len(attentions)
    if not layers or not all(-num_layers <= index < num_layers for index in layers):
        raise ValueError(f"layer is {layer} but the model has {num_layers} layers: use {-num_layers}..{num_layers - 1}")
    masses = [_context_mass(attentions[index][0].double(), roles) for index in layers]
    return [sum(of_token) / len(layers) for of_token in zip(*masses, strict=True)]


def _context_mass(probabilities: Tensor, roles: Sequence[int]) -> list[float]:
    """Head mean of each query's probability on earlier context. `probabilities`: (heads, n, n)."""
    mean_over_heads = probabilities.mean(dim=0).tolist()
    return [sum(row[j] for j in range(i) if roles[j] == CONTEXT) for i, row in enumerate(mean_over_heads)]


# Scores and selection


def score_sample(
    current: PreTrainedModel,
    history: PreTrainedModel,
    sample: Sample,
    gamma: float = 0.5,
    rho: str | float = "0.6",
    rel_floor: float = 1e-3,
    layer: int | Sequence[int] = -1,
) -> list[Record]:
    """Signals, scores and the selection of one sample: `score_records` of what the two models say."""
    return score_records(
        sample,
        losses=token_losses(current, sample.tokens),
        history_losses=token_losses(history, sample.tokens),
        attention=attention_mass(current, sample.tokens, sample.roles, layer),
        gamma=gamma,
        rho=rho,
        rel_floor=rel_floor,
    )


def score_records(
    sample: Sample,
    losses: Sequence[float | None],
    history_losses: Sequence[float | None],
    attention: Sequence[float],
    gamma: float = 0.5,
    rho: str | float = "0.6",
    rel_floor: float = 1e-3,
) -> list[Record]:
    """One record a token, of its signals, score and whether it is selected.

    `losses`, `history_losses`, `attention`: n values. Keys: position, token, role, loss, history_loss, rel,
    rel_norm, attention, score, selected. Losses and rel are None at position 0; rel_norm, score and selected
    are None outside R, the response tokens at position >= 1. rel = history_loss - loss (paper Eq. 3);
    rel_norm is its min-max over R, or 0 throughout when max - min < `rel_floor`. ValueError if R is empty.
    """
    eligible = response_positions(sample)
    records: list[Record] = []
    for i, (token, loss, history_loss) in enumerate(zip(sample.tokens, losses, history_losses, strict=True)):
        rel = None if loss is None or history_loss is None else history_loss - loss
        records.append(
            {
                "position": i,
                "token": token,
                "role": sample.roles[i],
                "loss": loss,
                "history_loss": history_loss,
                "rel": rel,
                "rel_norm": None,
                "attention": attention[i],
                "score": None,
                "selected": None,
            }
        )

    rels = [records[i]["rel"] for i in eligible]
    smallest, spread = min(rels), max(rels) - min(rels)
    for i in eligible:
        record = records[i]
        is_flat = spread < rel_floor
        record["rel_norm"] = 0.0 if is_flat else (record["rel"] - smallest) / (spread + REL_NORM_EPSILON)
        record["score"] = gamma * record["rel_norm"] + (1 - gamma) * record["attention"]
    return select_global([records], rho)[0]


def select_global(samples: Sequence[Sequence[Record]], rho: str | float) -> list[list[Record]]:
    """Copies of the records with `selected` set by one top k over all their response tokens (scope "batch").

    k = ceil(rho·|R|), |R| counted over all samples. Ties: the lower sample wins, then the lower position.
    Raises ValueError for a score that is not finite.
    """
    copies = [[dict(record) for record in records] for records in samples]
    candidates = []
    for index, records in enumerate(copies):
        for record in records:
            score = record["score"]
            if score is None:
                continue
            if not math.isfinite(score):
                raise ValueError(f"sample {index}, position {record['position']}: score is {score}; it must be finite")
            candidates.append((-score, index, record["position"]))

    chosen = set(sorted(candidates)[: selection_size(rho, len(candidates))])
    for key in candidates:
        _, index, position = key
        copies[index][position]["selected"] = key in chosen
    return copies


def selection_size(rho: str | float, num_tokens: int) -> int:
    """k = ceil(rho·num_tokens), exact for rho as written in decimal; ValueError for rho outside (0, 1]."""
    exact = Fraction(str(rho))
    if not 0 < exact <= 1:
        raise ValueError(f"rho is {rho}; it must be above 0 and at most 1")
    return math.ceil(exact * num_tokens)


def response_positions(sample: Sample) -> list[int]:
    """R: the positions >= 1 of response tokens. Raises ValueError if there is none."""
    positions = [i for i, role in enumerate(sample.roles) if i >= 1 and role == RESPONSE]
    if not positions:
        raise ValueError(
            f"a sample of {len(sample.tokens)} tokens has no response token at position 1 or later: drop it"
        )
    return positions


# Training


def train_full(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_grad: float = 0.0,
    lr_schedule: Callable[[int], float] | Sequence[float] | None = None,
    objective: Objective | None = None,
    history_decay: float | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place with AdamW, one step a global batch; returns each step's loss and grad_norm.

    A batch is a list of samples, or a list of micro-batches (lists of samples). `lr_schedule` gives the
    learning rate of step 0, 1, ... itself and replaces `lr`. Weight decay acts on 2-D weights only (as in
    megatron). grad_norm is the global L2 norm before clipping; clip_grad 0 turns clipping off. With `history_decay` d the
    weights of `objective.history` become d·themselves + (1 − d)·the model's after each step.
    """
    parameters = _trainable(model)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters.values() if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=betas,
        eps=eps,
    )
    log = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(lr_schedule, step, lr)
        loss, grads = loss_and_gradients(model, batch, objective)
        grad_norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads.values()))
        factor = clip_grad / (grad_norm + 1e-6) if 0 < clip_grad < grad_norm else 1.0
        for name, parameter in parameters.items():
            parameter.grad = grads[name] * factor
        optimizer.step()
        optimizer.zero_grad()
        if history_decay is not None:
            _follow(objective.history, model, history_decay)
        log.append({"loss": loss, "grad_norm": grad_norm})
    return log


@torch.no_grad()
def _follow(history: PreTrainedModel, model: PreTrainedModel, decay: float) -> None:
    """Move the weights of `history` towards the model's."""
    for old, new in zip(history.parameters(), model.parameters(), strict=True):
        old.copy_(decay * old.double() + (1 - decay) * new.double())


def gradients(model: PreTrainedModel, batch: Batch, objective: Objective | None = None) -> dict[str, Tensor]:
    """Unclipped gradient of a global batch's loss by trainable parameter's name; `model` stays as it was."""
    return loss_and_gradients(model, batch, objective)[1]


def loss_and_gradients(
    model: PreTrainedModel, batch: Batch, objective: Objective | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss of a global batch under `objective` (default: full), and its unclipped gradient by name."""
    objective = objective or Objective()
    micro_batches = _micro_batches(batch, objective)
    trained = _trained_tokens(model, micro_batches, objective)
    if objective.weight != "none":
        micro_batches = [[_weighted(model, sample, objective) for sample in samples] for samples in micro_batches]
    if objective.divisor == "selected" and all(s.weights is None for samples in micro_batches for s in samples):
        weights = loss_weights(trained, objective.loss_average)
    else:
        weights = soft_weights(micro_batches, trained, objective)
    loss = torch.zeros(())
    for samples, weights_of_samples in zip(micro_batches, weights, strict=True):
        for sample, weight in zip(samples, weights_of_samples, strict=True):
            losses = _losses(model, sample.tokens)
            loss = loss + (losses * losses.new_tensor(weight[1:])).sum()
    parameters = _trainable(model)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), dict(zip(parameters, grads, strict=True))


def loss_weights(trained: Sequence[Sequence[Sequence[bool]]], loss_average: str) -> list[list[list[float]]]:
    """The factor of each token's loss in the batch's loss, same nesting: [micro-batch][sample][token]."""
    num_micro_batches = len(trained)
    num_samples = sum(len(samples) for samples in trained)
    num_tokens = sum(sum(tokens) for samples in trained for tokens in samples)

    def divisor(samples: Sequence[Sequence[bool]], tokens: Sequence[bool]) -> int:
        if loss_average == "sample":
            return num_samples * sum(tokens)
        if loss_average == "microbatch":
            return num_micro_batches * sum(sum(other) for other in samples)
        return num_tokens

    return [
        [[1 / divisor(samples, tokens) if is_trained else 0.0 for is_trained in tokens] for tokens in samples]
        for samples in trained
    ]


def prediction_weights(log_probabilities: Tensor, tokens: Sequence[int], weight: str, alpha: float) -> list[float]:
    """How much each token counts, given (n, vocabulary) log-probabilities, double precision, of the predictions of n tokens.

    "power": p^α. "deft": p^(Σ_v p_v²). "entropy": (H / 3)^α, H the entropy (nats) of the 20 likeliest words, renormalised.
    """
    result = []
    for row, token in zip(log_probabilities, tokens, strict=True):
        p = row.exp().tolist()
        if weight == "power":
            result.append(p[token] ** alpha)
        elif weight == "deft":
            result.append(p[token] ** sum(one * one for one in p))
        else:
            likeliest = sorted(p, reverse=True)[:20]
            shares = [one / sum(likeliest) for one in likeliest]
            result.append((-sum(one * math.log(one) for one in shares if one > 0) / 3) ** alpha)
    return result


def _weighted(model: PreTrainedModel, sample: Sample, objective: Objective) -> Sample:
    with torch.no_grad():
        log_probabilities = _forward(model, sample.tokens).logits[0, :-1].double().log_softmax(-1)
    soft = [1.0, *prediction_weights(log_probabilities, sample.tokens[1:], objective.weight, objective.alpha)]
    own = sample.weights or [1.0] * len(soft)
    return replace(sample, weights=[a * b for a, b in zip(own, soft, strict=True)])


def soft_weights(
    micro_batches: list[list[Sample]], trained: list[list[list[bool]]], objective: Objective
) -> list[list[list[float]]]:
    """As `loss_weights`, with the samples' own weights and `objective.divisor`."""
    pairs = [list(zip(*both, strict=True)) for both in zip(micro_batches, trained, strict=True)]

    def weight(sample: Sample, at: int) -> float:
        return 1.0 if sample.weights is None else sample.weights[at]

    def divided_by(group: list) -> float:
        if objective.divisor == "response":
            return sum(sum(_response_mask(sample)) for sample, _ in group)
        kept = [(sample, at) for sample, mask in group for at, one in enumerate(mask) if one]
        return len(kept) if objective.divisor == "selected" else sum(weight(sample, at) for sample, at in kept)

    everything = [pair for group in pairs for pair in group]
    result = []
    for group in pairs:
        rows = []
        for sample, mask in group:
            if objective.loss_average == "token":
                by = divided_by(everything)
            elif objective.loss_average == "sample":
                by = len(everything) * divided_by([(sample, mask)])
            else:
                by = len(pairs) * divided_by(group)
            rows.append([weight(sample, at) / by if one else 0.0 for at, one in enumerate(mask)])
        result.append(rows)
    return result


def _trained_tokens(
    model: PreTrainedModel, micro_batches: list[list[Sample]], objective: Objective
) -> list[list[list[bool]]]:
    """Whether each token enters the loss: [micro-batch][sample][token]."""
    if objective.method == "full":
        return [[_response_mask(s) for s in samples] for samples in micro_batches]
    if objective.method == "chosen":
        masks = iter(objective.chosen or ())
        return [[list(next(masks)) for _ in samples] for samples in micro_batches]
    records = [[_score(model, sample, objective) for sample in samples] for samples in micro_batches]
    if objective.threshold is not None:
        for record in (record for samples in records for sample in samples for record in sample):
            record["selected"] = record["score"] is not None and record["score"] >= objective.threshold
    elif objective.scope == "microbatch":
        records = [select_global(samples, objective.rho) for samples in records]
    elif objective.scope == "batch":
        selected = iter(select_global([sample for samples in records for sample in samples], objective.rho))
        records = [[next(selected) for _ in samples] for samples in records]
    return [[[record["selected"] is True for record in sample] for sample in samples] for samples in records]


SCORES: dict[str, Callable[[Any], float]] = {
    "probability": lambda x: math.exp(-x("loss")),
    "history_probability": lambda x: math.exp(-x("history_loss")),
    "entropy": lambda x: x("entropy"),
    "cleaning": lambda x: x("history_loss") - x("reference_loss"),
}
"""Methods besides ssToken: the score of a token, of what is asked for by name."""


def method_records(model: PreTrainedModel, sample: Sample, objective: Objective) -> list[Record]:
    """Records of position and score, None outside R, by one of `SCORES`; `selected` is each sample's own top k."""
    models = {"loss": model, "history_loss": objective.history, "reference_loss": objective.reference}

    @functools.cache
    def known(name: str) -> Sequence[float | None]:
        return entropies(model, sample.tokens) if name == "entropy" else token_losses(models[name], sample.tokens)

    eligible = set(response_positions(sample))

    def score(position: int) -> float | None:
        return SCORES[objective.method](lambda name: known(name)[position]) if position in eligible else None

    records: list[Record] = [
        {"position": position, "score": score(position), "selected": None} for position in range(len(sample.tokens))
    ]
    return select_global([records], objective.rho)[0]


def entropies(model: PreTrainedModel, tokens: Sequence[int]) -> list[float | None]:
    """Entropy (nats) of the prediction of each token; None at position 0."""
    with torch.no_grad():
        rows = _forward(model, tokens).logits[0, :-1].double().log_softmax(-1)
    return [None, *(-(rows.exp() * rows).sum(-1)).tolist()]


def _score(model: PreTrainedModel, sample: Sample, objective: Objective) -> list[Record]:
    if objective.method in SCORES:
        return method_records(model, sample, objective)
    assert objective.history is not None  # Objective checked it
    return score_sample(
        model,
        objective.history,
        sample,
        gamma=objective.gamma,
        rho=objective.rho,
        rel_floor=objective.rel_floor,
        layer=objective.layer,
    )


def _response_mask(sample: Sample) -> list[bool]:
    positions = response_positions(sample)
    return [i in positions for i in range(len(sample.tokens))]


def _micro_batches(batch: Batch, objective: Objective) -> list[list[Sample]]:
    """The batch as micro-batches; a flat batch is one. ValueError if flat where that matters."""
    if not batch:
        raise ValueError("the batch is empty: give it at least one sample")
    samples = [sample for sample in batch if isinstance(sample, Sample)]
    micro_batches = [list(samples) for samples in batch if not isinstance(samples, Sample)]
    if samples and micro_batches:
        raise ValueError("the batch mixes samples and lists of samples: give one or the other")
    if micro_batches:
        return micro_batches
    selects_by_microbatch = objective.method not in ("full", "chosen") and objective.scope == "microbatch"
    if objective.loss_average == "microbatch" or selects_by_microbatch:
        raise ValueError(
            f"loss_average is {objective.loss_average!r} and scope {objective.scope!r} but the batch is a "
            "flat list of samples: give it as a list of micro-batches"
        )
    return [samples]


def _learning_rate(schedule: Callable[[int], float] | Sequence[float] | None, step: int, constant: float) -> float:
    if schedule is None:
        return constant
    return schedule(step) if callable(schedule) else schedule[step]


def _trainable(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Trainable parameters by name; a tied weight appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# The model


def _losses(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Losses of tokens 1 to n-1, differentiable: (n-1,) in the model's precision."""
    logits = _forward(model, tokens).logits[0]  # (n, vocabulary)
    log_probabilities = torch.log_softmax(logits, dim=-1)
    return -log_probabilities[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:], dtype=torch.long)]


def _forward(model: PreTrainedModel, tokens: Sequence[int], **options: bool) -> Any:
    """One unpadded sample through the model without dropout; ValueError if the model is no reference."""
    if not tokens:
        raise ValueError("tokens is empty: a sample has at least one token")
    if model.config._attn_implementation != "eager":
        raise ValueError(
            f"attn_implementation is {model.config._attn_implementation!r}: load the model with "
            "'eager', which returns attention probabilities"
        )
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the model is in {model.dtype}: the reference computes in float32 or float64")
    with _evaluation(model):
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False, **options)


@contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_roles(tokens: Sequence[int], roles: Sequence[int]) -> None:
    if len(tokens) != len(roles):
        raise ValueError(f"{len(tokens)} tokens but {len(roles)} roles: give one role per token")
    for i, role in enumerate(roles):
        if role not in (CONTEXT, RESPONSE):
            raise ValueError(f"position {i}: role is {role}; use {CONTEXT} for context, {RESPONSE} for response")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
