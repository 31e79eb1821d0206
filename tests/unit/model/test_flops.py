"""Operations of a model against published figures."""

import pytest

from megatron_sstoken.model.families import parse_architecture
from megatron_sstoken.model.flops import attention_flops, causal_pairs, delta_net_flops, model_flops
from megatron_sstoken.model.presets import find_architecture

EIGHT = find_architecture("Llama-3.1-8B")
SEVENTY = find_architecture("Llama-3.1-70B")


def test_flops_are_those_of_the_published_figures():
    """TFLOP/s ÷ tokens/s of Megatron-Bridge's tables: FLOP a token, whatever the speed was."""
    for architecture, length, tokens, tflops in ((EIGHT, 8192, 14451, 744), (SEVENTY, 4096, 1638, 710)):
        assert model_flops(architecture, length, causal_pairs(length)) / length == pytest.approx(
            tflops * 1e12 / tokens, rel=2e-3
        )


def test_values_narrower_than_keys_cost_less():
    """A head of DeepSeek-V3 multiplies by 192 numbers of each key and by 128 of each value."""
    sizes = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 128}
    a = parse_architecture({"model_type": "deepseek_v3"} | sizes, "config.json")
    assert attention_flops(a, 10) == 2 * 128 * (192 + 128) * 10


def test_delta_nets_stand_where_attention_is_not():
    """One layer of four of Qwen3.5 has attention; of the others' states of 32 heads, 128 × 128, each token uses all thrice."""
    sizes = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 4}
    a = parse_architecture({"model_type": "qwen3_5_text"} | sizes, "config.json")
    assert delta_net_flops(a, 10) == 3 * 2 * 32 * 128 * 128 * 10
    weights = a.num_parameters() - a.vocabulary_size * a.hidden_size
    mixed = attention_flops(a, 55) + 3 * delta_net_flops(a, 10)
    assert model_flops(a, 10, 55) == 6 * weights * 10 + 3 * mixed
