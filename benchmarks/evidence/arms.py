"""The arms: what each sets beside what all share."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Changes = Mapping[str, Any]
"""`section.name` → value."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    changes: Changes = field(default_factory=dict, hash=False)
    epochs: int = 1
    compared_with: tuple[str, ...] = ("full", "random")
    """Arms of the same data, steps and epochs that its differences are taken to."""
    rate_of: str | None = None
    """Arm whose mean weight its learning rate is multiplied by."""
    is_probed: bool = False
    """Whether it scores the probe at its start, middle and end, on the noisiest data at the chosen rate."""
    measures_before: bool = False
    """Whether it measures the losses before training too: they are the same for all arms."""
    needs_reference: bool = False
    """Whether it compares with a model that was tuned on clean problems."""


def _selects(method: str, rho: float | str = 0.6, **changes: Any) -> Changes:
    sections = {name.replace("__", "."): value for name, value in changes.items()}
    return {"selection.method": method, "selection.rho": rho} | sections


NOISIEST = 0.2
"""Share of faulty answers in the data on which all arms are run."""
TIMES = ("start", "middle", "end")
_TWICE = ("full_2", "random_2")
ARMS = {
    arm.name: arm
    for arm in (
        Arm("full", {"selection.method": "full"}, compared_with=(), is_probed=True, measures_before=True),
        Arm("random", _selects("random")),
        Arm("sstoken", _selects("sstoken"), is_probed=True),
        Arm("rel", _selects("rel")),
        Arm("attention", _selects("attention")),
        Arm("rho1", _selects("rho1"), needs_reference=True),
        Arm("probability", _selects("probability")),
        Arm("entropy", _selects("entropy")),
        Arm("power", {"selection.method": "full", "weights.method": "power", "weights.divisor": "response"}),
        Arm("full_matched", {"selection.method": "full"}, rate_of="power"),
        Arm("sstoken_0.4", _selects("sstoken", 0.4)),
        Arm("sstoken_0.8", _selects("sstoken", 0.8)),
        Arm("sstoken_auto", _selects("sstoken", "auto")),
        Arm("sstoken_explore", _selects("sstoken", selection__explore=0.1)),
        Arm("snapshot_5", _selects("sstoken", history__source="snapshot", history__every=5)),
        Arm("full_2", {"selection.method": "full"}, epochs=2, compared_with=()),
        Arm("random_2", _selects("random"), epochs=2, compared_with=_TWICE),
        Arm("sstoken_2", _selects("sstoken"), epochs=2, compared_with=_TWICE),
        Arm("previous_visit", _selects("sstoken", history__source="previous_visit"), epochs=2, compared_with=_TWICE),
    )
}
"""In the order in which they are run."""
REFERENCE = Arm("reference", {"selection.method": "full"}, epochs=3)
"""Trained on the clean tenth, at the same learning rate, to be RHO-1's reference."""
ALL_AT_RANDOM = Arm("random_of_all", _selects("random", 1.0))
"""Must end with the very weights of `full`."""
FULL_IN_FP32 = Arm("full_fp32", {"selection.method": "full", "training.precision": "fp32"})
"""Must end where a plain loop with transformers does, whose arithmetic differs too much in bf16 to tell."""
KEY_ARMS = ("full", "random", "sstoken")
"""Arms that are also run at three times the learning rate, and whose answers are marked."""
MAIN_ARMS = (*KEY_ARMS, "rel", "attention", "rho1", "probability")
"""Arms that are also run where fewer answers are faulty."""


@dataclass(frozen=True)
class Task:
    """One training run and what is measured of it."""

    arm: Arm
    noise: float
    seed: int
    learning_rate: float
    rate: str
    """What the learning rate is called: `chosen`, `large`, or a number of the grid."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"noise_{self.noise:g}/rate_{self.learning_rate:g}/{self.arm.name}/seed_{self.seed}"

    @property
    def rate_from(self) -> "Task | None":
        """The run whose mean weight this one's learning rate is multiplied by."""
        return replace(self, arm=ARMS[self.arm.rate_of]) if self.arm.rate_of else None

    @property
    def tuned_on_clean(self) -> "Task":
        """The run that tunes a reference for this seed, whatever the faults and the rate."""
        return replace(self, arm=REFERENCE, noise=0.0)

    @property
    def reference(self) -> "Task | None":
        """The run whose weights are this one's reference."""
        return self.tuned_on_clean if self.arm.needs_reference else None

    @property
    def probes(self) -> tuple[str, ...]:
        """When it scores the probe: of `TIMES`."""
        if self.arm is REFERENCE:
            return TIMES[-1:]
        return TIMES if self.arm.is_probed and (self.noise, self.rate) == (NOISIEST, "chosen") else ()

    @property
    def is_asked(self) -> bool:
        """Whether its model answers held-out questions at the end."""
        return self.arm.name in KEY_ARMS and (self.noise, self.rate) == (NOISIEST, "chosen")

    @property
    def prerequisites(self) -> list["Task"]:
        """What must be done before."""
        return [task for task in (self.rate_from, self.reference) if task is not None]
