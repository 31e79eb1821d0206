"""Rows → conversations."""

import json

import pytest

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.formats import decode_line, parse_row
from megatron_sstoken.data.recipe import FieldNames, Recipe
from tests.helpers.toy import exchange

MULTI_TURN = [
    *exchange("the quick fox", "the lazy dog", system="you are helpful"),
    *exchange("how many", "7"),
]


def line(row):
    return json.dumps(row).encode()


def parse(data, fields=None):
    """The messages of one line."""
    return parse_row(decode_line(data), Recipe(fields)).messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": MULTI_TURN, "id": 3}, MULTI_TURN),
        ({"prompt": "a", "completion": "b"}, exchange("a", "b")),
        ({"prompt": MULTI_TURN[:2], "completion": MULTI_TURN[2:]}, MULTI_TURN),
        ({"messages": MULTI_TURN, "prompt": "the quick fox"}, MULTI_TURN),
        ({"instruction": "a", "input": "x", "output": "b"}, exchange("a\n\nx", "b")),
        ({"instruction": "a", "input": "", "output": "b"}, exchange("a", "b")),
        ({"instruction": "a", "input": None, "output": "b"}, exchange("a", "b")),
        ({"instruction": "a", "output": "b"}, exchange("a", "b")),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "name": None},
                    {"role": "assistant", "content": "b"},
                ]
            },
            exchange("a", "b"),
        ),
    ],
)
def test_every_form_becomes_messages(row, expected):
    assert parse(line(row)) == expected


@pytest.mark.parametrize(
    ("row", "system"), [({"q": "a", "a": "b", "s": "c"}, "c"), ({"q": "a", "a": "b", "s": ""}, None),
                        ({"q": "a", "a": "b", "s": None}, None), ({"q": "a", "a": "b"}, None)]
)  # fmt: skip
def test_named_fields(row, system):
    fields = FieldNames.parse("prompt=q, response=a,system=s")
    assert parse(line(row), fields) == exchange("a", "b", system)


@pytest.mark.parametrize(
    "text", ["", "prompt=q", "prompt=q,response=", "prompt=q,response=a,x=y", "prompt=q,prompt=r,response=a"]
)
def test_named_fields_must_be_complete(text):
    with pytest.raises(ValueError, match="--fields: .* must read prompt=NAME,response=NAME"):
        FieldNames.parse(text)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"prompt": ', "invalid JSON"),
        (b'{"prompt": "\xff", "completion": "b"}', "byte 12 of the line is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "must be a JSON object, not a list"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "key 'prompt' occurs twice"),
        (
            line({"prompt": "a", "completion": "b", "messages": MULTI_TURN}),
            "ambiguous: .*messages and prompt/comp",
        ),
        (line({"prompt": "a", "answer": "b"}), "no known form .* in the fields: prompt, answer"),
        (line({"prompt": "a", "completion": 3}), "`completion` must be a string, not a number"),
        (line({"prompt": MULTI_TURN[:1], "completion": "b"}), "`prompt` must be a string, not a list"),
        (line({"instruction": "a", "input": [], "output": "b"}), "`input` must be a string, not a list"),
        (line({"messages": "hello"}), "`messages` must be a list, not a string"),
        (line({"messages": []}), "the conversation is empty"),
        (line({"messages": ["hello"]}), "message 0 must be an object"),
        (line({"messages": [{"from": "human", "value": "a"}]}), "`role` of message 0 is missing"),
        (
            line({"messages": [{"role": "user", "content": None}]}),
            "`content` of message 0 must be a string, not null",
        ),
        (
            line({"messages": [{"role": "bot", "content": "a"}]}),
            "role 'bot' of message 0 is none of system, user",
        ),
        (line({"messages": MULTI_TURN[:1]}), "no assistant message"),
        (line({"prompt": "a", "completion": ""}), "no assistant message with content"),
        (line({"messages": MULTI_TURN, "tools": [{"name": "f"}]}), "`tools` .* not supported"),
    ],
)
def test_bad_rows_say_why(bad, reason):
    with pytest.raises(BadRow, match=reason):
        parse(bad)


def test_missing_named_field_is_named():
    with pytest.raises(BadRow, match="field `question` is missing; the row has: prompt, answer"):
        parse(line({"prompt": "a", "answer": "b"}), FieldNames("question", "answer"))
