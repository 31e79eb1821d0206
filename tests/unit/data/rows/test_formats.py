"""Rows → conversations."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.conversation import BadRow, Conversation, MessageWeight
from megatron_sstoken.data.recipe import FieldNames, Recipe
from megatron_sstoken.data.rows import formats, messages
from megatron_sstoken.data.rows.formats import FORMS, decode_line, parse_row
from megatron_sstoken.data.text.template_style import really_unused
from tests.helpers.documented import rows_of
from tests.helpers.toy import exchange

MULTI_TURN = [
    *exchange("the quick fox", "the lazy dog", system="you are helpful"),
    *exchange("how many", "7"),
]
ROWS = [*rows_of("docs/data.md").values(), *rows_of("README.md").values()]
CONTEXT, PLAIN = MessageWeight(0.0), MessageWeight()


def line(row):
    return json.dumps(row).encode()


def parse(row, fields=None):
    return parse_row(decode_line(line(row)), Recipe(fields and FieldNames.parse(fields)))


def shares(**others):
    """A row of one exchange and other columns."""
    return {"messages": exchange("a", "b"), **others}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ",".join(row))
def test_rows_of_the_documentation(row):
    conversation = parse(row)
    assert set(really_unused(conversation.unused, "{{ enable_thinking }}")) <= {
        "messages.tool_call_id",
        "messages.name",
    }
    assert conversation.messages[-1]["role"] == "assistant"


TEXTS = st.sampled_from(("", " ", "a", "7 "))
ODD = st.sampled_from((None, 3, "bot", "human"))
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(("system", "user", "assistant", "tool")), "content": TEXTS}),
        st.fixed_dictionaries({"role": ODD, "content": TEXTS}),
        st.fixed_dictionaries({"content": TEXTS, "role": st.just("user")}, optional={"weight": st.just(0)}),
    ),
    max_size=4,
)


@given(MESSAGES)
def test_rows_of_messages_alone_are_read_as_those_with_more_columns(said):
    """The first have a way of their own, which is short; an empty column means nothing."""

    def found(row):
        try:
            return parse_row(row)
        except BadRow as error:
            return str(error)

    assert found({"messages": said}) == found({"messages": said, "id": None})


def test_the_documentation_shows_every_form():
    shown = [set(row) for row in ROWS]
    assert len(ROWS) > 20 and all(any(set(form.columns) <= row for row in shown) for form in FORMS)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": MULTI_TURN, "id": 3}, MULTI_TURN),
        ({"messages": json.dumps(MULTI_TURN)}, MULTI_TURN),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, exchange("a", "b")),
        ({"conversations": exchange("a", "b")}, exchange("a", "b")),
        ({"conversation": [{"human": "a", "assistant": "b"}]}, exchange("a", "b")),
        ({"conversation": [{"input": "a", "output": "b", "system": "s"}]}, exchange("a", "b", "s")),
        ({"conversation": [{"input": "a", "output": "b", "system": None}]}, exchange("a", "b")),
        ({"prompt": "a", "completion": "b"}, exchange("a", "b")),
        ({"prompt": "a", "completion": "b", "messages": None}, exchange("a", "b")),
        ({"prompt": MULTI_TURN[:2], "completion": MULTI_TURN[2:]}, MULTI_TURN),
        ({"prompt": MULTI_TURN[:2], "completion": "the lazy dog"}, MULTI_TURN[:3]),
        ({"prompt": "a", "completion": exchange("a", "b")[1:]}, exchange("a", "b")),
        ({"prompt": "a", "response": "b"}, exchange("a", "b")),
        ({"query": "a", "response": "b"}, exchange("a", "b")),
        ({"question": "a", "answer": "b"}, exchange("a", "b")),
        ({"conversations": ["a", "b", "c", "d"]}, [*exchange("a", "b"), *exchange("c", "d")]),
        ({"conversations": '["a", "b"]', "system": "s"}, exchange("a", "b", "s")),
        ({"question": "a", "response": "b", "system_prompt": "s"}, exchange("a", "b", "s")),
        ({"input": "a", "output": "b"}, exchange("a", "b")),
        ({"messages": MULTI_TURN, "prompt": "the quick fox"}, MULTI_TURN),
        ({"instruction": "a", "input": "x", "output": "b"}, exchange("a\n\nx", "b")),
        ({"instruction": "a", "input": "", "output": "b"}, exchange("a", "b")),
        ({"instruction": "a", "input": None, "output": "b"}, exchange("a", "b")),
        ({"instruction": "a", "output": "b"}, exchange("a", "b")),
        ({"instruction": "a", "context": "x", "response": "b"}, exchange("a\n\nx", "b")),
        (
            {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
            [*exchange("a", "b", "s"), *exchange("c", "d")],
        ),
        ({"messages": exchange("a", "b"), "system": "s"}, exchange("a", "b", "s")),
        ({"messages": exchange("a", "b", "s"), "system": "s"}, exchange("a", "b", "s")),
        ({"messages": exchange("a", "b", "s"), "system": ""}, exchange("a", "b", "s")),
        ({"prompt": "a", "completion": "b", "system": "s"}, exchange("a", "b", "s")),
        ({"prompt": MULTI_TURN[1:2], "completion": "b", "system": "s"}, exchange("the quick fox", "b", "s")),
    ],
)
def test_every_form_becomes_messages(row, expected):
    assert parse(row).messages == expected


@pytest.mark.parametrize(
    ("row", "system"), [({"q": "a", "a": "b", "s": "c"}, "c"), ({"q": "a", "a": "b", "s": ""}, None),
                        ({"q": "a", "a": "b", "s": None}, None), ({"q": "a", "a": "b"}, None)]
)  # fmt: skip
def test_named_fields(row, system):
    assert parse(row, "prompt=q, response=a,system=s").messages == exchange("a", "b", system)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"dialog": exchange("a", "b"), "messages": MULTI_TURN}, "messages=dialog"),
        ({"messages": exchange("a", "b"), "prompt": "x", "completion": "y"}, "messages=messages"),
        ({"d": [{"who": "user", "what": "a"}, {"who": "gpt", "what": "b"}]}, "messages=d,role=who,content=what"),
        (
            {"messages": [{"role": "Customer", "content": "a"}, {"role": "Agent", "content": "b"}]},
            "messages=messages,user=Customer,assistant=Agent",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt=prompt,response=chosen"),
        ({"prompt": "x", "chosen": exchange("a", "b"), "rejected": []}, "messages=chosen"),
        ({"q": exchange("a", "b")[:1], "a": "b"}, "prompt=q,response=a"),
    ],
)
def test_fields_choose_among_columns(row, fields):
    assert parse(row, fields).messages == exchange("a", "b")


def test_columns_that_fields_do_not_name_keep_their_meaning():
    row = {"q": "a", "a": "b", "system": "s", "functions": "[]", "schemas": [{"name": "f"}], "source": "web"}
    conversation = parse(row, "prompt=q,response=a,tools=schemas")
    assert conversation.messages == exchange("a", "b", "s")
    assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]
    assert conversation.source == "web"


@pytest.mark.parametrize(
    "text",
    [
        *("", "prompt=q", "prompt=q,response=", "prompt=q,response=a,x=y", "prompt=q,prompt=r,response=a"),
        *("messages=m,prompt=q,response=a", "role=from,content=value", "prompt=q,response=a,role=from"),
    ],
)
def test_named_fields_must_be_complete(text):
    with pytest.raises(ValueError, match="--fields: .* must read prompt=NAME,response=NAME or messages=NAME"):
        FieldNames.parse(text)


def test_answers_that_are_calls():
    flat = {"name": "f", "arguments": {"x": 1}}
    tools = [{"name": "f", "parameters": {"x": {"type": "int"}}}]
    row = {"query": "a", "answers": json.dumps([flat, flat]), "tools": json.dumps(tools)}
    calls = [{"type": "function", "function": flat}] * 2
    conversation = parse(row)
    assert conversation.messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    assert conversation.tools == [{"type": "function", "function": tools[0]}] and conversation.unused == ()


def test_only_the_completion_is_trained():
    prompt = [*exchange("1+1?", "2"), *exchange("2+2?", "4")[:1]]
    for completion in ("4", exchange("", "4")[1:]):
        conversation = parse({"prompt": prompt, "completion": completion})
        assert conversation.weights == (PLAIN, CONTEXT, PLAIN, PLAIN)
    answered = {"prompt": [*exchange("1+1?", "2", "s")], "completion": exchange("", "4")[1:]}
    assert parse(answered).weights == (PLAIN, PLAIN, CONTEXT, PLAIN)


def test_answers_of_the_history_are_trained():
    conversation = parse({"query": "c", "response": "d", "history": [["a", "b"]]})
    assert conversation.weights == () and len(conversation.messages) == 4


@pytest.mark.parametrize(
    ("columns", "weight"), [({"weight": 0.5}, 0.5), ({"loss_weight": 2}, 2.0), ({"train": True}, 1.0)]
)
def test_the_weight_of_a_row_is_that_of_messages_without_one(columns, weight):
    turns = [*exchange("a", "b"), *exchange("c", "d")]
    turns[1] = turns[1] | {"weight": 0}
    assert parse({"messages": turns, **columns}).weights == (PLAIN, CONTEXT, PLAIN, MessageWeight(weight))


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        [{"name": "f", "parameters": {}}],
        [{"type": "function", "name": "f", "parameters": {}, "description": None}],
        ['{"name": "f", "parameters": {}}'],
        '[{"name": "f", "parameters": {}}]',
        [{"function": {"name": "f", "parameters": {"city": None}}}],
    ],
)
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tool_schemas_in_every_form(tools, column):
    found = parse(shares(**{column: tools})).tools
    assert found == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("tools", ["[]", "", [], None, "null"])
def test_no_tools(tools):
    assert parse(shares(tools=tools)).tools is None


def test_other_columns():
    row = shares(
        chat_template_kwargs='{"enable_thinking": false, "documents": null}',
        source="web",
        dataset="d",
        id=0,
        score=None,
        extra=[],
    )
    conversation = parse(row)
    assert conversation.template_arguments == {"enable_thinking": False}
    assert conversation.source == "web"
    assert conversation.unused == ("dataset", "id", "chat_template_kwargs.enable_thinking")
    assert parse(shares(source=["web"])).unused == ("source",)
    assert parse(shares(dataset="d")).source == "d"


def test_template_arguments_that_the_template_reads_are_used():
    unused = ("chat_template_kwargs.mood", "chat_template_kwargs.tone", "chat_template_kwargs.x")
    template = "{% generation %}{% if mood is defined %}{{ x }}{% set x = 'tone' %}{% endif %}{% endgeneration %}"
    assert really_unused(unused, template) == ("chat_template_kwargs.tone",)
    assert really_unused(unused, None) == unused


def test_empty_answers_are_noted():
    (note,) = parse({"messages": [*exchange("a", " "), *exchange("c", "d")]}).notes
    assert note.startswith("an assistant message is empty")
    turns = [{"role": "assistant", "content": "", "weight": 0}, *exchange("a", "b")]
    assert parse({"messages": turns}).notes == ()


def test_what_cannot_be_used_may_be_empty():
    conversation = parse(shares(images=[], audios=None, rejected="", label=3, parallel_tool_calls=False))
    assert conversation.unused == ("label", "parallel_tool_calls")


def test_unknown_keys_of_messages_reach_the_template():
    turns = [
        {"role": "user", "content": "a", "name": "Ann", "id": ""},
        {"role": "assistant", "content": "b", "x": None},
    ]
    conversation = parse({"messages": turns})
    assert conversation.messages == [{"role": "user", "content": "a", "name": "Ann", "id": ""}, exchange("a", "b")[1]]
    assert conversation.unused == ("messages.name",)


@pytest.mark.parametrize(
    ("template", "unused"),
    [
        (None, ("id", "messages.name", "messages.id")),
        ("{{ message.name }}", ("id", "messages.id")),
        ("{{ messages[0]['name'] }}{{ m.get('id') }}", ("id",)),
        ("{{ tool_call.name }}{{ tool['id'] }} name", ("id", "messages.name", "messages.id")),
        ("{{ message.names }}", ("id", "messages.name", "messages.id")),
    ],
)
def test_what_the_template_reads_is_used(template, unused):
    assert really_unused(("id", "messages.name", "messages.id"), template) == unused


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"prompt": ', "invalid JSON"),
        (b'{"prompt": "\xff", "completion": "b"}', "byte 12 of the line is not UTF-8"),
        ('{"prompt"'.encode("utf-16"), "not UTF-8 .UTF-16..: convert"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"messages": [], "id": ' + b"9" * 5000 + b"}", "more than 4,300 digits: write it as a text"),
        (b"[1]", "must be a JSON object, not a list"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "key 'prompt' occurs twice"),
        (
            line({"prompt": "a", "completion": "b", "messages": MULTI_TURN}),
            "ambiguous: the fields fit messages and prompt/completion: name .* --fields",
        ),
        (line({"question": "a", "answer": "b", "response": "c"}), "fit question/answer and question/response"),
        (line({"instruction": "a", "output": "b", "response": "c"}), "fit instruction/output and instruction/response"),
        (line({"messages": MULTI_TURN, "conversations": MULTI_TURN}), "fit messages and conversations"),
        (line({"prompt": "a", "answer": "b"}), "no known form in the fields: prompt, answer"),
        (line({"prompt": "a", "completion": None}), "no known form .* prompt .null: completion."),
        (line({"\ud800": "a"}), r"in the fields: \\ud800: name"),
        (line({"prompt": "a", "completion": "b", "label": False}), "`label` is of preference data.*: keep the rows"),
        (line({"messages": "[{'role': 'user'}]"}), "not JSON .it looks like Python's way"),
        (line({"conversations": ["a"]}), "no assistant message"),
        (line({"conversations": ["a", {"from": "gpt", "value": "b"}]}), "message 0 must be an object .*, not a string"),
        (line({"prompt": "a", "completion": ["b", "c"]}), "message 0 must be an object .*, not a string"),
        (line({"query": "a", "answers": "[]"}), "no assistant message with content"),
        (line({"query": "a", "answers": "b"}), "`answers` is a text, but not JSON"),
        (line({"segments": [{"label": True, "text": "a"}]}), "`segments` are text without roles.*: write messages"),
        (line({"text": "a"}), "plain text has no prompt .*: split it into prompt and completion"),
        (line({"prompt": "a", "completion": 3}), "`completion` must be a string or a list of messages, not a number"),
        (line({"instruction": "a", "input": [], "output": "b"}), "`input` must be a string, not a list"),
        (line({"instruction": [], "input": "x", "output": "b"}), "`instruction` must be a string beside input"),
        (line({"query": "a", "response": "b", "history": [["a"]]}), "`history` must be a list of pairs"),
        (line({"query": "a", "response": "b", "history": "no"}), "`history` is a text, but not JSON"),
        (line({"messages": "hello"}), "`messages` is a text, but not JSON"),
        (line({"messages": {}}), "`messages` must be a list, not an object"),
        (line({"messages": []}), "the conversation is empty"),
        (line({"messages": MULTI_TURN[:1]}), "no assistant message"),
        (line({"prompt": "a", "completion": ""}), "no assistant message with content"),
        (line({"prompt": MULTI_TURN, "completion": exchange("", "")[:1]}), "every assistant message has weight 0 or"),
        (line(shares(weight=0)), "every assistant message has weight 0"),
        (line(shares(weight="70 kg")), "`weight` of the row must be a number, not a string"),
        (line(shares(weight=1, train=False)), "`weight` and `train` of the row contradict"),
        (line(shares(system=3)), "`system` must be a string, not a number"),
        (line(shares(system="s", system_prompt="t")), "columns system and system_prompt differ"),
        (line({"messages": MULTI_TURN, "system": "s"}), "column `system` differs from the conversation's own"),
        (line(shares(tools=[{"name": "f"}], functions=[{"name": "g"}])), "columns tools and functions differ"),
        (line(shares(tools="no")), "`tools` is a text, but not JSON"),
        (line(shares(tools={"name": "f"})), "`tools` must be a list of tool schemas, not an object"),
        (line(shares(tools=[3])), "`tools` must hold tool schemas as objects, not a number"),
        (line(shares(tools=[{"description": "x"}])), "each with a `name`"),
        (line(shares(tools=[{"type": "web_search", "name": "w"}])), "type 'web_search'; only functions"),
        (line(shares(tools=[{"name": "f", "x": math.nan}])), "`tools` holds NaN"),
        (line(shares(chat_template_kwargs=[1])), "`chat_template_kwargs` must be an object, not a list"),
        (line(shares(images=["x.png"])), "column `images`: images, audio and video are not supported"),
        (line({"prompt": "a", "chosen": "b", "rejected": "c"}), "`chosen` is of preference data.*response=chosen"),
        (line(shares(rejected_response="c")), "`rejected_response` is of preference data"),
        (line(shares(label=False)), "`label` is of preference data"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(bad, reason):
    with pytest.raises(BadRow, match=reason) as caught:
        parse_row(decode_line(bad))
    str(caught.value).encode()


def test_missing_named_field_is_named():
    with pytest.raises(BadRow, match="field `question` is missing; the row has: prompt, answer"):
        parse({"prompt": "a", "answer": "b"}, "prompt=question,response=answer")


def test_accepted_lines():
    assert parse_row(decode_line(b"\xef\xbb\xbf" + line(shares()))).messages == exchange("a", "b")
    assert parse_row(decode_line(line(shares(score=math.nan)))).unused == ("score",)
    assert parse({"messages": exchange("a\ud800", "b")}).messages[0]["content"] == "a\ud800"
    assert parse(shares(**{"\ud800": 1})).unused == ("\\ud800",)


def test_depth_is_a_bad_row():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadRow, match="nested too deeply"):
        parse_row(shares(tools=[{"name": "f", "deep": deep}]))


NAMES = [
    *{name for form in FORMS for name in (*form.columns, *form.additions)},
    *("role", "from", "content", "value", "type", "text", "name", "arguments", "function", "start", "stop", "user"),
    *(
        "tool_calls",
        "function_call",
        "weight",
        "train",
        "spans",
        "train_detail",
        "begin_offset",
        "end_offset",
        "history",
    ),
    *("human", "assistant", "chat_template_kwargs", "source", "id"),
    *(*formats.SYSTEM, *formats.TOOLS, *messages.REASONING_KEYS, *messages.PART_KEYS),
]
WORDS = st.sampled_from(
    ["user", "assistant", "system", "tool", "function_call", "text", "thinking", "a", "[]", "{}", ""]
)
LEAVES = WORDS | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=20,
)
CALLS = st.sampled_from(
    [{"name": "f"}, [{"function": {"name": "f", "arguments": "{}"}}], '{"name": "f", "arguments": 1}']
)
PARTS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "text", "thinking"]), "text": st.text(max_size=3)},
        optional={"weight": st.floats(0, 2) | VALUES},
    ),
    max_size=3,
)
OFTEN_RIGHT = {
    "weight": st.floats(0, 2) | VALUES,
    "train": st.booleans() | VALUES,
    "spans": st.lists(
        st.fixed_dictionaries({"start": st.integers(0, 2), "stop": st.integers(1, 4), "weight": st.floats(0, 2)}),
        max_size=2,
    )
    | VALUES,
    "train_detail": st.lists(
        st.fixed_dictionaries(
            {"begin_offset": st.integers(0, 3), "end_offset": st.integers(0, 3), "train": st.booleans()}
        ),
        max_size=2,
    ),
    "thinking": st.text(max_size=3) | VALUES,
    "tool_calls": CALLS | VALUES,
    "name": VALUES,
}
ANSWERS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.text(max_size=4) | PARTS}, optional=OFTEN_RIGHT
)
OTHERS = st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": st.text(max_size=4)}) | (
    st.fixed_dictionaries({"role": st.just("function_call"), "content": CALLS})
)
MESSAGES = st.lists(ANSWERS | ANSWERS | OTHERS | VALUES, min_size=1, max_size=3)


@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
    | st.fixed_dictionaries({"messages": MESSAGES}, optional={"tools": VALUES, "system": VALUES})
    | st.fixed_dictionaries(
        {"prompt": MESSAGES | VALUES, "completion": MESSAGES | VALUES}, optional={"history": VALUES}
    )
)
def test_any_row_is_a_conversation_or_a_bad_row(row):
    try:
        conversation = parse_row(decode_line(line(row)))
    except BadRow as error:
        assert str(error)
        return
    assert isinstance(conversation, Conversation)
    assert conversation.weights == () or len(conversation.weights) == len(conversation.messages)
    for index, message in enumerate(conversation.messages):
        assert message["role"] in messages.ROLES and isinstance(message["content"], str)
        weight = conversation.weight_of(index)
        assert message["role"] == "assistant" or weight == PLAIN
        assert all(0 <= start < stop <= len(message["content"]) for start, stop, _ in weight.spans)
