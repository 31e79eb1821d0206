"""Messages in every form → messages as templates read them."""

import pytest

from megatron_sstoken.data.conversation import BadRow, MessageWeight
from megatron_sstoken.data.rows.messages import CALL_ROLES, ROLE_NAMES, MessageKeys, as_context, parse_messages
from tests.helpers.toy import exchange

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
QUESTION, ANSWER = exchange("a", "b")


def parse(*messages):
    return [one.message for one in parse_messages(list(messages), "messages")]


def answer(**keys):
    """The one assistant message with these keys."""
    (message,) = parse({"role": "assistant", **keys})
    return message


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, names in ROLE_NAMES.items() for name in names])
def test_names_of_roles(role, name):
    for spelling in (name, name.title(), f" {name.upper()} "):
        assert parse({"from": spelling, "value": "a"}) == [{"role": role, "content": "a"}]


def test_names_of_roles_of_the_data_set():
    keys = MessageKeys(("who",), ("what",), {"gpt": "user"})
    messages = [{"who": "gpt", "what": "a", "role": "x"}, {"who": "bot", "what": "b"}]
    (question, reply) = parse_messages(messages, "dialog", keys)
    assert question.message == {"role": "user", "content": "a"} | {"role": "user"}
    assert reply.message == ANSWER


@pytest.mark.parametrize("keys", [{"content": None}, {}, {"content": ""}, {"content": []}])
def test_content_may_be_missing_beside_calls_and_thinking(keys):
    assert answer(tool_calls=[CALL], **keys) == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert answer(thinking="t", **keys) == {"role": "assistant", "content": "", "reasoning_content": "t"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_names_of_thinking(key):
    assert answer(content="b", **{key: "t"}) == {**ANSWER, "reasoning_content": "t"}
    assert answer(content="b", **{key: ""}) == ANSWER
    assert parse({"role": "user", "content": "a", key: "t"}) == [{**QUESTION, key: "t"}]


def test_parts_of_anthropic():
    use = {"type": "tool_use", "id": "i", "name": "f", "input": {"x": 1}}
    assert answer(content=[{"type": "text", "text": "b"}, use]) == {**ANSWER, "tool_calls": [{"id": "i", **CALL}]}
    results = [
        {"type": "tool_result", "tool_use_id": "i", "content": [{"type": "text", "text": "1"}]},
        {"type": "tool_result", "tool_use_id": "j", "is_error": True},
    ]
    tools = [
        {"role": "tool", "tool_call_id": "i", "content": "1"},
        {"role": "tool", "tool_call_id": "j", "content": "", "is_error": True},
    ]
    assert parse({"role": "user", "content": results}) == tools
    assert parse({"role": "user", "content": [*results, {"type": "text", "text": "a"}]}) == [*tools, QUESTION]
    (told, *_) = parse_messages([{"role": "user", "content": results, "name": "n"}], "messages")
    assert set(told.unused) == {"tool_call_id", "name"}
    with pytest.raises(BadRow, match="part 1 of message 0 is of type 'tool_result'"):
        parse({"role": "user", "content": [{"type": "text", "text": "a"}, *results]})


@pytest.mark.parametrize(
    "part",
    [
        *({"type": "thinking", "thinking": "t"}, {"type": "reasoning", "value": "t"}),
        *({"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"type": "reasoning", "text": "t"}),
    ],
)
def test_parts_of_thinking(part):
    assert answer(content=[part, {"type": "text", "text": "b"}]) == {**ANSWER, "reasoning_content": "t"}


@pytest.mark.parametrize("key", ["text", "value", "content"])
def test_parts_of_text_are_put_together(key):
    parts = [{"type": "text", key: "a "}, "b", {"type": "output_text", key: "c"}, {key: "d"}]
    assert answer(content=parts)["content"] == "a bcd"


@pytest.mark.parametrize("value", ['{"name": "f", "arguments": {"x": 1}}', CALL["function"]])
def test_parts_that_are_calls(value):
    part = {"type": "tool_call", "value": value}
    assert answer(content=[part, part]) == {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    assert answer(content=[{"type": "text", "value": "b"}, part]) == {**ANSWER, "tool_calls": [CALL]}
    with pytest.raises(BadRow, match="part 1 of message 0 is out of order"):
        answer(content=[part, "b"])


def test_keys_of_parts_that_nothing_reads_are_unused():
    (one,) = parse_messages([{"role": "user", "content": [{"text": "a", "cache_control": {"type": "x"}}]}], "messages")
    assert one.message == QUESTION and one.unused == ("content.cache_control",)


@pytest.mark.parametrize("role", CALL_ROLES)
def test_messages_that_are_calls(role):
    text = '{"name": "f", "arguments": {"x": 1}}'
    both = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    assert parse({"from": role, "value": text}) == [both | {"tool_calls": [CALL]}]
    assert parse({"role": role, "content": f"[{text}, {text}]"}) == [both]
    assert parse({"role": role, "content": text}, {"role": role, "content": text}) == [both]
    assert parse(ANSWER, {"role": role, "content": text}) == [{**ANSWER, "tool_calls": [CALL]}]
    thought = parse(ANSWER, {"role": role, "content": text, "thinking": "t"})
    assert thought == [ANSWER, both | {"tool_calls": [CALL], "reasoning_content": "t"}]
    (joined,) = parse_messages([{**ANSWER, "id": 1}, {"role": role, "content": text, "id": 2, "name": "n"}], "messages")
    assert joined.message == {**ANSWER, "id": 1, "name": "n", "tool_calls": [CALL]} and joined.unused == (
        "id",
        "id",
        "name",
    )
    spans = [{"start": 0, "stop": 1, "weight": 0}]
    (joined,) = parse_messages([{**ANSWER, "spans": spans}, {"role": role, "content": text}], "messages")
    assert joined.weight == MessageWeight(None, ((0, 1, 0.0),)), "the call is trained"
    with pytest.raises(BadRow, match="message 1 is a call .* has another weight: give both the same"):
        parse(ANSWER | {"weight": 0}, {"role": role, "content": text})


def test_older_function_calls():
    turns = [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
             {"role": "function", "name": "f", "content": "2"}]  # fmt: skip
    call, result = parse(*turns)
    assert call == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert result == {"role": "tool", "content": "2", "name": "f"}


@pytest.mark.parametrize("empty", [[], None, "", {}])
def test_empty_calls_are_left_out(empty):
    for key in ("tool_calls", "function_call"):
        assert answer(content="b", **{key: empty}) == ANSWER
        assert parse({**QUESTION, "tool_calls": empty}) == [QUESTION]


def test_context_has_weight_zero():
    for given in ({}, {"weight": 0}, {"train": False}):
        (one,) = parse_messages([ANSWER | given], "prompt")
        assert as_context(one, 0).weight == MessageWeight(0.0)
    (one,) = parse_messages([ANSWER | {"weight": 1}], "prompt")
    with pytest.raises(BadRow, match="message 3 has a weight above 0, but is part of the prompt"):
        as_context(one, 3)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "message 0 must be an object with role and content, not a string"),
        ({"content": "a"}, "`role` of message 0 is missing"),
        ({"role": 3, "content": "a"}, "`role` of message 0 must be a string, not a number"),
        (
            {"role": "narrator", "content": "a"},
            "role 'narrator' of message 0 is none of system, developer, user, human",
        ),
        ({"role": "user", "from": "gpt", "content": "a"}, "`role` and `from` of message 0 differ"),
        ({"role": "user", "content": "a", "value": "b"}, "`content` and `value` of message 0 differ"),
        ({"role": "user"}, "`content` of message 0 is missing"),
        ({"role": "user", "content": None}, "`content` of message 0 must be a string, not null"),
        ({"role": "assistant", "content": None}, "`content` of message 0 must be a string, not null"),
        ({"role": "tool", "content": {"a": 1}}, "`content` of message 0 must be a string, not an object"),
        ({"role": "user", "content": "a", "images": ["x"]}, "message 0 has `images`: only texts"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "part 0 of message 0 is of type 'image_url': only text"),
        ({"role": "assistant", "content": [{"type": "code", "text": "f"}]}, "of type 'code': only text"),
        ({"role": "assistant", "content": [{"type": "tool_use"}]}, "part 0 of message 0 must name the function"),
        (
            {"human": "a", "assistant": "b", "weight": 1},
            "message 0 is an exchange .human, assistant. with more keys .weight.:",
        ),
        (
            {"role": "critic", "content": "a"},
            "'critic' of message 0 is none of .*: correct it, or name .* --fields messages",
        ),
        ({"role": "user", "content": [3]}, "part 0 of message 0 must be an object"),
        ({"role": "user", "content": [{"type": "text"}]}, "`text` of part 0 of message 0 must be a string, not null"),
        (
            {"role": "user", "content": [{"text": "a", "value": "b"}]},
            "`text` and `value` of part 0 of message 0 differ",
        ),
        (
            {"role": "user", "content": [{"type": "thinking", "thinking": "t"}]},
            "role user has parts of thinking or calls",
        ),
        (
            {"role": "assistant", "content": ["b", {"type": "thinking", "thinking": "t"}]},
            "part 1 of message 0 is out of order",
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "f"}', "train": False}]},
            "part 0 of message 0 is neither text nor thinking, but has a weight: weigh the whole message",
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "thinking", "text": "t", "weight": 0}, {"type": "thinking", "text": "u"}],
            },
            "part 1 of message 0 has another weight than the thinking before it",
        ),
        (
            {"role": "assistant", "thinking": "t", "content": [{"type": "thinking", "thinking": "t"}]},
            "message 0 has thinking or calls both in parts and beside them",
        ),
        ({"role": "assistant", "reasoning": "s", "thinking": "t"}, "`reasoning` and `thinking` of message 0 differ"),
        ({"role": "assistant", "reasoning": ["s"]}, "the reasoning of message 0 must be a string"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "message 0 of role user calls a tool"),
        ({"role": "assistant", "tool_calls": [CALL], "function_call": CALL["function"]}, "both `tool_calls` and"),
        ({"role": "tool_call", "content": "f(1)"}, "message 0 is a text, but not JSON"),
        ({"role": "tool_call"}, "message 0 must hold calls as objects, not null"),
        ({"role": "user", "content": "a", "train": True}, "message 0 of role user has a weight above 0"),
    ],
)
def test_bad_messages_say_why(message, reason):
    with pytest.raises(BadRow, match=reason):
        parse(message)
