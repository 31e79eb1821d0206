"""megatron_sstoken/talk/marking.py, and statistics.py against scipy's definitions written out."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.talk.marking import final_answer, last_number, plain_text
from megatron_sstoken.talk.statistics import mcnemar, wilson


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So there are 1,234,567 of them.", "1234567"),
        ("It costs $1,000.50.", "1000.5"),
        ("She owes -$5", "-5"),
        ("She owes $-5", "-5"),
        ("It is \u22127 degrees", "-7"),
        ("10-5", "5"),
        ("7 - 3", "3"),
        ("(2)-3", "3"),
        ("The answer is 18.", "18"),
        ("18.00", "18"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("100", "100"),
        ("007", "7"),
        ("1, 2, 3", "3"),
        ("1,0000", "0"),
        ("75%", "75"),
        ("1{,}250", "1250"),
        ("\\$3\\,500", "3500"),
        ("none at all", None),
        ("", None),
        ("...", None),
    ],
)
def test_the_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sells 16 - 3 = 13 eggs.\n#### 18\nThat took 3 steps.", "18"),
        ("#### 1\n#### $2,000.", "2000"),
        ("thus \\boxed{\\frac{3}{4}} or \\boxed{\\text{$12$ apples}}, in 5 steps", "12"),
        ("\\boxed{7", "7"),
        ("#### unknown, so 4", "4"),
        ("####\n9 apples", "9"),
        ("\\boxed{x} is 3", "3"),
        ("We calculate 5 + 8 = 13. So Hugo has 13 pencils.", "13"),
        ("I do not know.", None),
    ],
)
def test_the_final_answer(text, number):
    assert final_answer(text) == number


def test_whole_texts_are_compared_without_white_space():
    assert plain_text(" a\n b ") == plain_text("a b") and plain_text(" \n") is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_every_way_to_write_a_number_is_one(value):
    forms = {last_number(f"it is {text}.") for text in (f"{value}", f"{value:,}", f"${value:,}", f"{value}000")}
    assert len(forms) == 1 and Fraction(forms.pop()) == Fraction(value)


def test_the_interval_is_wilsons():
    # R: prop.test(81, 263, correct=FALSE)$conf.int (Newcombe 1998, table I)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    with pytest.raises(ValueError):
        wilson(0, 0)


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_p_value_is_the_sum_of_all_outcomes_that_are_no_likelier(first, second):
    num = first + second
    outcomes = [Fraction(math.comb(num, k), 2**num) for k in range(num + 1)]
    expected = sum(p for p in outcomes if p <= outcomes[first])
    assert mcnemar(first, second) == pytest.approx(float(expected))
