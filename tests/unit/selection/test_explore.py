"""Exploration against brute force: how many stay, which, and that every other token is equally likely to be drawn."""

from collections import Counter
from decimal import ROUND_CEILING, Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.selection.explore import explore
from megatron_sstoken.selection.methods import random_scores, select_tokens
from tests.helpers.brute_force import Key, Token, by_key, keys_of, signals_of
from tests.helpers.strategies import micro_batches

OPTIONS = {"seed": 1, "step": 3, "group": None}
SHARES = ("0.1", "0.3", "0.333333333", "0.5", "0.999999999")


def selected(signals, method: str, scope: str, rho: str = "0.6"):
    return select_tokens(signals, method, rho, scope, gamma=0.5, rel_floor=1e-3, **OPTIONS)


def explored_by_hand(score: dict[Key, float], chosen: set[Key], draw: dict[Key, float], share: str) -> set[Key]:
    """The ceil((1 − share)·k) best of the chosen, and as many of the other tokens as are missing, by the highest draw."""
    number = int(((1 - Decimal(share)) * len(chosen)).to_integral_value(ROUND_CEILING))
    kept = set(sorted(chosen, key=lambda key: (-score[key], key))[:number])
    others = sorted(score.keys() - kept, key=lambda key: (-draw[key], key))
    return kept | set(others[: len(chosen) - number])


@settings(deadline=None, max_examples=150)
@given(
    micro_batches(),
    st.sampled_from(["sstoken", "rel", "random"]),
    st.sampled_from(["sample", "microbatch", "batch"]),
    st.sampled_from(SHARES),
)
def test_exploration_is_the_brute_force_one(tokens, method, scope, share):
    signals = signals_of(tokens)
    before = selected(signals, method, scope)
    after = explore(signals, before, share, scope, **OPTIONS)
    score, chosen = by_key(tokens, before.score), keys_of(tokens, before.mask)
    draw = by_key(tokens, random_scores(signals.sample, signals.position, 1 ^ 0x6578706C6F7265, 3))
    groups = [{key[0]} for key in score] if scope == "sample" else [{key[0] for key in score}]
    wanted = set()
    for samples in groups:
        inside = {key: value for key, value in score.items() if key[0] in samples}
        wanted |= explored_by_hand(inside, chosen & inside.keys(), draw, share)
    assert keys_of(tokens, after.mask) == wanted
    assert len(wanted) == len(chosen), "as many as before"
    for name in ("score", "rel_norm", "threshold"):
        assert getattr(after, name) is getattr(before, name)


def one_sample(num: int):
    return signals_of([Token(7, position, position > 0, 0.0, 0.0, position / num) for position in range(num + 1)])


@pytest.mark.parametrize(("share", "num_kept"), [("0.1", 54), ("0.07", 56), ("0.5", 30), ("0.01", 60), ("0.99", 1)])
def test_the_best_stay_in_exact_number(share, num_kept):
    """Of 100 tokens 60 are selected: those with most attention, which are the last. 0.07 of 60 is 4.2: 4 give way."""
    signals = one_sample(100)
    before = selected(signals, "attention", "sample")
    after = explore(signals, before, share, "sample", **OPTIONS)
    assert int(after.mask.sum()) == 60
    assert after.mask[101 - num_kept : 101].all()
    assert after.num_selected == before.num_selected


def test_every_other_token_is_drawn_equally_often_and_anew_each_step():
    signals, options = one_sample(20), {"seed": 1, "group": None}
    before = selected(signals, "attention", "sample", "0.5")  # 10 of 20
    drawn = Counter()
    for step in range(2000):
        after = explore(signals, before, "0.2", "sample", step=step, **options)
        drawn.update(
            (after.mask & ~torch.nn.functional.pad(torch.ones(8), (13, 2)).bool()).nonzero().flatten().tolist()
        )
    assert sum(drawn.values()) == 2 * 2000 and set(drawn) == set(range(1, 13)), "two of the twelve that are not kept"
    assert all(abs(number - 4000 / 12) < 5 * (4000 / 12) ** 0.5 for number in drawn.values()), drawn


def test_no_token_selected_and_all_selected():
    signals = one_sample(10)
    for scope in ("sample", "microbatch"):
        everything = selected(signals, "attention", scope, "1")
        assert torch.equal(explore(signals, everything, "0.3", scope, **OPTIONS).mask, everything.mask)
        nothing = selected(signals_of([Token(7, 0, False, 0.0, 0.0, 0.0)]), "attention", scope)
        assert not explore(signals_of([Token(7, 0, False, 0.0, 0.0, 0.0)]), nothing, "0.3", scope, **OPTIONS).mask.any()
