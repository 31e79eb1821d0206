"""Words that people typed, and those that they may have meant."""

import difflib
from collections.abc import Collection, Iterable

ALIKE = 0.6
"""How alike two words are, from 0 to 1, where one may be the other with a slip of the finger (difflib's own bound)."""
SURE = 0.8
"""The same where other words than the known ones may have been meant: fp16 is not a slip for bf16."""


def alike(word: str, known: Iterable[str], most: int = 3, least: float = ALIKE) -> list[str]:
    """Those of `known` that `word` may stand for, the likeliest first; upper case, `-` and `_` do not count."""
    plain = {_plain(one): one for one in known}
    if _plain(word) in plain:
        return [plain[_plain(word)]]
    return [plain[one] for one in difflib.get_close_matches(_plain(word), plain, most, least)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X? ` where there is such a word, else nothing: to stand before the remedy of a message."""
    found = alike(word, known, 1, SURE)
    return f"did you mean {found[0]}? " if found else ""


def listed(words: Collection[object], joint: str = "or") -> str:
    """`a, b or c`."""
    *first, last = map(str, words)
    return f"{', '.join(first)} {joint} {last}" if first else last


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")
