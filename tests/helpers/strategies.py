"""Random micro-batches and scores for property tests."""

from hypothesis import strategies as st

from tests.helpers.brute_force import Token

RHOS = ("0.07", "0.1", "0.25", "0.6", "0.999999999", "1")

losses = st.one_of(st.sampled_from([0.0, 0.5, 0.5005, 1.0, 2.0]), st.floats(0, 20, width=32))
attentions = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))

DENORMAL = 2.0**-149
scores = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, float("inf"), float("-inf"), DENORMAL, -DENORMAL, 2 * DENORMAL]),
    st.floats(width=32, allow_nan=False),
)
"""fp32 values with many equals and every special one but NaN."""


@st.composite
def micro_batches(draw, max_samples: int = 4) -> list[Token]:
    """Samples of 1 to 12 tokens with increasing row numbers; the first token of a sample is never in R."""
    tokens, sample = [], draw(st.integers(0, 5))
    for _ in range(draw(st.integers(1, max_samples))):
        for position in range(draw(st.integers(1, 12))):
            tokens.append(
                Token(
                    sample,
                    position,
                    position > 0 and draw(st.integers(0, 3)) > 0,
                    draw(losses),
                    draw(losses),
                    draw(attentions),
                )
            )
        sample += draw(st.integers(1, 1 << 20))
    return tokens
