"""Whether an answer is right: the number that it ends with, against the reference's."""

import re
from collections.abc import Callable
from decimal import Decimal

_NUMBER = re.compile(
    r"(?:(?<![\w)\]])-)?[$€£]?(?:(?<![\w)\]])-)?"  # a minus, but not the one between two terms; a currency on either side
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # digits, in groups of three or not, and decimals
)
_FINAL = re.compile(r"####(?!#)([^\n]*)")
"""GSM8K's line of the final answer."""
_LATEX = ((r"{,}", ","), (r"\,", ""), (r"\!", ""), (r"\$", "$"), ("\u2212", "-"), ("\u202f", ""), ("\u00a0", " "))


def last_number(text: str) -> str | None:
    """The last number of a text in one form: `$1,000.50.` is 1000.5, `-0` is 0. None where there is none."""
    for written, plain in _LATEX:
        text = text.replace(written, plain)
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def final_answer(text: str) -> str | None:
    """The number after the last `####`, else in the last `\\boxed{}`, else the last one of the text."""
    for part in (*_FINAL.findall(text)[-1:], *_boxed(text)[-1:]):
        if (number := last_number(part)) is not None:
            return number
    return last_number(text)


def plain_text(text: str) -> str | None:
    """The text with single spaces; None where it is empty."""
    return " ".join(text.split()) or None


MATCHES: dict[str, Callable[[str], str | None]] = {
    "final": final_answer,
    "last_number": last_number,
    "text": plain_text,
}
"""Name → what of a text is compared; two texts agree where both have it and it is the same."""


def _plain(number: str) -> str:
    value = Decimal(re.sub("[,$€£]", "", number))
    text = f"{value if value else abs(value):f}"
    return text.rstrip("0").rstrip(".") if "." in text else str(int(text))


def _boxed(text: str) -> list[str]:
    r"""What each `\boxed{…}` holds, braces inside included; one that is not closed is left out."""
    found = []
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for index in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if not depth:
                found.append(text[match.end() : index])
                break
    return found
