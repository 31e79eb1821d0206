"""Templates of many styles: with and without marks the same responses, and none where they cannot be told."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.data.conversation import BadRow, Conversation
from megatron_sstoken.data.recipe import Recipe
from megatron_sstoken.data.text.masks import tokenize_conversations
from megatron_sstoken.data.tokenizer_files import load_tokenizer
from tests.helpers.template_styles import BLOCK, CALLS, DONE, END, LOOP, PROMPT, SAID, START, STYLES
from tests.helpers.toy import CHAT_TEMPLATES, exchange, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, chat_template=None, bos_token="<|begin_of_text|>")
    return load_tokenizer(folder)


def responses(tokenizer, template, messages, **options):
    """Decoded runs of response tokens of one conversation; the reason of a bad one."""
    tokenizer.set_template(template)
    (result,) = tokenize_conversations(tokenizer, [Conversation(messages)], Recipe(**options))
    if isinstance(result, BadRow):
        return str(result)
    borders = np.flatnonzero(np.diff(np.concatenate([[0], result.roles, [0]])))
    return [tokenizer._tokenizer.decode(result.tokens[a:b]) for a, b in zip(borders[::2], borders[1::2], strict=True)]


TWO = [*exchange("the quick fox", "the lazy dog", system="you are helpful"), *exchange("how many", "7")]
USUAL = ["the lazy dog<|im_end|>", "7<|im_end|>"]
BLOCKED = [USUAL[0], "<think>\n\n</think>\n\n7<|im_end|>"]


@pytest.mark.parametrize(
    ("style", "right"),
    [
        ("chatml", USUAL),
        ("thinking last", BLOCKED),
        ("prompt opens", [USUAL[0], "\n</think>\n\n7<|im_end|>"]),
        ("no prompt", USUAL),
        ("no prompt, plain header", [" the lazy dog<|endoftext|>", " 7<|endoftext|>"]),
        ("default system", USUAL),
        ("system merged", [" the lazy dog<|endoftext|>", " 7<|endoftext|>"]),
        ("end unknown", [" the lazy dog<|end_header_id|>", " 7<|end_header_id|>"]),
        ("end only at the end", [" the lazy dog\n", " 7\n<|endoftext|>"]),
    ],
)
def test_responses_of_styles(tokenizer, style, right):
    assert responses(tokenizer, STYLES[style], TWO) == right


@pytest.mark.parametrize("style", ["chatml", "no prompt", "default system", "thinking last"])
def test_the_assistant_speaks_first_or_twice(tokenizer, style):
    block = "<think>\n\n</think>\n\n" if style == "thinking last" else ""
    first = [{"role": "assistant", "content": "welcome"}, *exchange("a", "b")]
    assert responses(tokenizer, STYLES[style], first) == ["welcome<|im_end|>", block + "b<|im_end|>"]
    twice = [*exchange("a", "b"), {"role": "assistant", "content": "c"}]
    assert responses(tokenizer, STYLES[style], twice) == ["b<|im_end|>", block + "c<|im_end|>"]


@pytest.mark.parametrize("style", ["chatml", "no prompt", "thinking last"])
def test_tool_calls_between_messages(tokenizer, style):
    """Calls without content, whose arguments are texts, numbers or nothing, before and after other turns."""
    turns, right = [], []
    for arguments in ({"city": 'The "Hague"'}, {"days": 3}, {}):
        function = {"name": "weather", "arguments": arguments}
        turns += [
            {"role": "user", "content": "how many"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": "20"},
            {"role": "assistant", "content": "7"},
        ]
        written = json.dumps(function)
        right += [f"<tool_call>{written}</tool_call><|im_end|>", "7<|im_end|>"]
    if style == "thinking last":
        right[-1] = "<think>\n\n</think>\n\n" + right[-1]
    assert responses(tokenizer, STYLES[style], turns) == right


def test_an_empty_answer_between_others(tokenizer):
    messages = [*exchange("a", ""), *exchange("b", "c")]
    for style in ("chatml", "no prompt"):
        assert responses(tokenizer, STYLES[style], messages) == ["<|im_end|>", "c<|im_end|>"]
    assert responses(tokenizer, STYLES["thinking last"], messages)[0] == "<|im_end|>"


def test_thinking_of_earlier_turns_that_is_cut(tokenizer):
    """A template that looks for `</think>` in contents finds it in the skeleton as well."""
    cut = "{{ m.content.split('</think>')[-1].strip() if '</think>' in m.content and not loop.last else m.content }}"
    template = STYLES["chatml"].replace("{{ m.content }}", cut)
    thought = "<think>\nso\n</think>\n\n"
    messages = [*exchange("a", thought + "b"), *exchange("c", thought + "d")]
    told = responses(tokenizer, template, messages)
    assert "does not write message 1's reasoning" in told and "--allow_dropped reasoning" in told
    allowed = responses(tokenizer, template, messages, allow_dropped=frozenset({"reasoning"}))
    assert allowed == ["b<|im_end|>", thought + "d<|im_end|>"]


def test_a_template_that_looks_into_contents(tokenizer):
    """What depends on the words themselves is found by rendering the conversation up to each message."""
    template = STYLES["chatml"].replace("{{ m.content }}", "{{ m.content }}{{ m.content | length }}")
    assert responses(tokenizer, template, TWO) == ["the lazy dog12<|im_end|>", "71<|im_end|>"]
    unstable = template.replace("{{ m.content | length }}", "{{ m.content | length if loop.last else '' }}")
    assert "cannot be told exactly" in responses(tokenizer, unstable, TWO)


def test_headers_inside_marks_are_context(tokenizer):
    """SmolLM3's own template marks the header as well."""
    marked = "{% if m.role == 'assistant' %}{% generation %}HERE{% endgeneration %}{% else %}HERE{% endif %}"
    template = LOOP + marked.replace("HERE", START + SAID + END) + DONE + PROMPT.replace("OPEN", "")
    assert responses(tokenizer, template, TWO) == USUAL


def test_marks_that_leave_something_out_or_hold_too_much_are_refused(tokenizer):
    last = "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    template = LOOP + START + last + END + DONE
    assert "the content of the assistant's message 2 would not be trained" in responses(tokenizer, template, TWO)
    assert responses(tokenizer, template, TWO, turns="last") == ["7<|im_end|>"]
    everything = LOOP + START + "{% generation %}{{ m.content }}{% endgeneration %}" + END + DONE
    assert "would be trained" in responses(tokenizer, everything, TWO)
    content = LOOP + START + "{% generation %}{{ m.content }}{% endgeneration %}" + CALLS + END + DONE
    called = {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    told = responses(tokenizer, content.replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}")
        .replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}{% endif %}"),
        [{"role": "user", "content": "a"}, called])  # fmt: skip
    assert "the tool call of the assistant's message 1 would not be trained" in told


def test_a_border_that_cannot_be_told_is_refused(tokenizer):
    """The text before an answer is another one than the generation prompt, and depends on the conversation's length."""
    template = LOOP + "<|im_start|>{{ m.role }} {{ messages | length }}\n{{ m.content }}" + END + DONE
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    told = responses(tokenizer, template, TWO)
    assert "cannot be told where the assistant's message 2 begins" in told and "{% generation %}" in told


words = st.text(st.characters(codec="utf-8"), max_size=15) | st.sampled_from(
    ["the lazy dog", "7", " a ", "<|im_end|>", "assistant\n", "<think>", "</think>b", "\n\n", "é😀", "user"]
)


@st.composite
def conversations(draw):
    system = draw(st.none() | words)
    turns = draw(st.lists(st.tuples(words, words), min_size=1, max_size=4))
    messages = [message for user, assistant in turns for message in exchange(user, assistant)]
    if draw(st.booleans()):
        name = draw(st.sampled_from(["look", "weather"]))
        arguments = draw(st.dictionaries(st.sampled_from(["a", "b"]), words | st.integers(), max_size=2))
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages += [
            {"role": "user", "content": draw(words)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        messages += [{"role": "tool", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


def mark(style):
    """A style's template with marks around what it writes after its header."""
    template = STYLES[style]
    body = BLOCK + SAID if BLOCK in template else SAID
    written = "{{ eos_token }}" if "{{ eos_token }}" in template else "<|im_end|>"
    marked = "{% if m.role == 'assistant' %}{% generation %}HERE{% endgeneration %}{% else %}HERE{% endif %}"
    assert body + written in template
    return template.replace(body + written, marked.replace("HERE", body + written))


@pytest.mark.parametrize("style", ["chatml", "thinking last", "no prompt", "no prompt, plain header", "default system"])
@settings(max_examples=40)
@given(messages=conversations())
def test_with_and_without_marks_the_same(tokenizer, style, messages):
    """Whatever is said: markup, names of roles, texts of special tokens, nothing at all."""
    samples = []
    for template in (STYLES[style], mark(style)):
        tokenizer.set_template(template)
        samples += tokenize_conversations(tokenizer, [Conversation(messages)])
    unmarked, marked = samples
    assert not isinstance(marked, BadRow) or "nothing to learn" in str(marked), marked
    assert not isinstance(unmarked, BadRow), unmarked
    np.testing.assert_array_equal(unmarked.tokens, marked.tokens)
    np.testing.assert_array_equal(unmarked.roles, marked.roles)


def test_llama_style_has_the_same_masks(tokenizer):
    for messages in (TWO, TWO[1:], [*TWO, *exchange("a", "")]):
        pair = [responses(tokenizer, CHAT_TEMPLATES[name], messages) for name in ("llama3", "llama3_generation")]
        assert pair[0] == pair[1] and pair[0][0] == "the lazy dog<|eot_id|>"
