"""Operations of a model against published figures."""

import pytest

from megatron_sstoken.model.flops import causal_pairs, model_flops
from megatron_sstoken.model.presets import find_architecture

EIGHT = find_architecture("Llama-3.1-8B")
SEVENTY = find_architecture("Llama-3.1-70B")


def test_flops_are_those_of_the_published_figures():
    """TFLOP/s ÷ tokens/s of Megatron-Bridge's tables: FLOP a token, whatever the speed was."""
    for architecture, length, tokens, tflops in ((EIGHT, 8192, 14451, 744), (SEVENTY, 4096, 1638, 710)):
        assert model_flops(architecture, length, causal_pairs(length)) / length == pytest.approx(
            tflops * 1e12 / tokens, rel=2e-3
        )
