"""Soft weights: each formula against numpy in double precision, what they need, and weights of a user's own."""

import math

import numpy as np
import pytest
import torch

from megatron_sstoken.selection.signals import PREDICTION_SIGNALS
from megatron_sstoken.selection.weights import WEIGHTS, TokenWeight, find_weight

SOFT = [name for name, one in WEIGHTS.items() if one.weigh is not None]


def predictions(num: int = 50, words: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Distributions [num, words], from flat to sharp, and the words that came, likely and unlikely ones."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(num, words)) * np.linspace(0, 20, num)[:, None]
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True), generator.integers(words, size=num)


def signals_of(p: np.ndarray, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """As a pass tells them, in fp32."""
    likeliest = np.sort(p, axis=1)[:, -20:]
    shares = likeliest / likeliest.sum(1, keepdims=True)
    values = {
        "loss": -np.log(p[np.arange(len(p)), tokens]),
        "sum_p2": np.square(p).sum(1),
        "entropy_top20": -(shares * np.log(np.maximum(shares, 1e-300))).sum(1),
    }
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


@pytest.mark.parametrize("alpha", [0.3, 1.0, 1.7])
def test_formulas(alpha):
    p, tokens = predictions()
    values = signals_of(p, tokens)
    own = p[np.arange(len(p)), tokens]
    likeliest = np.sort(p, axis=1)[:, -20:] / np.sort(p, axis=1)[:, -20:].sum(1, keepdims=True)
    entropy = -np.sum(likeliest * np.log(np.maximum(likeliest, 1e-300)), axis=1)
    wanted = {"power": own**alpha, "deft": own ** np.square(p).sum(1), "entropy": (entropy / 3) ** alpha}
    assert wanted.keys() == set(SOFT)
    for name in SOFT:
        weight = find_weight(name)
        found = weight.at(None if weight.alpha is None else alpha)(values)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, wanted[name], rtol=2e-5, atol=1e-7, err_msg=name)


def test_the_exponents_by_default_are_those_of_the_papers():
    values = signals_of(*predictions())
    for name, paper in (("power", (-values["loss"]).exp()), ("entropy", values["entropy_top20"] / 3)):
        torch.testing.assert_close(find_weight(name).at(None)(values), paper)


def test_ends_of_the_range():
    """A loss of 0 is a probability of 1, an infinite one of 0; no number stays none."""
    values = {"loss": torch.tensor([0.0, torch.inf, torch.nan]), "sum_p2": torch.tensor([1.0, 0.5, torch.nan])}
    values["entropy_top20"] = torch.tensor([0.0, math.log(20), torch.nan])
    for name in ("power", "deft"):
        found = find_weight(name).at(None)(values)
        assert found[:2].tolist() == [1.0, 0.0] and found[2].isnan(), name
    found = find_weight("entropy").at(None)(values)
    assert found[0] == 0 and 0.99 < found[1] < 1 and found[2].isnan()


def test_weights_that_are_not_soft():
    for name, data in (("none", "ignored"), ("external", "required")):
        assert find_weight(name).at(None) is None and find_weight(name).data == data
    assert all(find_weight(name).data == "multiplied" for name in SOFT)


margin = TokenWeight(lambda x, alpha: x["top1"] ** alpha - x["loss"].exp(), needs=frozenset({"top1"}), alpha=2.0)
not_a_weight = 3


class TestImportPath:
    """Weights outside the package."""

    def test_weighs_by_its_formula(self):
        values = {"loss": torch.zeros(2), "top1": torch.tensor([3.0, 2.0])}
        weight = find_weight(f"{__name__}.margin")
        assert weight.needs == {"top1"} and weight.at(None)(values).tolist() == [8.0, 3.0]
        assert weight.at(1.0)(values).tolist() == [2.0, 1.0]

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("best", "method=best is unknown: use one of none, power, deft, entropy, external"),
            (f"{__name__}.absent", "does not exist: name a TokenWeight that"),
            (f"{__name__}.not_a_weight", "is a int: name a TokenWeight, as made by megatron_sstoken.selection.weights"),
        ],
    )
    def test_mistakes(self, name, reason):
        with pytest.raises(ValueError, match=reason):
            find_weight(name)

    def test_needs_are_told_where_weights_are_made(self):
        with pytest.raises(ValueError, match=f"needs attention, which is not told .*: use {PREDICTION_SIGNALS[0]}"):
            TokenWeight(lambda x, alpha: x["attention"], needs=frozenset({"attention"}))
