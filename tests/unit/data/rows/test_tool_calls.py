"""Tool calls in every form → the form that templates read. Schemas: test_formats.py."""

import math

import pytest

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.rows.tool_calls import parse_calls, parse_tools
from megatron_sstoken.data.text.template_style import with_text_arguments

FLAT = {"name": "f", "arguments": {"city": "Köln"}}
CALL = {"type": "function", "function": FLAT}


@pytest.mark.parametrize(
    "call",
    [
        *(CALL, FLAT, {"function": FLAT}, {"name": "f", "parameters": {"city": "Köln"}}),
        {"name": "f", "arguments": '{"city": "K\\u00f6ln"}'},
        {"type": "function", "function": {"name": "f", "arguments": {"city": "Köln", "zip": None}, "strict": None}},
        '{"name": "f", "arguments": {"city": "Köln"}}',
    ],
)
def test_every_form_of_a_call(call):
    assert parse_calls([call], "x") == parse_calls(call, "x") == [CALL]


def test_the_rest_of_a_call_stays():
    assert parse_calls([{"id": "a1", "index": 0, **FLAT}], "x") == [{"id": "a1", "index": 0, **CALL}]
    assert parse_calls([{"id": "a1", "type": "function", "function": FLAT}], "x") == [{"id": "a1", **CALL}]


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_no_arguments(arguments):
    assert parse_calls({"name": "f", "arguments": arguments}, "x")[0]["function"]["arguments"] == {}
    assert parse_calls({"name": "f"}, "x")[0]["function"]["arguments"] == {}


def test_nulls_of_a_text_stay():
    """In an object they stand for keys that other rows of a table have."""
    (call,) = parse_calls({"name": "f", "arguments": '{"a": null, "b": [null]}'}, "x")
    assert call["function"]["arguments"] == {"a": None, "b": [None]}
    (call,) = parse_calls({"name": "f", "arguments": {"a": None, "b": [{"c": None}, None]}}, "x")
    assert call["function"]["arguments"] == {"b": [{}, None]}


def test_arguments_as_text():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    question, call = with_text_arguments(messages)
    assert question is messages[0]
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": '{"city": "Köln"}'}}]
    assert messages[1]["tool_calls"] == [CALL], "unchanged"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (3, "must hold calls as objects, not a number"),
        ("f()", "is a text, but not JSON"),
        ({"arguments": {}}, "must name the function"),
        ({"name": "", "arguments": {}}, "must name the function"),
        ({"function": "f"}, "`function` of x must be an object, not a string"),
        ({"type": "custom", "function": FLAT}, "something of type 'custom'; only functions"),
        ({"name": "f", "arguments": "{city: 1}"}, "`arguments` of x is not JSON: "),
        ({"name": "f", "arguments": '{"a": 1, "a": 2}'}, "key 'a' occurs twice"),
        ({"name": "f", "arguments": "[1]"}, "`arguments` of x must be an object of named arguments, not a list"),
        ({"name": "f", "arguments": 3}, "must be an object of named arguments, not a number"),
        ({"name": "f", "arguments": {"a": math.inf}}, "`arguments` of x holds NaN or an infinite number"),
        ({"name": "f", "arguments": '{"a": 1e999}'}, "holds NaN or an infinite number"),
        ({"name": "f", "arguments": {"a": b"x"}}, "`arguments` of x cannot be written as JSON"),
    ],
)
def test_bad_calls_say_why(call, reason):
    with pytest.raises(BadRow, match=reason):
        parse_calls([call], "x")


def test_schemas_of_anthropic():
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    (tool,) = parse_tools([{"name": "f", "description": "d", "input_schema": schema}], "x")
    assert tool == {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
