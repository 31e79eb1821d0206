"""`selection.scope: dataset`: the best tokens of all data, chosen once before training from columns of known values."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash

from megatron_sstoken.data.batches import TokenValues
from megatron_sstoken.data.response_chunks import ResponseChunk, response_chunks
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.selection.dataset import Cut, NanScore, find_cut
from megatron_sstoken.selection.methods import score_tokens
from megatron_sstoken.selection.signals import TokenSignals
from megatron_sstoken.selection.topk import token_id

Scored = tuple[ResponseChunk, torch.Tensor, torch.Tensor]
"""A chunk with scores fp32 [n] and ids int64 [n], unique and in the order of the store."""


def chosen_of_data(
    plan: RunPlan, known: Mapping[str, TokenValues]
) -> tuple[Cut, dict[str, Any], Callable[[np.ndarray], None]]:
    """Choose the share ρ of all response tokens that the run uses; of equal scores the first in the data win.

    known: signal → column of `plan.train`. Works in one process, reading the columns a few times in chunks. Returns the cut,
    what tells this choice from others (named by its content, as scores may come from anybody's code), and what writes it into
    a column: 1 where chosen, 0 where not, nothing outside the response. Raises ValueError for a score that is NaN.
    """
    scored = partial(_scored_chunks, plan, known)
    try:
        cut = find_cut(lambda: ((scores, ids) for _, scores, ids in scored()), plan.settings.selection.rho)
    except NanScore as error:
        row = int(plan.train.store.rows[error.sample])
        raise ValueError(
            f"selection.scope=dataset: the score of sample {row} (row number in the input), position {error.position}, is NaN: "
            "it cannot be ranked; look for values that are not finite in what selection.method="
            f"{plan.settings.selection.method} scores by"
        ) from error
    digest = xxhash.xxh3_128()
    for _, scores, ids in scored():
        digest.update(np.packbits(cut.selects(scores, ids).numpy()).tobytes())
    identity = {
        "data": plan.train.store.manifest.data_fingerprint,
        "scored_length": int(plan.train.samples.lengths.max()),
        "num_samples": len(plan.train.samples.indices),
        "num_chosen": cut.num_selected,
        "chosen": digest.hexdigest(),
    }

    def fill(column: np.ndarray) -> None:
        for chunk, scores, ids in scored():
            column[chunk.place] = cut.selects(scores, ids).numpy()

    return cut, identity, fill


def _scored_chunks(plan: RunPlan, known: Mapping[str, TokenValues]) -> Iterator[Scored]:
    """Response tokens of the run's data with their scores; the same each time."""
    selection, store = plan.settings.selection, plan.train.store
    for chunk in response_chunks(store, plan.train.samples):
        number = len(chunk.place)
        position = torch.from_numpy(chunk.position)
        values = {name: torch.from_numpy(chunk.read(column).copy()) for name, column in known.items()}
        signals = TokenSignals(
            segment=torch.zeros(number, dtype=torch.int64),
            num_segments=1,
            response=torch.ones(number, dtype=torch.bool),
            sample=torch.from_numpy(store.rows[chunk.index]),
            position=position,
            values=values | {"loss": torch.full((number,), torch.nan)},
        )
        score, _ = score_tokens(
            signals, selection.method, gamma=selection.gamma, rel_floor=0.0, seed=plan.settings.training.seed, step=0
        )
        # Not by row: a row that the data repeats has several tokens of one position.
        yield chunk, score, token_id(torch.from_numpy(chunk.index), position)
