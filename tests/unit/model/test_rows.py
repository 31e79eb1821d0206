"""Which rows the head and the last layer's MLP compute."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.model.rows import head_rows


@given(
    st.integers(1, 4).flatmap(lambda ranks: st.tuples(st.just(ranks), st.lists(st.booleans(), min_size=1, max_size=6)))
)
def test_every_labelled_row_is_somewhere_and_all_ranks_have_as_many(drawn):
    ranks, pattern = drawn
    scored = np.array(pattern * ranks)
    scored[: len(pattern)] = False  # the first rank has none
    parts = [head_rows(scored, ranks, rank) for rank in range(ranks)]
    found = [
        rank * len(pattern) + row for rank, part in enumerate(parts) for row in part.padded[: part.number].tolist()
    ]
    assert found == np.flatnonzero(scored).tolist()
    assert all(part.scored.tolist() == found for part in parts)
    assert len({len(part.padded) for part in parts}) == 1 and len(parts[0].padded) == max(
        max(p.number for p in parts), 1
    )
    assert all((part.padded[part.number :] == 0).all() for part in parts)
