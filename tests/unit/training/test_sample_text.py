"""A sample for TensorBoard: whatever it says, it stays text."""

import html
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensorboard.plugin_util import markdown_to_safe_html

from megatron_sstoken.data.token_text import TokenTexts
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from megatron_sstoken.training.sample_text import MOST, escaped, marked_sample
from tests.helpers.toy import make_tokenizer

MARKUP = (
    "</script><img src=x onerror=alert(1)> **a** _b_ `c` [d](http://e) # f\n# g\n\n    h\n1. i\n- j\n| k | l |\n"
    "&amp; ~~m~~ ![n](o)"
)


def shown(markdown: str) -> str:
    """What TensorBoard shows of Markdown, as text, once it is sure that there is no markup but lines."""
    rendered = markdown_to_safe_html(markdown)
    assert set(re.findall(r"<[^>]*>", rendered)) <= {"<p>", "</p>", "<br>", "<br/>", "<br />"}, rendered
    return html.unescape(re.sub(r"<[^>]*>", "", rendered))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n *_`#<>&[]()!-+1.|\\"), max_size=60))
@example(MARKUP)
@example("\n\n   \n \n")
def test_text_stays_text(text):
    printable = "".join(one if one.isprintable() or one == "\n" else f"\\u{ord(one):04x}" for one in text)
    # A word before and after, as spaces at the ends of a paragraph are nobody's.
    found = shown(f"a{escaped(text)}z").replace("\xa0", " ")
    assert [line.rstrip() for line in found.split("\n")] == [
        line.rstrip() for line in f"a{printable}z".replace("\xa0", " ").replace("\n", "↵\n").split("\n")
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder)


def columns_of(tokenizer, parts):
    """Token records of one sample: (text, role, selected) a token each."""
    tokens = [tokenizer.encode_batch([text])[0].ids for text, *_ in parts]
    assert all(len(one) == 1 for one in tokens)
    return {
        "sample": np.full(len(parts), 7),
        "position": np.arange(len(parts)),
        "token": np.array([one[0] for one in tokens]),
        "role": np.array([role for _, role, _ in parts]),
        "selected": np.array([selected for *_, selected in parts]),
    }


def test_dropped_tokens_are_marked(tokenizer):
    parts = [("a", 0, False), ("b", 1, True), ("c", 1, False), ("*", 1, False), ("d", 1, True), ("e", 0, False)]
    columns = columns_of(tokenizer, parts)
    both = {name: np.concatenate([values, values]) for name, values in columns.items()}
    both["sample"][len(parts) :] = 9
    text = marked_sample(both, TokenTexts(tokenizer))
    assert text.startswith("**Sample 7: 50 % of 4 tokens of the response dropped**")
    assert shown(text.split("\n\n")[1]) == "a«b⟦c*⟧d»e"


def test_long_samples_are_cut(tokenizer):
    columns = columns_of(tokenizer, [("a", 1, True)] * (MOST + 5))
    assert shown(marked_sample(columns, TokenTexts(tokenizer)).split("\n\n")[1]).count("a") == MOST
