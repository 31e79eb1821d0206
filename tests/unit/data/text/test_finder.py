import re

from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.text.finder import Finder
from megatron_sstoken.data.text.skeleton import MARKUP

PARTS = st.lists(st.text("<[ab]", max_size=3), max_size=4)


@given(texts=PARTS, parts=PARTS)
def test_it_finds_what_a_plain_search_finds(texts, parts):
    finder, text = Finder.of(texts), "".join(parts)
    assert finder.is_in(text) == any(one in text for one in texts if one)
    assert finder.may_be_in(text) >= any(finder.is_in(part) for part in parts)


def test_the_longest_is_found_first_and_the_empty_one_never():
    finder = Finder.of(["<a", "", "<a>"])
    assert [found[0] for found in finder.pattern.finditer("<a><a")] == ["<a>", "<a"]
    assert not Finder.of([""]).is_in("anything")


@given(st.from_regex(MARKUP.pattern, fullmatch=True))
def test_markup_begins_and_goes_on_as_it_says(markup):
    assert any(held in markup for held in MARKUP.hints[markup[0]])


def test_a_pattern_of_its_own_is_searched_where_its_beginnings_are():
    finder = Finder(re.compile(r"/think\b"), hints={"/": ("think",)})
    assert finder.is_in("go /think") and not finder.is_in("a/thinker") and not finder.is_in("think")
    assert finder.may_be_in("a/thinker") and not finder.may_be_in("a/b") and not finder.may_be_in("think")
