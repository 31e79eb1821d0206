"""Problems and notes of a run plan, collected before anything starts."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Findings:
    """Collects problems; a part that fails to open is None and what depends on it goes unchecked.

    In a dry run what this machine lacks is a note: the run may be meant for another machine.
    """

    def __init__(self, problems: list[str], dry_run: bool = False):
        self.problems = list(problems)
        self.notes: list[str] = []
        self._lacking = self.notes if dry_run else self.problems

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            self.problems.append(message)

    def lacks(self, messages: list[str]) -> None:
        """Add what this machine lacks."""
        self._lacking.extend(messages)

    def attempt(self, setting: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except (ValueError, OSError) as error:
            self.problems.append(f"{setting}: {error}")
            return None


def divisors_of(number: int, limit: int = 64) -> list[int]:
    """The divisors of `number` up to `limit`, ascending."""
    return [value for value in range(1, min(number, limit) + 1) if number % value == 0]


def divisors(number: int) -> str:
    """The divisors of `number`, for messages: '1, 2 or 4'."""
    values = list(map(str, divisors_of(number)))
    return " or ".join([", ".join(values[:-1]), values[-1]]) if len(values) > 1 else values[0]
