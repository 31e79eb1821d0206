"""How the rules of a section of the settings are written: each broken one is a message with name, value, rule and remedy."""

RENAMED = {("model", "implementation"): "backend"}
"""Section and name of a setting one version ago → its name today: on the command line, in files, and in checkpoints."""


class SettingsError(ValueError):
    """One or more settings cannot work; the message lists all of them, one a line."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class Rules:
    """Collects the broken rules of one section."""

    def __init__(self, section: str, values: object):
        self._section, self._values = section, values
        self.broken: list[str] = []

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            self.broken.append(message)

    def at_least(self, name: str, least: float) -> None:
        value = getattr(self._values, name)
        self.require(value >= least, f"{self._section}.{name}={value} is too small: use {least} or more")

    def in_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self._values, name)
        self.require(
            low <= value <= high, f"{self._section}.{name}={value} is outside [{low}, {high}]: use a value in it"
        )
