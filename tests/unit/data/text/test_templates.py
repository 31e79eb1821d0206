"""Shipped chat templates: what they write, what they mark, how they are found, and the tokens that they need.

`renderings/NAME.txt` holds whole renderings, with ⟦ and ⟧ around what is marked. Where `SSTOKEN_STOCK_TEMPLATES` names a
folder with the models' own templates (`NAME.jinja`, `NAME+VARIANT.jinja`), random conversations are written alike.
"""

import os
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sstoken.commands.prepare_data import parse_arguments
from megatron_sstoken.data.conversation import BadRow, Conversation
from megatron_sstoken.data.prepare import prepare
from megatron_sstoken.data.store import StoreManifest
from megatron_sstoken.data.text.marks import has_generation_marks
from megatron_sstoken.data.text.masks import tokenize_conversations
from megatron_sstoken.data.text.templates import (
    ALIASES,
    find_template,
    require_tokens,
    template_names,
    without_marks,
)
from megatron_sstoken.data.tokenizer_files import HuggingFaceTokenizer, load_tokenizer
from tests.helpers.toy import exchange, make_tokenizer, write_rows

NAMES = list(template_names())
RENDERINGS = Path(__file__).parent / "renderings"
STOCK = os.environ.get("SSTOKEN_STOCK_TEMPLATES")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
WITH_TOOLS = {name for name in NAMES if name.startswith(("qwen2.5", "qwen3", "mistral-", "llama3.1", "smollm3"))}
WITH_THINKING = {"qwen3", "qwen3-thinking-2507", "deepseek-r1", "smollm3"}
FIXED = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "1 May 2025"}


def render(template, messages, *, prompt=False, **arguments):
    """Text and spans, by transformers alone. Raises what the template raises."""
    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=has_generation_marks(template),
        add_generation_prompt=prompt,
        **FIXED | arguments,
    )
    return texts[0], spans[0] if spans else []


def marked(template, messages, **arguments):
    """The text with ⟦ and ⟧ around its spans."""
    text, spans = render(template, messages, **arguments)
    for start, stop in reversed(spans):
        text = f"{text[:start]}⟦{text[start:stop]}⟧{text[stop:]}"
    return text


def call(city, number=0):
    return {
        "id": f"call{number:05d}",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": city}},
    }


CHAT = [*exchange("Hi", "Hello!", system="Be brief."), *exchange("2 + 2?", " 4 ")]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [call("Köln")]},
    {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "call00000"},
    {"role": "assistant", "content": "Take a coat."},
]
THOUGHTS = [
    *exchange("Hi", "Hello!"),
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Easy.\n"},
]
THOUGHTS[1] = THOUGHTS[1] | {"reasoning_content": "A greeting."}


def renderings(name):
    """Everything of interest that a template writes, in sections."""
    template = find_template(name)
    sections = {"chat": marked(template, CHAT), "to be answered": marked(template, CHAT[:-1], prompt=True)}
    sections["without system message"] = marked(template, CHAT[1:3])
    if name in WITH_TOOLS:
        sections["tools"] = marked(template, CALLS, tools=TOOLS)
    if name in WITH_THINKING:
        sections["thinking"] = marked(template, THOUGHTS)
        sections["no thinking"] = marked(template, CHAT, enable_thinking=False)
    return "".join(f"=== {title}\n{text}\n" for title, text in sections.items())


@pytest.mark.parametrize("name", NAMES)
def test_renderings(name):
    assert renderings(name) == (RENDERINGS / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_TOOLS])
@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": "See."}])
def test_calls_are_refused_where_they_would_be_lost(name, content):
    with pytest.raises(jinja2.TemplateError):
        render(find_template(name), [CALLS[0], CALLS[1] | content])


TEXTS = [
    "", " ", "\n\nyes \n", "Grüße 日本語 ❤️", 'say "<b>" \\n', "it ends <|im_end|>\n</s> or [/INST]<|eot_id|>", "/no_think",
    "<think>\nhm\n</think>\n\nyes", "no</think>tail", "<think>open", "<tool_response>\nx\n</tool_response>",
    "{{ messages }}{% generation %}",
]  # fmt: skip


def random_text(random):
    """One of `TEXTS`, or some letters, signs and white space of any language."""
    if random.random() < 0.6:
        return random.choice(TEXTS)
    return "".join(chr(random.choice((random.randrange(128), random.randrange(0xD800), 0x1F600))) for _ in range(9))


def random_conversation(random, tools=True, ends_with_answer=None):
    """Messages and what the template is told beside them."""

    def says(**keys):
        return {key: random_text(random) for key, share in keys.items() if random.random() < share}

    messages, arguments = [], {}
    if random.random() < 0.5:
        messages.append({"role": "system", "content": random_text(random)})
    with_tools = tools and random.random() < 0.5
    if with_tools and random.random() < 0.7:
        arguments["tools"] = TOOLS * random.randint(1, 2)
    for _ in range(random.randint(1, 3)):
        messages.append({"role": "user", "content": random_text(random)})
        if with_tools and random.random() < 0.5:
            calls = [call(random_text(random), number) for number in range(random.randint(1, 2))]
            messages.append({"role": "assistant", "tool_calls": calls} | says(content=0.5, reasoning_content=0.3))
            messages += [
                {"role": "tool", "content": random_text(random), "name": "weather", "tool_call_id": one["id"]}
                for one in calls
            ]
        messages.append({"role": "assistant"} | says(content=1, reasoning_content=0.3))
    if not (random.random() < 0.5 if ends_with_answer is None else ends_with_answer):
        messages.pop()
    if random.random() < 0.1 and messages[0]["role"] == "user" and len(messages) > 1:
        messages = messages[1:]  # the assistant begins
    if random.random() < 0.3:
        arguments["enable_thinking"] = random.random() < 0.5
    return messages, arguments


def conversations(tools, ends_with_answer=None):
    randoms = st.randoms(use_true_random=True)
    return randoms.map(lambda random: random_conversation(random, tools, ends_with_answer))


def stock_files():
    return sorted(Path(STOCK).glob("*.jinja")) if STOCK else []


def written_by_stock(name, messages, arguments):
    """Whether the model's own template writes all of a conversation; what it loses, ours writes or refuses."""
    last = messages[-1]
    calls = any("tool_calls" in message for message in messages)
    if name == "deepseek-r1":
        thought = last.get("reasoning_content") or "</think>" in last.get("content", "")
        return not calls and not (last["role"] == "assistant" and thought)
    if name in ("mistral-v0.3", "mistral-nemo"):
        return messages[0]["role"] != "system" or last["role"] == "user"
    if name == "smollm3":
        return not calls and not any(message.get("reasoning_content") for message in messages)
    if name == "llama3.1":
        return "tools" not in arguments or messages[messages[0]["role"] == "system"]["role"] == "user"
    return name in WITH_TOOLS or not calls


def compare_with_stock(path, examples):
    name = path.stem.partition("+")[0]
    ours = find_template(name)
    stock = path.read_text(encoding="utf-8").replace('strftime_now("%d %B %Y")', "date_string")  # SmolLM3's: the day
    compared = 0

    @settings(max_examples=examples)
    @given(conversations(tools=name in WITH_TOOLS))
    def compare(drawn):
        nonlocal compared
        messages, arguments = drawn
        if not written_by_stock(name, messages, arguments):
            reject()
        prompt = messages[-1]["role"] != "assistant"
        try:
            expected, _ = render(stock, messages, prompt=prompt, **arguments)
        except jinja2.TemplateError as error:
            if type(error) is jinja2.TemplateError:  # it refuses, and does not fail over a missing key
                with pytest.raises(jinja2.TemplateError):
                    render(ours, messages, prompt=prompt, **arguments)
            return
        assert render(ours, messages, prompt=prompt, **arguments)[0] == expected
        compared += 1

    compare()
    assert compared > examples / 3
    return compared


@pytest.mark.skipif(not STOCK, reason="SSTOKEN_STOCK_TEMPLATES names no folder with the models' own templates")
@pytest.mark.parametrize("path", stock_files(), ids=lambda path: path.stem)
def test_text_equals_the_models_own_templates(path):
    compare_with_stock(path, 200)


@pytest.mark.slow
@pytest.mark.skipif(not STOCK, reason="SSTOKEN_STOCK_TEMPLATES names no folder with the models' own templates")
@pytest.mark.parametrize("path", stock_files(), ids=lambda path: path.stem)
def test_text_equals_the_models_own_templates_on_many(path):
    print(f"{path.stem}: {compare_with_stock(path, 1000)} conversations")


ENDS = {
    "llama2": "</s>", "mistral": "</s>", "mistral-v0.3": "</s>", "mistral-nemo": "</s>", "zephyr": "</s>",
    "tulu3": "</s>", "llama3": "<|eot_id|>", "llama3.1": "<|eot_id|>", "deepseek-r1": "<｜end▁of▁sentence｜>",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_marks_hold_what_follows_the_generation_prompt(name):
    """Of the last answer: everything after the rendering that asks for it, up to its end token, which every mark has."""
    template, end = find_template(name), ENDS.get(name, "<|im_end|>")

    @settings(max_examples=60)
    @given(conversations(tools=name in WITH_TOOLS, ends_with_answer=True))
    def check(drawn):
        messages, arguments = drawn
        try:
            text, spans = render(template, messages, **arguments)
            prompt, _ = render(template, messages[:-1], prompt=True, **arguments) if messages[1:] else ("", [])
        except jinja2.TemplateError:
            reject()
        answers = [message for message in messages if message["role"] == "assistant"]
        assert len(spans) == len(answers) and all(text[start:stop].endswith(end) for start, stop in spans)
        start, stop = spans[-1]
        assert text[stop:] in ("", "\n")
        if not messages[1:]:
            return
        answer = answers[-1]
        thoughtless = name == "deepseek-r1" and not text[:start].endswith("<think>\n")
        overruled = arguments.get("enable_thinking") is False and not text[:start].endswith("</think>\n\n")
        if thoughtless:
            assert prompt == f"{text[:start]}<think>\n"
        elif name == "qwen3" and overruled:  # a thought where none is asked for, or an answer without a question
            assert answer.get("reasoning_content") or "</think>" in answer["content"] or prompt.startswith(text[:start])
        elif name == "qwen3-thinking-2507" and not text[:start].endswith("<think>\n"):
            assert prompt == f"{text[:start]}<think>\n"
        else:
            assert text[:start] == prompt

    check()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer that has the tokens of every template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped = make_tokenizer(folder, chat_template=None, eos_token="</s>", bos_token="<s>")
    tokens = ["[INST]", "[/INST]", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
    wrapped.add_special_tokens({"additional_special_tokens": tokens})
    wrapped.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_masks_equal_those_of_transformers(tokenizer, name):
    ours = load_tokenizer(tokenizer, find_template(name))
    assert isinstance(ours, HuggingFaceTokenizer) and ours.marked
    require_tokens(ours)
    words = st.sampled_from(["", "the quick fox", "so the answer is 7.", "ja\n\nnein", "Grüße ❤️", '"x"'])

    @settings(max_examples=30)
    @given(st.lists(st.tuples(words, words), min_size=1, max_size=3), words)
    def compare(turns, system):
        messages = [message for turn in turns for message in exchange(*turn)]
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        if not any(turn[1] for turn in turns):
            reject()
        (sample,) = tokenize_conversations(ours, [Conversation(messages)])
        assert not isinstance(sample, BadRow), sample
        theirs = ours._tokenizer.apply_chat_template(
            messages,
            chat_template=ours.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert sample.tokens.tolist() == theirs["input_ids"]
        assert sample.roles.tolist() == theirs["assistant_masks"]

    compare()


def test_names_and_files(tmp_path, monkeypatch):
    assert find_template("mixtral") == find_template("mistral") and find_template("llama3.2") == find_template(
        "llama3.1"
    )
    assert all(find_template(alias) == find_template(name) for alias, name in ALIASES.items())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3").write_text("mine", encoding="utf-8")
    assert find_template("qwen3") == "mine", "a file wins"
    (tmp_path / "bom.jinja").write_bytes(b"\xef\xbb\xbf{{ messages }}")
    assert find_template(tmp_path / "bom.jinja") == "{{ messages }}"
    (tmp_path / "chatml").mkdir()
    assert find_template("chatml").startswith("{#")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Qwen-3", r"\(did you mean qwen3"),
        ("lama3", r"\(did you mean llama3 "),
        ("nothing/like.jinja", "a template: give a"),
    ],
)
def test_other_names_are_refused(name, hint):
    with pytest.raises(ValueError, match=f"--chat_template: {name} is neither .*{hint}.* one of chatml, deepseek-r1, "):
        find_template(name)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.jinja cannot be read .*: give a Jinja file in UTF-8"):
        find_template(tmp_path / "a.jinja")


def test_tokens_must_be_in_the_vocabulary(tmp_path):
    make_tokenizer(tmp_path / "tokenizer", chat_template=None, bos_token="<|begin_of_text|>")
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}])

    def run(template):
        options = {"chat_template": template, "workers": 1, "progress": False}
        return prepare([rows], tmp_path / "tokenizer", tmp_path / "out", **options)

    with pytest.raises(
        ValueError, match=r"tokens <｜User｜>, .* vocabulary of .*: choose .*\(chatml, llama2, llama3, .*zephyr\)"
    ):
        run("deepseek-r1")
    assert not (tmp_path / "out").exists()
    copy = tmp_path / "copy.jinja"
    copy.write_text(find_template("deepseek-r1").replace("Tokens: ", "Its tokens: "), encoding="utf-8")
    assert run(copy).template == copy.read_text(encoding="utf-8")


def test_a_template_without_its_end_token_is_refused(tmp_path):
    make_tokenizer(tmp_path, chat_template=None, eos_token=None)
    with pytest.raises(ValueError, match="its tokens eos_token are not"):
        require_tokens(load_tokenizer(tmp_path, find_template("zephyr")))


def test_data_is_prepared_by_name(tmp_path):
    make_tokenizer(tmp_path / "tokenizer", chat_template=None)
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    arguments = ([rows], tmp_path / "tokenizer", tmp_path / "out")
    with pytest.raises(
        ValueError, match="no chat template.* --chat_template: a file, or chatml, or another of chatml, deep"
    ):
        prepare(*arguments, workers=1, progress=False)
    prepare(*arguments, chat_template="llama3", workers=1, progress=False)
    manifest = StoreManifest.load(tmp_path / "out")
    assert manifest.chat_template == find_template("llama3")
    assert manifest.template_source == "llama3, roles by generation marks"


def test_help_lists_the_names(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = "".join(capsys.readouterr().out.split())  # argparse breaks lines at hyphens too
    assert all(name in shown for name in NAMES)
    assert "(default:error)" in shown and "default:None" not in shown and "default:()" not in shown


def environment(*extensions, **options):
    made = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", *extensions], **options)
    made.globals["raise_exception"] = lambda text: pytest.fail(text)
    return made


class Ignored(jinja2.ext.Extension):
    """Reads marks and writes what is in them."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


MARKED = [
    "a {% generation %} b {% endgeneration %} c",
    "a\n  {%- generation -%}\n b\n {%- endgeneration -%}\n c",
    "a\n  {% generation %}\n b\n  {% endgeneration %}\n c",
    "a\n  {%+ generation +%}\n b\n  {%+ endgeneration +%}\n c",
    "{%generation%}x{%endgeneration%}",
    "{# {% generation %} #}{% raw %}{% generation %}{% endraw %}{% generation %}{{ '}} {% generation %}' }}{% endgeneration %}",
    "{{ " + "'a' ~ " * 500 + "'' }}{% generation %}x{% endgeneration %}",
    "{% set generation = '{% endgeneration %}' %}{% generation %}{{ generation }}{% endgeneration %}",
]


@pytest.mark.parametrize("template", MARKED)
@pytest.mark.parametrize("options", [{}, {"trim_blocks": True, "lstrip_blocks": True}])
def test_without_marks_the_text_is_the_same(template, options):
    bare = without_marks(template)
    assert (
        environment(**options).from_string(bare).render()
        == environment(Ignored, **options).from_string(template).render()
    )
    assert not has_generation_marks(bare) and without_marks(bare) == bare


def test_a_template_that_does_not_end_takes_no_time():
    endless = "{{ " + "'a' ~ " * 5000
    assert without_marks(endless) == endless


@pytest.mark.parametrize("name", NAMES)
def test_without_marks_shipped_templates_need_nothing_but_jinja(name):
    """As vLLM and others read them, which do not know marks."""
    template = find_template(name)
    assert has_generation_marks(template) and template.startswith("{#")
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        environment().from_string(template)
    bare = environment(trim_blocks=True, lstrip_blocks=True).from_string(without_marks(template))
    assert bare.render(messages=CHAT, **FIXED) == render(template, CHAT)[0]


def test_packages_hold_the_templates(tmp_path):
    root = Path(__file__).parents[4]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=root, check=True, capture_output=True,
    )  # fmt: skip
    built = tmp_path / "megatron_sstoken" / "data" / "text" / "templates"
    assert sorted(path.stem for path in built.glob("*.jinja")) == NAMES
