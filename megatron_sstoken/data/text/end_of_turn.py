"""The token that ends an assistant's turn in a chat template, as a model that is asked has to know it."""

from typing import Any

_PROBE = "answer"
"""What an assistant says in the conversation that shows how the template ends a turn."""


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right after what an assistant says; None where there is none."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # the template wants another conversation: the other stop tokens have to do
        return None
    ids = tokenizer(text.rpartition(_PROBE)[2].lstrip(), add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return ids[0] if ids and ids[0] in special else None
