"""The same selection over real gloo process groups: equal to one process with all tokens, on every rank."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_sstoken.selection.adaptive import choose_rho
from megatron_sstoken.selection.explore import explore
from megatron_sstoken.selection.methods import score_tokens, select_tokens
from megatron_sstoken.selection.signals import TokenSignals, concatenate_signals
from megatron_sstoken.selection.topk import Traffic, distributed_topk, token_id
from tests.helpers.brute_force import Token, signals_of
from tests.helpers.distributed_runner import run_distributed

RHO = "0.3"
SCORING = {"gamma": 0.5, "rel_floor": 1e-3, "seed": 7, "step": 2}


def share_of(rank: int) -> TokenSignals:
    """Samples of one rank: many tied values, unequal lengths; rank 1 has no response at all."""
    generator = torch.Generator().manual_seed(rank)
    tokens = []
    for sample in range(rank, 12, 3):
        for position in range(4 + 5 * (sample % 4)):
            loss, history, attention = (torch.randint(0, 4, (3,), generator=generator) / 4).tolist()
            tokens.append(Token(sample, position, position > 0 and rank != 1, loss, history, attention))
    return signals_of(tokens)


def poisoned(signals: TokenSignals) -> TokenSignals:
    """With NaN at position 3 of the first sample."""
    attention, response = signals["attention"].clone(), signals.response.clone()
    attention[3], response[3] = math.nan, True
    return replace(signals.changed(attention=attention), response=response)


def explored(signals: TokenSignals, scope: str, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The mask of a selection that explores."""
    selection = select_tokens(signals, "sstoken", RHO, scope, group=group, **SCORING)
    return explore(signals, selection, "0.4", scope, SCORING["seed"], SCORING["step"], group).mask


def error_of(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def in_group(group: dist.ProcessGroup) -> dict:
    """Everything that communicates, once, on this rank's tokens."""
    rank, size = group.rank(), group.size()
    signals = share_of(rank)
    response = signals.response
    score, _ = score_tokens(signals, "sstoken", **SCORING)
    ids = token_id(signals.sample[response], signals.position[response])
    traffic = Traffic()
    top = distributed_topk(score[response], ids, group, k=5, traffic=traffic)
    broken = poisoned(signals) if rank == size - 1 else signals
    nan = torch.full((rank,), math.nan)
    return {
        "masks": {
            (method, scope): select_tokens(signals, method, RHO, scope, group=group, **SCORING).mask
            for method in ("sstoken", "random", "rho1")
            for scope in ("sample", "microbatch", "batch")
        },
        "explored": {scope: explored(signals, scope, group) for scope in ("sample", "microbatch", "batch")},
        "top": (ids[top.mask].tolist(), top.threshold, top.num_candidates, top.num_selected),
        "traffic": (traffic.collectives, traffic.num_bytes),
        "rho": choose_rho(score[response], ids, "0.01", "0.99", group),
        "error": error_of(lambda: select_tokens(broken, "attention", RHO, "microbatch", group=group, **SCORING)),
        "rho_error": error_of(lambda: choose_rho(nan, torch.arange(rank) + rank, "0.1", "0.9", group)),
    }


def on_a_rank(rank: int) -> list[dict]:
    """With all three ranks, then with the first two."""
    pair = dist.new_group([0, 1])
    return [in_group(dist.group.WORLD)] + ([in_group(pair)] if rank < 2 else [])


@pytest.fixture(scope="module")
def results() -> list[list[dict]]:
    return run_distributed(on_a_rank, 3, timeout=100)


@pytest.mark.parametrize("num_ranks", [3, 2])
def test_ranks_together_select_what_one_process_selects(results, num_ranks):
    found = [result[3 - num_ranks] for result in results[:num_ranks]]
    parts = [share_of(rank) for rank in range(num_ranks)]
    whole = concatenate_signals(parts)
    for key in found[0]["masks"]:
        expected = select_tokens(whole, key[0], RHO, key[1], group=None, **SCORING).mask
        assert 0 < expected.sum() < whole.response.sum()
        assert torch.equal(torch.cat([result["masks"][key] for result in found]), expected), key

    for scope in found[0]["explored"]:
        expected = explored(whole, scope, None)
        assert not torch.equal(expected, select_tokens(whole, "sstoken", RHO, scope, group=None, **SCORING).mask)
        assert torch.equal(torch.cat([result["explored"][scope] for result in found]), expected), scope

    score, _ = score_tokens(whole, "sstoken", **SCORING)
    values, ids = (
        score[whole.response],
        token_id(whole.sample[whole.response], whole.position[whole.response]),
    )
    alone = distributed_topk(values, ids, None, k=5)
    assert sorted(token for result in found for token in result["top"][0]) == sorted(ids[alone.mask].tolist())
    last = num_ranks - 1
    for rank, result in enumerate(found):
        assert result["top"][1:] == (alone.threshold, len(values), 5)
        assert result["traffic"] == found[0]["traffic"]
        assert result["rho"] == choose_rho(values, ids, "0.01", "0.99", None)
        assert f"sample {last} (row number in the input), position 3, is NaN" in result["error"], rank
        assert "sample 0 (row number in the input), position 1, is NaN" in result["rho_error"], rank
