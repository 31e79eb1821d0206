"""A sample as Markdown, with what selection dropped of it marked: for TensorBoard's page of texts."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from megatron_sstoken.data.token_text import TokenTexts

MOST = 1000
"""Tokens of a sample that are shown."""


def marked_sample(columns: dict[str, np.ndarray], texts: TokenTexts) -> str:
    """The first sample of token records (as `gather_columns` returns them): what the assistant said in « », tokens that
    selection dropped in ⟦ ⟧."""
    here = columns["sample"] == columns["sample"][0]
    tokens, position = columns["token"][here], columns["position"][here]
    response = (columns["role"][here] == 1) & (position > 0)
    dropped = response & ~columns["selected"][here]
    share = f"{100 * dropped.sum() / max(response.sum(), 1):.0f} % of {response.sum():,}"
    head = f"**Sample {columns['sample'][0]}: {share} tokens of the response dropped**, which stand in ⟦ ⟧"
    shown = "".join(_marked(tokens[:MOST], response[:MOST], dropped[:MOST], texts))
    return f"{head}\n\n{shown}{' …' if len(tokens) > MOST else ''}"


def _marked(tokens: np.ndarray, response: np.ndarray, dropped: np.ndarray, texts: TokenTexts) -> Iterator[str]:
    kinds = zip(response.tolist(), dropped.tolist(), tokens.tolist(), strict=True)
    for is_response, turn in groupby(kinds, key=lambda one: one[0]):
        yield "«" if is_response else ""
        for is_dropped, run in groupby(turn, key=lambda one: one[1]):
            text = escaped("".join(texts.one(token) for *_, token in run))
            yield f"⟦{text}⟧" if is_dropped else text
        yield "»" if is_response else ""


def escaped(text: str) -> str:
    """Text in which Markdown and HTML find nothing of theirs, and whose lines and spaces stay as they are."""
    found = []
    for character in text:
        if character == "\n":
            found.append("↵  \n")
        elif character == " " and (not found or found[-1][-1] in "\n ;"):
            found.append("&#160;")  # several are one, and at the beginning of a line they mean something
        elif character.isalnum() or character == " ":
            found.append(character)
        elif character.isprintable():
            found.append(f"&#{ord(character)};")
        else:
            found.append(f"&#92;u{ord(character):04x}")  # control characters, and those that reorder others
    return "".join(found)
