"""The page as text: what is in it, and what cannot be."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.report.page import FOLDER, SCRIPTS, as_script_data, render
from tests.helpers.report_example import HOSTILE, example, hostile


class Parts(HTMLParser):
    """Tags with their attributes, and what stands in scripts, style and title."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, str] = {}
        self._open = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = f"{tag} {dict(attributes).get('type', '')}".strip()

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        self.texts[self._open] = self.texts.get(self._open, "") + data


@pytest.mark.parametrize("report", [example(), hostile()], ids=["example", "hostile"])
def test_the_page_holds_the_report_and_no_other_script(report):
    parts = Parts(render(report))
    assert json.loads(parts.texts["script application/json"]) == report
    assert [tag for tag, _ in parts.tags].count("script") == 2
    assert not {"img", "svg", "iframe", "link", "object", "embed", "base", "form"} & {tag for tag, _ in parts.tags}
    assert not [name for _, attributes in parts.tags for name in attributes if name.startswith(("on", "src", "style"))]


def test_the_policy_allows_this_script_and_this_style_alone():
    parts = Parts(render(hostile()))
    (policy,) = [a["content"] for tag, a in parts.tags if tag == "meta" and "http-equiv" in a]

    def hash_of(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src '{hash_of(parts.texts['style'])}'",
        f"script-src '{hash_of(parts.texts['script module'])}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]


TEXTS = st.text() | st.sampled_from(["\ud800", "\udfff\ud800 halves"])  # st.text() alone makes none


@given(st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=3), max_leaves=4))
def test_every_text_comes_back_from_script_data(value):
    text = as_script_data(value)
    assert json.loads(text) == value
    assert not re.search(
        "[<>&\u0000-\u001f\u007f\u00a0\u200e\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text
    )
    text.encode("utf-8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_does_not_know_is_refused(value):
    report = example()
    report["samples"][0]["drift"] = value
    with pytest.raises(ValueError, match="JSON"):
        render(report)


def test_the_title_is_escaped():
    page = render(example() | {"title": "".join(HOSTILE)})
    title = page[page.index("<title>") + 7 : page.index("</title>")]
    assert "<" not in title and "&lt;img src=x" in title and "\x00" not in title


def test_scripts_make_text_of_text_and_name_no_other_place():
    """Whatever takes a string as markup or code, or reaches for the network, is not used at all."""
    for name in (*SCRIPTS, "page.html", "page.css"):
        text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|DOMParser|https?:|//cdn|@import|url\(",
            text,
        ), name
    assert {path.name for path in FOLDER.iterdir()} == {*SCRIPTS, "page.html", "page.css"}
