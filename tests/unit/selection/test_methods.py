"""The methods and `select_tokens`, against brute force in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_sstoken.selection.methods import (
    METHODS,
    OPTIONAL_SIGNALS,
    SCOPES,
    Method,
    Selection,
    find_method,
    random_scores,
    select_tokens,
)
from megatron_sstoken.selection.signals import TokenSignals, concatenate_signals
from tests.helpers import brute_force
from tests.helpers.brute_force import Token, by_key, keys_of, signals_of
from tests.helpers.strategies import RHOS, micro_batches

NAN = math.nan
WORD = 2**64 - 1
REL_FLOOR = 1e-3


def select(signals: TokenSignals, method: str = "sstoken", **changes) -> Selection:
    options = {"rho": "0.6", "scope": "sample", "gamma": 0.5, "seed": 1, "step": 0, "group": None} | changes
    return select_tokens(signals, rel_floor=REL_FLOOR, **({"method": method} | options))


def example() -> TokenSignals:
    """Two samples of 6 and 3 response tokens, with every signal that a method may need."""
    tokens = [
        Token(sample, position, position > 0, loss=0.1 * position, history_loss=0.3 * position, attention=0.1)
        for sample, length in ((5, 7), (8, 4))
        for position in range(length)
    ]
    signals = signals_of(tokens)
    others = OPTIONAL_SIGNALS - signals.values.keys()
    return signals.changed(**{name: torch.linspace(0, 1, len(signals.response)) for name in others})


@pytest.mark.parametrize("scope", ["sample", "microbatch", "batch"])
@pytest.mark.parametrize("method", ["sstoken", "full"])
@pytest.mark.parametrize("known", [True, False])
def test_exempt_samples_are_selected_whole_and_touch_nothing(scope, method, known):
    """The first of two samples is exempt, with no history: all of it is selected, and the second is as if alone."""
    signals = example()
    first = signals.segment == 0
    history = torch.where(first, NAN, signals["history_loss"])
    counts = {"response_counts": [6, 3], "exempt_counts": [6, 0]} if known else {}
    exempt = replace(signals.changed(history_loss=history), exempt=first & signals.response, **counts)
    found = select(exempt, method, scope=scope)
    alone = select(replace(signals, response=signals.response & ~first), method, scope=scope)
    assert torch.equal(found.mask, alone.mask | (first & signals.response))
    assert found.num_selected in (int(found.mask.sum()), None)
    assert (found.num_selected is not None) == (known and (scope == "sample" or method == "full"))
    assert torch.equal(found.score.nan_to_num(-1), alone.score.nan_to_num(-1)) and found.score[first].isnan().all()
    assert found.rel_norm[first].isnan().all()


def test_joined_signals_keep_their_exempt_tokens_apart():
    plain = replace(example(), response_counts=[6, 3])
    exempt = replace(plain, exempt=(plain.segment == 1) & plain.response, exempt_counts=[0, 3])
    assert concatenate_signals([plain, plain]).exempt is None
    whole = concatenate_signals([plain, exempt])
    assert whole.exempt.tolist() == [False] * len(plain.response) + exempt.exempt.tolist()
    assert whole.exempt_counts == [0, 0, 0, 3] and whole.competing().response_counts == [6, 3, 6, 0]
    assert int(whole.competing().response.sum()) == 15 and whole.competing().exempt is None


def expected_scores(tokens: list[Token], method: str, gamma: float) -> dict[brute_force.Key, float]:
    formula = {
        "rho1": lambda t: t.loss - t.history_loss,
        "probability": lambda t: math.exp(-t.loss),
        "history_probability": lambda t: math.exp(-t.history_loss),
    }.get(method)
    if formula is not None:
        return {t.key: formula(t) for t in tokens if t.response}
    weight = {"rel": 1.0, "attention": 0.0}.get(method, gamma)
    return brute_force.scores(tokens, weight, REL_FLOOR)


@settings(deadline=None, max_examples=150)
@given(
    micro_batches(),
    st.sampled_from(["sstoken", "rel", "attention", "rho1", "probability", "history_probability"]),
    st.sampled_from(RHOS),
    st.sampled_from(["sample", "microbatch", "batch"]),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_selection_is_the_brute_force_one(tokens, method, rho, scope, gamma):
    found = select(signals_of(tokens), method, rho=rho, scope=scope, gamma=gamma)
    score = by_key(tokens, found.score)
    wanted = expected_scores(tokens, method, gamma)
    assert score == pytest.approx(wanted, abs=5e-6)
    choose = brute_force.best_per_sample if scope == "sample" else brute_force.best
    selected = keys_of(tokens, found.mask)
    assert selected == choose(score, rho)
    # In float64 the order of nearly equal scores may differ: the others are in or out as in the reference.
    for key in selected ^ choose(wanted, rho):
        segment = list(dict.fromkeys(t.sample for t in tokens)).index(key[0])
        assert wanted[key] == pytest.approx(found.threshold[segment].item(), abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(
    micro_batches(),
    st.sampled_from(["sstoken", "rho1", "probability"]),
    st.one_of(st.sampled_from([0.0, 0.1, 0.4, 0.5, 1.0, math.inf, -math.inf]), st.floats(-20, 20)),
    st.sampled_from(SCOPES),
)
def test_a_threshold_keeps_what_reaches_it(tokens, method, tau, scope):
    found = select(signals_of(tokens), method, rho=None, scope=scope, rule="threshold", tau=tau, group=object())
    score = by_key(tokens, found.score)
    assert keys_of(tokens, found.mask) == {key for key, value in score.items() if value >= np.float32(tau)}
    assert score == pytest.approx(expected_scores(tokens, method, 0.5), abs=5e-6)
    assert found.threshold.tolist() == pytest.approx([np.float32(tau)] * len(found.threshold))
    # A score itself is a threshold that it reaches, whatever its last bit.
    for value in list(score.values())[:3]:
        again = select(signals_of(tokens), method, scope=scope, rule="threshold", tau=value)
        assert keys_of(tokens, again.mask) == {key for key, other in score.items() if other >= value}


def test_a_threshold_is_not_rounded_away():
    """0.1 in fp32 is above the decimal: a probability of exactly that number is kept, the one below is not."""
    loss = -torch.log(torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)).float()
    tokens = signals_of([Token(0, position, True, 0.0, 0.0, 0.0) for position in range(1, 4)], num_padding=0)
    tenth = np.float32(0.1)
    values = torch.tensor([np.nextafter(tenth, np.float32(0)), tenth, np.nextafter(tenth, np.float32(1))])
    found = select(tokens.changed(attention=values, loss=loss), "attention", rule="threshold", tau=0.1)
    assert found.mask.tolist() == [False, True, True]


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].selects])
def test_nan_is_told_with_a_threshold(method):
    signals = example()
    needed = min(METHODS[method].needs, default="loss")
    values = signals[needed].clone()
    values[[10, 9]] = NAN  # positions 3 and 2 of sample 8
    found = select(signals.changed(**{needed: values}), method, rule="threshold", tau=0.0)
    if method == "random":
        found.require_numbers()
        return
    with pytest.raises(ValueError, match=r"sample 8 \(row number in the input\), position 2, is NaN"):
        found.require_numbers()
    assert not found.mask[[9, 10]].any()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_choice_is_taken_as_it_is(scope):
    signals = example()
    chosen = torch.tensor([1.0, 0.0, NAN] * 5)[: len(signals.response)]
    found = select(signals.changed(chosen=chosen), "external", rho="0.1", scope=scope, rule="chosen", group=object())
    assert torch.equal(found.mask, signals.response & (chosen == 1)) and found.mask.any()
    torch.testing.assert_close(found.score[signals.response], signals["external"][signals.response])
    values = {name: value for name, value in signals.values.items() if name != "external"} | {"chosen": chosen}
    without = select(replace(signals, values=values, num_chosen=4), "external", rule="chosen")
    assert torch.equal(without.mask, found.mask) and without.num_selected == 4
    assert without.score.isnan().all() and found.num_selected is None


def test_uncertain_tokens_and_differences_of_models():
    signals = example()
    where = signals.response
    difference = signals["history_loss"].double() - signals["reference_loss"].double()
    for name, wanted in (("entropy", signals["entropy"].double()), ("cleaning", difference)):
        found = select(signals, name).score.double()
        torch.testing.assert_close(found[where], wanted[where], atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=60)
@given(micro_batches(), st.sampled_from(RHOS), st.sampled_from(["sample", "microbatch"]))
def test_threshold_is_the_lowest_selected_score(tokens, rho, scope):
    found = select(signals_of(tokens), rho=rho, scope=scope)
    selected, score = keys_of(tokens, found.mask), by_key(tokens, found.score)
    for number, sample in enumerate(dict.fromkeys(t.sample for t in tokens)):
        competing = [score[key] for key in selected if scope == "microbatch" or key[0] == sample]
        threshold = found.threshold[number].item()
        assert threshold == min(competing) if competing else math.isnan(threshold)


@settings(deadline=None, max_examples=40)
@given(st.lists(micro_batches(), min_size=1, max_size=3), st.sampled_from(RHOS))
def test_batch_scope_selects_over_joined_micro_batches(parts, rho):
    parts = [[replace(t, sample=t.sample + (n << 30)) for t in part] for n, part in enumerate(parts)]
    found = select(concatenate_signals([signals_of(part) for part in parts]), rho=rho, scope="batch")
    score, selected = {}, set()
    sizes = [len(part) + 2 for part in parts]  # with padding
    for part, mask, values in zip(parts, found.mask.split(sizes), found.score.split(sizes), strict=True):
        score |= by_key(part, values)
        selected |= keys_of(part, mask)
    assert score == pytest.approx(brute_force.scores([t for part in parts for t in part], 0.5, REL_FLOOR), abs=5e-6)
    assert selected == brute_force.best(score, rho)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_does_not_need_it_does_not_look_at(method):
    signals = example()
    nothing = torch.full_like(signals["loss"], NAN)
    plain = select(signals, method)
    without = signals.changed(**dict.fromkeys(OPTIONAL_SIGNALS - METHODS[method].needs, nothing))
    assert torch.equal(select(without, method).mask, plain.mask)


@pytest.mark.parametrize("scope", ["sample", "microbatch"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_in_what_it_needs_names_the_token(method, scope):
    signals = example()
    for name in sorted(OPTIONAL_SIGNALS):
        values = signals[name].clone()
        values[[10, 9]] = NAN  # positions 3 and 2 of sample 8
        poisoned = signals.changed(**{name: values})
        if name in METHODS[method].needs:
            with pytest.raises(ValueError, match=r"sample 8 \(row number in the input\), position 2, is NaN"):
                select(poisoned, method, scope=scope).require_numbers()
        else:
            found = select(poisoned, method, scope=scope)
            found.require_numbers()
            assert torch.equal(found.mask, select(signals, method, scope=scope).mask)


def test_full_takes_every_response_token_and_never_communicates():
    signals = example()
    found = select(signals, "full", scope="microbatch", group=object())  # any use of it as a group would raise
    assert torch.equal(found.mask, signals.response)
    assert found.mask is not signals.response
    assert found.score.isnan().all()
    assert found.threshold.isnan().all()


def test_sample_scope_never_communicates():
    alone = select(example(), "sstoken", scope="sample")
    assert torch.equal(select(example(), "sstoken", scope="sample", group=object()).mask, alone.mask)


def test_gamma_0_is_blind_to_the_history():
    signals = example()
    blind = signals.changed(history_loss=torch.full_like(signals["loss"], NAN))
    assert torch.equal(select(blind, gamma=0.0).mask, select(signals, "attention").mask)


def test_rho1_has_the_opposite_sign_of_rel():
    signals = example()  # rel grows with the position
    best_two = {"rho": "0.3"}
    assert keys(select(signals, "rel", **best_two), signals) == {(5, 6), (5, 5), (8, 3)}
    assert keys(select(signals, "rho1", **best_two), signals) == {(5, 1), (5, 2), (8, 1)}


def keys(found: Selection, signals: TokenSignals) -> set[tuple[int, int]]:
    chosen = found.mask
    return set(zip(signals.sample[chosen].tolist(), signals.position[chosen].tolist(), strict=True))


@pytest.mark.parametrize("method", ["sstoken", "rel", "rho1"])
def test_rel_norm_is_reported_where_there_is_a_history(method):
    signals = example()
    found = select(signals, method)
    assert torch.equal(found.rel_norm.isnan(), ~signals.response)
    torch.testing.assert_close(found.rel_norm[signals.response][:6], torch.linspace(0, 1, 6))


@pytest.mark.parametrize("method", ["full", "random", "attention"])
def test_rel_norm_is_undefined_without_a_history(method):
    assert select(example(), method).rel_norm.isnan().all()


@pytest.mark.parametrize("scope", ["sample", "microbatch"])
@pytest.mark.parametrize("method", METHODS)
def test_without_response_nothing_is_selected(method, scope):
    signals = example()
    found = select(replace(signals, response=torch.zeros_like(signals.response)), method, scope=scope)
    assert not found.mask.any()
    assert found.threshold.isnan().all()
    assert found.threshold.shape == (2,)


def test_equal_scores_go_to_the_lower_position_then_sample():
    signals = example()
    equal = signals.changed(attention=torch.full_like(signals["loss"], 0.5))
    assert keys(select(equal, "attention", rho="0.5"), signals) == {(5, 1), (5, 2), (5, 3), (8, 1), (8, 2)}
    across = select(equal, "attention", rho="0.8", scope="microbatch")
    assert keys(across, signals) == {(5, p) for p in range(1, 7)} | {(8, 1), (8, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "best"}, "method=best is unknown: use one of sstoken, full, random"),
        ({"scope": "epoch"}, "scope=epoch is unknown: use one of sample, microbatch, batch"),
        ({"rule": "best"}, "rule=best is unknown: use one of top, threshold, chosen"),
        ({"gamma": 1.5}, "gamma=1.5 is outside"),
        ({"rho": 0}, "rho=0 is outside"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        select(example(), **changes)


class TestRandom:
    @staticmethod
    def splitmix64(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) & WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return z ^ (z >> 31)

    def test_the_reference_is_splitmix64(self):
        assert self.splitmix64(0) == 0xE220A8397B1DCDAF  # published first output of seed 0

    @given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6), st.integers(-1, 2**39), st.integers(0, 2**24))
    def test_equals_python_integers(self, seed, step, sample, position):
        state = 0
        for part in (seed, step, sample, position):
            state = self.splitmix64(state ^ (part & WORD))
        found = random_scores(torch.tensor([sample]), torch.tensor([position]), seed, step)
        assert found.dtype == torch.float32
        assert found.item() == (state >> 40) / 2**24

    def test_uniform_and_not_correlated(self):
        sample, position = (
            grid.flatten() for grid in torch.meshgrid(torch.arange(100), torch.arange(200), indexing="ij")
        )
        values = random_scores(sample, position, seed=3, step=0).double()
        assert values.min() >= 0
        assert values.max() < 1
        counts = torch.histc(values, bins=20, min=0, max=1)
        assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square of 19 degrees: beyond 50 is one in 7,000
        grid = values.reshape(100, 200)
        others = [random_scores(sample, position, 4, 0), random_scores(sample, position, 3, 1)]
        pairs = [(grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])] + [(values, other.double()) for other in others]
        for a, b in pairs:
            assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.035  # five sigma

    def test_a_new_draw_selects_anew_and_the_same_draw_the_same(self):
        tokens = [Token(0, position, position > 0, NAN, NAN, NAN) for position in range(200)]
        first, again, other = (select(signals_of(tokens), "random", step=step).mask for step in (0, 0, 1))
        assert torch.equal(first, again)
        assert 0 < (first & other).sum() < first.sum()
        assert first.sum() == other.sum() == 120

    @settings(deadline=None, max_examples=40)
    @given(micro_batches(), st.randoms())
    def test_a_score_does_not_depend_on_where_the_token_lies(self, tokens, shuffle):
        samples = sorted({t.sample for t in tokens})
        assume(len(samples) > 1)
        shuffle.shuffle(samples)
        moved = [t for sample in samples for t in tokens if t.sample == sample]
        kept, other = select(signals_of(tokens), "random"), select(signals_of(moved), "random")
        assert by_key(tokens, kept.score) == by_key(moved, other.score)
        assert keys_of(tokens, kept.mask) == keys_of(moved, other.mask)


surprise = Method(lambda x: x["entropy"] * x["loss"], needs=frozenset({"entropy"}))
not_a_method = 3


class TestImportPath:
    """Methods outside the package."""

    NAME = f"{__name__}.surprise"

    def test_selects_by_its_score(self):
        signals = example()
        entropy = torch.linspace(2.0, 1.0, len(signals.response))
        found = select(signals.changed(entropy=entropy), self.NAME)
        assert torch.equal(found.score[signals.response], (entropy * signals["loss"])[signals.response])

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("no.such.module.method", "cannot be imported"),
            (f"{__name__}:absent", "does not exist: name a Method .* after a dot"),
            (f"{__name__}.absent", f"absent does not exist: name a Method that {__name__} defines"),
            (
                "tests.helpers.broken_method.scores",
                r"mend tests.helpers.broken_method: ValueError\('a selection method needs",
            ),
            (".scores", "method=.scores is unknown"),
            (f"{__name__}.not_a_method", "is a int: name a Method"),
            ("best", "is unknown: use one of sstoken"),
        ],
    )
    def test_mistakes(self, name, reason):
        with pytest.raises(ValueError, match=reason):
            find_method(name)

    def test_what_is_known_before_training(self):
        with pytest.raises(ValueError, match="needs attention, which nobody knows before training: leave out"):
            Method(lambda x: x["attention"], needs=frozenset({"attention"}), before_training=True)
        with pytest.raises(ValueError, match="has rule=best, which is unknown: use one of top"):
            Method(lambda x: x["loss"], rule="best")

    def test_needs_are_signals_that_somebody_computes(self):
        with pytest.raises(ValueError, match="needs surprise, which nobody computes"):
            Method(lambda x: x["surprise"], needs=frozenset({"surprise"}))
