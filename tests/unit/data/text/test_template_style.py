"""What templates expect of messages is found by probes."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.text.template_style import TemplateStyle, find_style
from tests.helpers.toy import CHAT_TEMPLATES

MESSAGE = "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}"
CALLS = "{% for call in message.tool_calls or [] %}{{ call.function.name }} "
END = "{% endfor %}"
AS_OBJECT = CALLS + "{{ call.function.arguments | tojson }}" + END
AS_TEXT = CALLS + "{{ call.function.arguments }}" + END
ADDED = CALLS + "{{ '<' + call.function.arguments + '>' }}" + END
EITHER = (
    CALLS + "{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}" + END
)
NAMED = CALLS + "{% for key, value in call.function.arguments | items %}{{ key }}={{ value }} {% endfor %}" + END
WHOLE = "{{ message.tool_calls | tojson if message.tool_calls else '' }}"
IF_NULL = "{% if message.content is none %}" + ADDED + "{% endif %}"
STRICT = "{% if message.content is not string or message.tool_calls %}{{ raise_exception('no tools') }}{% endif %}"


def render_with(template):
    def render(messages):
        try:
            return render_jinja_template(conversations=[messages], chat_template=template)[0][0]
        except Exception as error:
            raise BadRow(str(error)) from error

    return render


@pytest.mark.parametrize(
    ("inner", "style"),
    [
        *((AS_OBJECT, TemplateStyle()), (EITHER, TemplateStyle()), (NAMED, TemplateStyle()), (WHOLE, TemplateStyle())),
        *((AS_TEXT, TemplateStyle(text_arguments=True)), (ADDED, TemplateStyle(text_arguments=True))),
        (IF_NULL, TemplateStyle(text_arguments=True, null_content=True)),
        (STRICT, TemplateStyle()),
        ("", TemplateStyle()),
    ],
)
def test_styles(inner, style):
    assert find_style(render_with(MESSAGE + inner + END)) == style


@pytest.mark.parametrize("template", CHAT_TEMPLATES.values())
def test_plain_templates_have_the_default_style(template):
    assert find_style(render_with(template)) == TemplateStyle()


@pytest.mark.parametrize("inner", [AS_OBJECT, AS_TEXT, ADDED, EITHER, IF_NULL])
def test_a_template_writes_the_arguments_as_json(inner):
    render = render_with(MESSAGE + inner + END)
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Köln", "n": [1, None, True]}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert '{"city": "Köln", "n": [1, null, true]}' in render(find_style(render).apply(messages))


def test_applying_changes_only_what_the_template_wants():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "b", "tool_calls": [call]},
    ]
    assert TemplateStyle().apply(messages) == messages
    styled = TemplateStyle(null_content=True).apply(messages)
    assert styled == [
        messages[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        messages[2],
    ]
