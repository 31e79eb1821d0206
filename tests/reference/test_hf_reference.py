"""The reference against hand-computed numbers and PyTorch's own losses: nobody else judges the judge."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from .hf_reference import (
    Objective,
    Sample,
    attention_mass,
    gradients,
    loss_and_gradients,
    loss_weights,
    prediction_weights,
    score_records,
    score_sample,
    select_global,
    selection_size,
    token_losses,
    train_full,
)

pytestmark = pytest.mark.filterwarnings("error")

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, THETA = 41, 4, 2, 8, 100.0

SAMPLES = [
    Sample([3, 17, 5, 29, 11, 8, 2], [0, 0, 1, 1, 0, 1, 1]),
    Sample([7, 1, 40, 22], [0, 1, 1, 1]),
    Sample([9, 9, 30, 4, 6, 12, 38, 25, 0], [1, 0, 0, 0, 1, 0, 1, 1, 1]),
]


def tiny(family: str = "llama", layers: int = 2, seed: int = 0, attention: str = "eager") -> PreTrainedModel:
    config_type, model_type = FAMILIES[family]
    config = config_type(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=0.2,
        attn_implementation=attention,
    )
    torch.manual_seed(seed)
    model = model_type(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones hide mistakes
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    return model


def logits_of(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0]


# Signals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_losses_are_cross_entropies_of_shifted_logits(family, dtype):
    model = tiny(family).to(dtype)
    tokens = SAMPLES[2].tokens
    expected = functional.cross_entropy(logits_of(model, tokens)[:-1], torch.tensor(tokens[1:]), reduction="none")
    losses = token_losses(model, tokens)
    assert losses[0] is None
    assert losses[1:] == pytest.approx(expected.tolist(), rel=1e-6)
    assert len(set(losses)) == len(tokens)


def test_the_first_token_has_no_loss():
    assert token_losses(tiny(), [5]) == [None]


def test_dropout_is_off_whatever_mode_the_model_is_in():
    model = tiny()
    expected = token_losses(model.eval(), SAMPLES[0].tokens)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert token_losses(model.train(), SAMPLES[0].tokens) == expected


def rotated(states: torch.Tensor) -> torch.Tensor:
    """RoPE as complex rotation. `states`: (heads, n, d); elements i and i + d/2 are a pair (Hugging Face)."""
    half = states.shape[-1] // 2
    angles = torch.outer(torch.arange(states.shape[1]), THETA ** (-torch.arange(half) / half))
    turned = torch.complex(states[..., :half], states[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mass_is_a_dense_softmax_of_the_layers_own_projections(family):
    model, sample = tiny(family, layers=1), SAMPLES[0]
    layer, n = model.model.layers[0], len(sample.tokens)
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(torch.tensor(sample.tokens)))
        query = rotated(layer.self_attn.q_proj(hidden).view(n, HEADS, HEAD_DIM).transpose(0, 1))
        key = rotated(layer.self_attn.k_proj(hidden).view(n, KV_HEADS, HEAD_DIM).transpose(0, 1))

    expected = []
    for i in range(n):
        of_heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            weights = [math.exp(query[head, i] @ key[group, j] / math.sqrt(HEAD_DIM)) for j in range(i + 1)]
            of_heads.append(sum(weights[j] for j in range(i) if sample.roles[j] == 0) / sum(weights))
        expected.append(sum(of_heads) / HEADS)

    assert attention_mass(model, sample.tokens, sample.roles) == pytest.approx(expected, abs=1e-6)
    assert expected[0] == 0 and min(expected[1:]) > 0.01


def test_attention_mass_counts_earlier_context_only():
    model, tokens = tiny(), SAMPLES[0].tokens
    all_context, all_response = [0] * len(tokens), [1] * len(tokens)
    assert attention_mass(model, tokens, all_response) == [0.0] * len(tokens)
    mass = attention_mass(model, tokens, all_context)
    assert mass[0] == 0 and max(mass) < 1
    assert attention_mass(model, [*tokens[:-1], 33], all_context)[:-1] == pytest.approx(mass[:-1], abs=1e-6)


def test_layers_count_from_either_end_and_several_are_averaged():
    model, (tokens, roles) = tiny(layers=3), (SAMPLES[0].tokens, SAMPLES[0].roles)
    first, last = attention_mass(model, tokens, roles, 0), attention_mass(model, tokens, roles, -1)
    assert attention_mass(model, tokens, roles) == last == attention_mass(model, tokens, roles, 2)
    assert max(abs(a - b) for a, b in zip(first, last, strict=True)) > 1e-3
    mean = [(a + b) / 2 for a, b in zip(first, last, strict=True)]
    assert attention_mass(model, tokens, roles, [0, -1]) == pytest.approx(mean)


@pytest.mark.parametrize("layer", [2, -3, [0, 2], []])
def test_a_layer_the_model_lacks_is_refused(layer):
    with pytest.raises(ValueError, match="the model has 2 layers"):
        attention_mass(tiny(), [1, 2], [0, 1], layer)


# Scores and selection

HAND = Sample([10, 11, 12, 13, 14], [0, 1, 1, 0, 1])
HAND_LOSSES = [None, 2.0, 1.0, 3.0, 0.5]
HAND_HISTORY = [None, 3.0, 1.5, 9.0, 2.5]  # rel over R: 1, 0.5, 2; the context token's 6 must not matter
HAND_ATTENTION = [0.0, 0.9, 0.2, 0.5, 0.4]


def hand_records(gamma: float = 0.5, rho: str = "0.6", rel_floor: float = 1e-3) -> list[dict]:
    return score_records(HAND, HAND_LOSSES, HAND_HISTORY, HAND_ATTENTION, gamma, rho, rel_floor)


def column(records: list[dict], name: str) -> list:
    return [record[name] for record in records]


def test_scores_by_hand():
    records = hand_records()
    assert column(records, "position") == [0, 1, 2, 3, 4]
    assert column(records, "token") == HAND.tokens and column(records, "role") == HAND.roles
    assert column(records, "rel") == [None, 1.0, 0.5, 6.0, 2.0]
    assert column(records, "rel_norm") == [None, pytest.approx(1 / 3), 0.0, None, pytest.approx(1.0)]
    assert column(records, "score") == [None, pytest.approx(0.6166667), 0.1, None, pytest.approx(0.7)]
    assert column(records, "selected") == [None, True, False, None, True]
    assert records[4]["rel_norm"] == 1.5 / (1.5 + 1e-8)


@pytest.mark.parametrize(
    ("gamma", "scores", "best"),
    [(0.0, [0.9, 0.2, 0.4], 1), (0.25, [0.7583333, 0.15, 0.55], 1), (1.0, [1 / 3, 0, 1], 4)],
)
def test_gamma_weighs_rel_norm_against_attention(gamma, scores, best):
    records = hand_records(gamma, rho="0.3")
    assert [records[i]["score"] for i in (1, 2, 4)] == pytest.approx(scores)
    assert [i for i in range(5) if records[i]["selected"]] == [best]


@pytest.mark.parametrize(("rel_floor", "is_flat"), [(1.6, True), (1.5, False), (0.0, False)])
def test_rel_floor_flattens_a_spread_strictly_below_it(rel_floor, is_flat):
    rel_norm = [hand_records(rel_floor=rel_floor)[i]["rel_norm"] for i in (1, 2, 4)]
    assert rel_norm == ([0, 0, 0] if is_flat else pytest.approx([1 / 3, 0, 1]))


def test_equal_scores_go_to_the_lower_positions():
    sample = Sample([1] * 6, [0, 1, 1, 1, 1, 1])
    losses, history, attention = [None] + [1.0] * 5, [None] + [2.0] * 5, [0, 0.3, 0.3, 0.8, 0.3, 0.3]
    records = score_records(sample, losses, history, attention, rho="0.6")
    assert column(records, "selected") == [None, True, True, True, False, False]


def test_a_response_token_at_position_0_has_attention_but_no_score():
    records = score_sample(tiny(), tiny(seed=1), SAMPLES[2])
    assert records[0]["role"] == 1 and records[0]["attention"] == 0
    assert all(records[0][name] is None for name in ("loss", "history_loss", "rel", "rel_norm", "score", "selected"))


def test_score_sample_puts_the_models_signals_together():
    current, history, sample = tiny(), tiny(seed=1), SAMPLES[0]
    records = score_sample(current, history, sample, gamma=0.3, rho="0.5", layer=0)
    losses, history_losses = token_losses(current, sample.tokens), token_losses(history, sample.tokens)
    attention = attention_mass(current, sample.tokens, sample.roles, 0)
    assert records == score_records(sample, losses, history_losses, attention, gamma=0.3, rho="0.5")
    assert records[2]["rel"] == history_losses[2] - losses[2]
    assert sum(record["selected"] is True for record in records) == 2


def test_the_same_model_as_history_leaves_attention_to_decide():
    records = score_sample(tiny(), tiny(), SAMPLES[0])
    assert all(r["score"] == 0.5 * r["attention"] for r in records if r["score"] is not None)


@pytest.mark.parametrize(
    ("rho", "num_tokens", "size"),
    [
        ("0.1", 30, 3),
        (0.1, 30, 3),
        ("0.6", 5, 3),
        ("0.6", 1, 1),
        ("0.6", 6, 4),
        ("0.07", 100, 7),
        ("0.55", 100, 55),
        ("1", 9, 9),
    ],
)
def test_selection_size_is_exact(rho, num_tokens, size):
    assert selection_size(rho, num_tokens) == size
    assert size - 1 < Fraction(str(rho)) * num_tokens <= size


@pytest.mark.parametrize(("rho", "num_tokens", "size"), [("0.07", 100, 7), ("0.55", 100, 55), ("0.55", 180, 99)])
def test_selection_size_is_exact_where_double_precision_is_not(rho, num_tokens, size):
    assert math.ceil(float(rho) * num_tokens) == size + 1
    assert selection_size(rho, num_tokens) == selection_size(float(rho), num_tokens) == size


def test_selection_size_reads_the_decimal_not_the_binary_fraction():
    assert math.ceil(Fraction(0.1) * 30) == 4  # 0.1 in binary is a little above 0.1
    assert selection_size(0.1, 30) == 3


@pytest.mark.parametrize("rho", ["0", "-0.1", "1.01"])
def test_rho_outside_its_range_is_refused(rho):
    with pytest.raises(ValueError, match="rho is"):
        selection_size(rho, 10)


def scored(*scores: float | None) -> list[dict]:
    return [{"position": i, "score": score, "selected": None} for i, score in enumerate(scores)]


def test_the_global_selection_ranks_all_samples_together():
    low, high = scored(None, 0.1, 0.2, 0.3), scored(None, 0.9, 0.8, None, 0.25)
    chosen = select_global([low, high], "0.5")  # k = 3 of 6
    assert column(chosen[0], "selected") == [None, False, False, True]
    assert column(chosen[1], "selected") == [None, True, True, None, False]
    assert column(low, "selected") == [None] * 4  # the argument is left as it was


def test_global_ties_go_to_the_lower_sample_then_the_lower_position():
    chosen = select_global([scored(None, 0.1, 0.5), scored(None, 0.5, 0.5), scored(None, 0.5, 0.9)], "0.5")
    assert [column(records, "selected")[1:] for records in chosen] == [
        [False, True],
        [True, False],
        [False, True],
    ]


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="sample 1, position 1: score is nan"):
        select_global([scored(None, 1.0), scored(None, float("nan"))], "0.5")


# Training

MICRO_BATCHES = [[SAMPLES[0]], [SAMPLES[1], SAMPLES[2]]]


def response_losses(model: PreTrainedModel, sample: Sample) -> list[float]:
    losses = token_losses(model, sample.tokens)
    return [losses[i] for i in range(1, len(losses)) if sample.roles[i] == 1]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_the_full_loss_and_gradient_are_pytorchs_over_all_response_tokens():
    model = tiny("qwen2")
    grads, loss = gradients(model, SAMPLES), loss_and_gradients(model, SAMPLES)[0]
    logits = torch.cat([logits_of(model, sample.tokens)[:-1] for sample in SAMPLES])
    labels = [t if r == 1 else -100 for s in SAMPLES for t, r in zip(s.tokens[1:], s.roles[1:], strict=True)]
    expected = functional.cross_entropy(logits, torch.tensor(labels))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert grads.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_the_three_averages_by_hand():
    model = tiny()
    by_sample = [response_losses(model, sample) for sample in SAMPLES]
    by_micro_batch = [by_sample[0], by_sample[1] + by_sample[2]]
    expected = {
        "token": mean([loss for losses in by_sample for loss in losses]),
        "sample": mean([mean(losses) for losses in by_sample]),
        "microbatch": mean([mean(losses) for losses in by_micro_batch]),
    }
    for average, value in expected.items():
        loss, _ = loss_and_gradients(model, MICRO_BATCHES, Objective(loss_average=average))
        assert loss == pytest.approx(value, rel=1e-5), average
    assert min(abs(expected["token"] - expected[other]) for other in ("sample", "microbatch")) > 1e-3


def test_token_and_sample_averages_do_not_depend_on_micro_batches():
    for average in ("token", "sample"):
        objective = Objective(loss_average=average)
        split, whole = loss_weights_of(MICRO_BATCHES, objective), loss_weights_of([SAMPLES], objective)
        assert [sample for samples in split for sample in samples] == whole[0]


def loss_weights_of(micro_batches: list[list[Sample]], objective: Objective) -> list[list[list[float]]]:
    trained = [[[role == 1 and i > 0 for i, role in enumerate(s.roles)] for s in mb] for mb in micro_batches]
    return loss_weights(trained, objective.loss_average)


def test_loss_weights_by_hand_with_a_sample_that_has_nothing_selected():
    trained = [[[False, True, True], [False, False]], [[False, True]]]
    assert loss_weights(trained, "token") == [[[0, 1 / 3, 1 / 3], [0, 0]], [[0, 1 / 3]]]
    assert loss_weights(trained, "sample") == [[[0, 1 / 6, 1 / 6], [0, 0]], [[0, 1 / 3]]]
    assert loss_weights(trained, "microbatch") == [[[0, 1 / 4, 1 / 4], [0, 0]], [[0, 1 / 2]]]


def test_prediction_weights_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    few = p.log(), [1, 0]
    assert prediction_weights(*few, "power", 0.5) == pytest.approx([0.5, 1.0])
    assert prediction_weights(*few, "deft", 1.0) == pytest.approx([0.25**0.375, 1.0])
    assert prediction_weights(*few, "entropy", 2.0) == pytest.approx([(1.5 * math.log(2) / 3) ** 2, 0.0])
    # 20 words share half of the probability, and 80 the other half.
    many = torch.tensor([[0.5 / 20] * 20 + [0.5 / 80] * 80], dtype=torch.float64).log()
    assert prediction_weights(many, [99], "entropy", 1.0) == pytest.approx([math.log(20) / 3])


def test_soft_weights_are_constants_of_the_gradient():
    """With p for a weight the gradient of a single token's loss is p · ∇(−log p) = −∇p."""
    model = tiny()
    sample = Sample(SAMPLES[0].tokens[:3], [0, 0, 1])
    found = loss_and_gradients(model, [sample], Objective(weight="power"))[1]
    p = torch.softmax(model(torch.tensor([sample.tokens])).logits[0, 1], -1)[sample.tokens[2]]
    wanted = torch.autograd.grad(-p, [parameter for parameter in model.parameters() if parameter.requires_grad])
    for gradient, other in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scope", ["sample", "microbatch", "batch"])
def test_sstoken_trains_on_the_selected_tokens_of_its_scope(scope):
    model, history = tiny(), tiny(seed=1)
    records = [score_sample(model, history, sample, gamma=0.4, rho="0.3") for sample in SAMPLES]
    groups = {"sample": [[r] for r in records], "microbatch": [records[:1], records[1:]], "batch": [records]}[scope]
    chosen = [record for group in groups for sample in select_global(group, "0.3") for record in sample]
    losses = [record["loss"] for record in chosen if record["selected"]]
    # |R| = 4, 3, 4: k = ceil(1.2) + ceil(0.9) + ceil(1.2), ceil(1.2) + ceil(2.1), ceil(3.3)
    assert len(losses) == {"sample": 5, "microbatch": 5, "batch": 4}[scope]

    objective = Objective("sstoken", history, gamma=0.4, rho="0.3", scope=scope)
    loss, grads = loss_and_gradients(model, MICRO_BATCHES, objective)
    assert loss == pytest.approx(mean(losses), rel=1e-5)
    full = gradients(model, MICRO_BATCHES)
    assert max((grads[name] - full[name]).abs().max().item() for name in grads) > 1e-3


def test_selecting_everything_is_full_training():
    model = tiny()
    selected = gradients(model, SAMPLES, Objective("sstoken", tiny(seed=1), rho="1.0", scope="batch"))
    full = gradients(model, SAMPLES)
    assert all(torch.equal(selected[name], full[name]) for name in full)


@pytest.mark.parametrize("clip_grad", [0.0, 0.05, 1e6])
def test_the_first_step_is_adamw_by_hand(clip_grad):
    lr, eps, decay = 1e-2, 1e-3, 0.5  # a large eps, or clipping would cancel in the first step
    model = tiny("qwen2")
    before = copy.deepcopy(model)
    grads = gradients(before, SAMPLES)
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm().item()
    factor = 0.05 / (norm + 1e-6) if clip_grad == 0.05 else 1.0
    assert norm > 0.05

    log = train_full(model, [SAMPLES], lr, (0.9, 0.95), eps, decay, clip_grad)
    assert [entry["grad_norm"] for entry in log] == [pytest.approx(norm, rel=1e-5)]
    assert log[0]["loss"] == loss_and_gradients(before, SAMPLES)[0]
    undecayed = 0
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        is_vector = name.endswith("bias") or "norm" in name
        undecayed += is_vector
        grad = grads[name] * factor
        expected = old * (1 - lr * (0 if is_vector else decay)) - lr * grad / (grad.abs() + eps)
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6, msg=name)
    assert undecayed == 2 * (2 + 3) + 1  # a layer: two norms, three biases; the final norm


def test_training_lowers_the_loss_and_scores_with_the_weights_of_each_step():
    model, history = tiny(), tiny()
    objective = Objective("sstoken", history, rho="0.5", gamma=1.0)
    log = train_full(model, [SAMPLES] * 6, lr=1e-2, weight_decay=0.1, clip_grad=1.0, objective=objective)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    after = score_sample(model, history, SAMPLES[1])
    assert any(record["rel"] > 0.1 for record in after[1:])


def test_a_schedule_is_a_list_or_a_function_of_the_step():
    rates = [1e-3, 0.0, 5e-3]
    runs = {"list": rates, "function": lambda step: rates[step]}
    models = {name: tiny() for name in runs}
    logs = {name: train_full(models[name], [SAMPLES] * 3, lr=1.0, lr_schedule=runs[name]) for name in runs}
    assert logs["list"] == logs["function"]
    losses = [entry["loss"] for entry in logs["list"]]
    assert losses[0] != losses[1] == losses[2]


def test_a_history_with_a_decay_follows_the_model_after_each_step():
    model, history = tiny(), tiny(seed=1)
    before = copy.deepcopy(list(history.parameters()))
    train_full(model, [SAMPLES], lr=1e-2, objective=Objective("sstoken", history), history_decay=0.75)
    for old, new, now in zip(before, model.parameters(), history.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * old + 0.25 * new)


def test_gradients_leave_the_model_as_it_was():
    model = tiny().train()
    before = copy.deepcopy(model.state_dict())
    gradients(model, SAMPLES)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_weights_stay_out_of_gradient_and_norm():
    model = tiny()
    model.model.embed_tokens.requires_grad_(False)
    embedding = model.model.embed_tokens.weight.clone()
    assert "model.embed_tokens.weight" not in gradients(model, SAMPLES)
    train_full(model, [SAMPLES], lr=1e-2, weight_decay=0.1)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


# User mistakes


def test_a_sample_without_response_tokens_to_learn_is_refused():
    model = tiny()
    unlearnable = Sample([1, 2, 3], [1, 0, 0])
    with pytest.raises(ValueError, match="no response token"):
        score_sample(model, model, unlearnable)
    with pytest.raises(ValueError, match="no response token"):
        train_full(model, [[SAMPLES[0], unlearnable]], lr=1e-3)


def test_misfits_are_refused():
    with pytest.raises(ValueError, match="2 tokens but 1 roles"):
        Sample([1, 2], [0])
    with pytest.raises(ValueError, match="position 1: role is 2"):
        Sample([1, 2], [0, 2])
    with pytest.raises(ValueError, match="history is None"):
        Objective("sstoken")
    with pytest.raises(ValueError, match="loss_average is 'mean'"):
        Objective(loss_average="mean")
    with pytest.raises(ValueError, match="list of micro-batches"):
        gradients(tiny(), SAMPLES, Objective(loss_average="microbatch"))
    with pytest.raises(ValueError, match="mixes samples and lists"):
        gradients(tiny(), [SAMPLES[0], [SAMPLES[1]]])
    with pytest.raises(ValueError, match="tokens is empty"):
        token_losses(tiny(), [])
    with pytest.raises(ValueError, match="batch is empty"):
        gradients(tiny(), [])


def test_models_that_cannot_be_a_reference_are_refused():
    with pytest.raises(ValueError, match="attn_implementation is 'sdpa'"):
        token_losses(tiny(attention="sdpa"), [1, 2])
    with pytest.raises(ValueError, match="bfloat16"):
        token_losses(tiny().to(torch.bfloat16), [1, 2])
