"""Any of some texts, looked for in many that mostly hold none of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finder:
    """A pattern whose matches begin with one of a few characters.

    To see that a text has none of these takes a thirtieth of the time of a search.
    """

    pattern: re.Pattern[str]
    beginnings: str

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Finder":
        """Finds any of the texts, the longest first; never the empty one."""
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")
        return cls(pattern, "".join(sorted({text[0] for text in longest_first})))

    def may_be_in(self, text: str) -> bool:
        """False if the text, or any that it was joined of, has no match."""
        for beginning in self.beginnings:  # noqa: SIM110  (`any` takes longer than all of it)
            if beginning in text:
                return True
        return False

    def is_in(self, text: str) -> bool:
        """Whether the pattern matches anywhere."""
        return self.may_be_in(text) and self.pattern.search(text) is not None
