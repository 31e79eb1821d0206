"""Which rows the last layer's MLP computes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.model.head import IGNORE_INDEX
from megatron_sstoken.model.last_layer import head_rows


@given(
    st.integers(1, 4).flatmap(lambda ranks: st.tuples(st.just(ranks), st.lists(st.booleans(), min_size=1, max_size=6)))
)
def test_every_labelled_row_is_somewhere_and_all_ranks_have_as_many(drawn):
    ranks, pattern = drawn
    labels = torch.tensor([7 if scored else IGNORE_INDEX for scored in pattern * ranks])
    labels[: len(pattern)] = IGNORE_INDEX  # the first rank has none
    parts = [head_rows(labels, ranks, rank) for rank in range(ranks)]
    found = [
        rank * len(pattern) + row for rank, part in enumerate(parts) for row in part.padded[: part.number].tolist()
    ]
    assert found == (labels != IGNORE_INDEX).nonzero().flatten().tolist()
    assert len({len(part.padded) for part in parts}) == 1 and len(parts[0].padded) == max(
        max(p.number for p in parts), 1
    )
    assert all((part.padded[part.number :] == 0).all() for part in parts)
