"""What a chat template does not write is refused, or noted where it is allowed."""

import pytest

from megatron_sstoken.data.conversation import BadRow, Conversation
from megatron_sstoken.data.recipe import DROPPABLE, Recipe
from megatron_sstoken.data.text.masks import tokenize_conversations
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from tests.helpers.toy import CHAT_TEMPLATES, exchange, make_tokenizer

TOOL = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 3}}}
NO_SYSTEM = "{% if message['role'] != 'system' %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
NO_USER = "{{ message['content'] if message['role'] != 'user' }}{{ '<|im_end|>\n' }}"
WRITE = "{{ message['content'] + '<|im_end|>\n' }}"
TEXT = exchange("Weather in Paris?", "20 degrees.")

CASES = {
    "tool_calls": (
        WRITE,
        Conversation([TEXT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, *TEXT]),
        "message 1's tool call",
    ),
    "reasoning": (
        WRITE,
        Conversation([TEXT[0], TEXT[1] | {"reasoning_content": "two and two"}]),
        "message 1's reasoning",
    ),
    "system": (
        NO_SYSTEM,
        Conversation(exchange("Hi", "Arr", system="Answer as a pirate.")),
        "message 0's content (role system)",
    ),
    "content": (NO_USER, Conversation([*TEXT, *TEXT]), "message 0's content (role user)"),
    "tools": (WRITE, Conversation(TEXT, tools=[TOOL]), "the schema of tool 'weather'"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, chat_template=None)
    return load_tokenizer(folder)


def prepared(tokenizer, template, conversation, *allowed):
    tokenizer.set_template(template)
    (result,) = tokenize_conversations(tokenizer, [conversation], Recipe(allow_dropped=frozenset(allowed)))
    return result


@pytest.mark.parametrize("kind", DROPPABLE)
def test_what_is_left_out_is_refused_or_noted(tokenizer, kind):
    written, conversation, told = CASES[kind]
    template = CHAT_TEMPLATES["plain"].replace(WRITE, written)
    refused = prepared(tokenizer, template, conversation, *set(DROPPABLE) - {kind})
    assert isinstance(refused, BadRow)
    assert f"does not write {told}: use a --chat_template that does, or --allow_dropped {kind}" in str(refused)
    allowed = prepared(tokenizer, template, conversation, kind)
    assert allowed.notes == (f"left out by the chat template, as allowed: {kind}",)


def test_what_is_written_is_found(tokenizer):
    """Escaped, trimmed, in another order; whitespace and the contents' own words do not hide it."""
    template = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + CHAT_TEMPLATES["plain"].replace(
        "{{ message['content'] +",
        "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
        "{% for c in message.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ message['content'] | trim +",
    )
    call = {"function": {"name": "weather", "arguments": {"city": 'The "Hague"\n', "days": 3, "names": ["é", "b"]}}}
    conversation = Conversation(
        [
            {"role": "system", "content": "  kind\n"},
            {"role": "user", "content": "weather"},
            {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [call]},
            {"role": "tool", "content": "20 "},
            {"role": "assistant", "content": "\t20 degrees "},
        ],
        tools=[TOOL],
    )
    assert prepared(tokenizer, template, conversation).notes == ()


def test_arguments_that_are_left_out_are_noted(tokenizer):
    template = CHAT_TEMPLATES["plain"].replace("{{ message['content'] +", "{% for c in message.tool_calls %}"
        "{{ c.function.name }}{% endfor %}{{ message['content'] +")  # fmt: skip
    sample = prepared(tokenizer, template, CASES["tool_calls"][1])
    assert sample.notes == ("the chat template leaves out arguments of tool calls",)


def test_a_name_in_a_content_is_not_a_schema(tokenizer):
    conversation = Conversation(exchange("weather", "weather"), tools=[TOOL])
    assert "schema of tool 'weather'" in str(prepared(tokenizer, CHAT_TEMPLATES["plain"], conversation))


def test_plain_text_says_what_it_cannot_write(tokenizer):
    for kind in ("reasoning", "tools"):
        told = prepared(tokenizer, None, CASES[kind][1])
        assert "has no chat template" in str(told) and f"--allow_dropped {kind}" in str(told)
        assert len(prepared(tokenizer, None, CASES[kind][1], kind).notes) == 1


def test_calls_are_given_as_the_template_wants_them(tokenizer):
    """One that writes arguments as they are gets text; one that writes calls where content is null gets null."""
    calls = "{% for c in message.tool_calls %}{{ c.function.name }}:HERE{% endfor %}"
    styles = ["{{ c.function.arguments }}", "{{ c.function.arguments | tojson }}"]
    for style in styles:
        template = CHAT_TEMPLATES["plain"].replace(
            "{{ message['content'] +", calls.replace("HERE", style) + WRITE[:22] + " +"
        )
        sample = prepared(tokenizer, template, CASES["tool_calls"][1])
        text = tokenizer._tokenizer.decode(sample.tokens[sample.roles == 1])
        assert text.startswith('weather:{"city": "Paris", "days": 3}<|im_end|>') and sample.notes == ()
    null = "{% if message.content is none %}" + calls.replace("HERE", styles[1]) + "{{ '<|im_end|>\n' }}{% else %}"
    template = CHAT_TEMPLATES["plain"].replace(WRITE, null + WRITE + "{% endif %}")
    sample = prepared(tokenizer, template, CASES["tool_calls"][1])
    text = tokenizer._tokenizer.decode(sample.tokens[sample.roles == 1])
    assert text.startswith('weather:{"city": "Paris", "days": 3}<|im_end|>')
