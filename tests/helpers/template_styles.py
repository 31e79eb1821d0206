"""Chat templates of many styles, and the parts that they are made of."""

START, END = "<|im_start|>{{ m.role }}\n", "<|im_end|>{{ '\n' }}"
LOOP, DONE = "{% for m in messages %}", "{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
CALLS = "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
BLOCK = "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
SAID = "{{ m.content }}" + CALLS
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set ns = namespace(rules=messages[0].content) %}"
    "{% set rest = messages[1:] %}{% else %}{% set ns = namespace(rules='') %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% else %}[INST] "
    "{% if loop.index0 == rest | length - 2 and ns.rules %}{{ ns.rules }}\n\n{% endif %}{{ m.content }} [/INST]{% endif %}"
    "{% endfor %}"
)
STYLES = {
    "chatml": LOOP + START + SAID + END + DONE + PROMPT.replace("OPEN", ""),
    "thinking last": LOOP + START + BLOCK + SAID + END + DONE + PROMPT.replace("OPEN", ""),
    "prompt opens": LOOP + START + BLOCK + SAID + END + DONE + PROMPT.replace("OPEN", "<think>\n"),
    "no prompt": LOOP + START + SAID + END + DONE,
    "no prompt, plain header": LOOP + "{{ m.role }}: " + SAID + "{{ eos_token }}{{ '\n' }}" + DONE,
    "default system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + (LOOP + START + SAID + END + DONE + PROMPT.replace("OPEN", "")),
    "system merged": MISTRAL,
    "end unknown": LOOP + "{{ m.role }}: " + SAID + "<|end_header_id|>" + DONE + "{% if add_generation_prompt %}"
    "assistant: {% endif %}",
    "end only at the end": LOOP + "{{ m.role }}: " + SAID + "{{ '\n' }}" + DONE + "{{ eos_token if not add_generation_prompt }}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}  # fmt: skip
