"""Templates said to write contents without looking at them do so."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sstoken.data.text.templates import find_template, template_names
from megatron_sstoken.data.text.verbatim import is_verbatim
from tests.helpers.template_styles import STYLES
from tests.helpers.toy import CHAT_TEMPLATES

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "date_string": "1 May 2025"}
LOOP = "{% for m in messages %}%s{% endfor %}"
WRITTEN = (
    "{{ m.content }}",
    "{{ m['content'] | trim ~ eos_token }}",
    "{{ '[' + m.content.strip() + ']' }}",
    "{{ m.content or '' }}",
    "{% set text = m.role + ': ' + m.content %}{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}",
    "{% if m.content is string %}{{ m.content }}{% endif %}",
    "{% if m.tool_calls %}{{ m.content | length }}{% endif %}{{ m.content }}",
    "{% if 'tool_calls' in m and m.content == '' %}x{% endif %}{{ m.content }}",
    "{% for call in m.tool_calls or [] %}{{ m.content | upper }}{% endfor %}{{ m.content }}",
    "{{ m.content if m.role == 'user' else m.role | upper }}",
    "{% if tools is defined and tools %}{{ 1 }}{% elif messages | length > 2 %}{{ m.content }}{% endif %}",
    "{% if loop.previtem is defined and loop.previtem.role == m.role %}{{ m.content }}{% else %}-{{ m.content }}{% endif %}",
    "{% generation %}{{ m.content }}{% endgeneration %}",
    "{{ messages[loop.index0 - 0].content }}",
    "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}",
)
LOOKED_AT = (
    "{% if m.content %}{{ m.content }}{% endif %}",
    "{{ m.content | upper }}",
    "{{ m.content | length }}",
    "{{ m.content | replace('a', 'b') }}",
    "{{ m.content[:3] }}",
    "{{ m.content[0] }}",
    "{{ m.content.split('b')[-1] }}",
    "{{ m.content.strip('a') }}",
    "{{ m.content | trim('a') }}",
    "{{ m.content * 2 }}",
    "{{ m | tojson }}",
    "{{ m }}",
    "{{ messages }}",
    "{{ m.get('content') | upper }}",
    "{% for key, value in m.items() %}{{ value | upper }}{% endfor %}",
    "{% for key in m %}{{ m[key] | upper }}{% endfor %}",
    "{% set c = m.content %}{% if 'a' in c %}{{ c }}{% endif %}",
    "{% set c = m %}{% if 'a' in c.content %}{{ c.content }}{% endif %}",
    "{% set ns = namespace(c=m.content) %}{{ ns.c | upper }}",
    "{% set ns = namespace() %}{% set ns.c = m.content %}{{ ns.c | upper }}",
    "{% set (a, b) = (m.content, 1) %}{{ a | upper }}",
    "{% set c %}{{ m.content }}{% endset %}{{ c | upper }}",
    "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{% macro write(text) %}{{ text | upper }}{% endmacro %}{{ write(m.content) }}",
    "{% for a in [m] %}{{ a.content | upper }}{% endfor %}",
    "{% for a in messages if 'a' in a.content %}{{ a.content }}{% endfor %}",
    "{% for a in messages | selectattr('content', 'equalto', 'a') %}{{ a.content }}{% endfor %}",
    "{% for letter in m.content %}{{ letter }},{% endfor %}",
    "{{ 'x' if m.content == 'a' else m.content }}",
    "{{ 'a' in m.content }}",
    "{{ m.content in ['a'] }}",
    "{{ {'a': 1}[m.content] }}",
    "{{ ({'role': m.role, 'text': m.content}).text | upper }}",
    "{{ (loop.previtem or m).content | upper }}",
    "{{ loop.nextitem.content | upper }}",
    "{{ loop.changed(m.content) }}",
    "{{ m.content or 'none' }}",
    "{{ (m.content and 'b') or m.content }}",
    "{{ strftime_now('%d') }}{{ m.content }}",
    "{{ '%s' % m.content }}",
    "{{ '%s' | format(m.content | upper) }}",
)


@pytest.mark.parametrize("text", WRITTEN)
def test_written_alone(text):
    assert is_verbatim(LOOP.replace("%s", text, 1))


@pytest.mark.parametrize("text", LOOKED_AT)
def test_looked_at(text):
    assert not is_verbatim(LOOP.replace("%s", text, 1))


TEMPLATES = {name: find_template(name) for name in template_names()} | CHAT_TEMPLATES | STYLES
TEMPLATES |= {text: LOOP.replace("%s", text, 1) for text in WRITTEN}
VERBATIM = {name: template for name, template in TEMPLATES.items() if is_verbatim(template)}
CONTENTS = st.sampled_from(
    ("a", "no", "</think> so", "<think>", "{{ x }}", "tool_call", "[INST] a", "None", "system", "0", "a b\nc", "Ünï ✓")
)


def test_most_shipped_templates_are():
    assert {"chatml", "llama3", "qwen2.5", "smollm2", "zephyr"} <= VERBATIM.keys()


@settings(deadline=None, max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("name", sorted(VERBATIM))
def test_the_text_around_contents_is_the_same_for_all(name, data):
    roles = data.draw(st.sampled_from((("user", "assistant"), ("system", "user", "assistant", "user", "assistant"))))
    contents = [data.draw(CONTENTS) for _ in roles]
    marks = [f"mark{number}ed" for number in range(len(roles))]

    def rendered(texts):
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            return render_jinja_template(conversations=[messages], chat_template=TEMPLATES[name], **NAMES)[0][0]
        except Exception as error:  # what the template raises depends on roles alone, too
            return repr(error)

    wanted = rendered(marks)
    for mark, content in zip(marks, contents, strict=True):
        wanted = wanted.replace(mark, content)
    assert rendered(contents) == wanted
