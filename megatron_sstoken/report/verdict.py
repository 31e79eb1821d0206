"""Three answers and the figures that they follow from: does selection help, what does it drop, is anything drifting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sstoken.report.figures import KindFigures, StepFigures
from megatron_sstoken.report.runs import Curve, Run

MARGIN = 0.005
"""Part of a validation loss by which two runs must differ for it to be called a difference; one seed shows no less."""
DRIFT_BOUND = 0.2
"""Nats; the default of selection.drift_bound."""
STEADY = 0.1
"""Part of itself by which a mean may move and still be steady."""
SHOWN = 5
"""Kinds of tokens, or steps, that a sentence names."""
FEW = 20
"""Tokens of a kind that are too few to say how often the kind is dropped."""
CLEARLY = 3.0
"""Standard deviations by which a kind is dropped more often than the average for it to be named."""

NO_RUN = "Whether selection helps cannot be said: token records alone hold no validation loss (--run and --compare name runs)."


@dataclass(frozen=True)
class _Rival:
    """Another run, at the last step at which both were validated."""

    name: str
    method: str
    step: int
    loss: float
    own: float
    """What the main run had there."""

    @property
    def difference(self) -> float:
        return self.own - self.loss


def helps(main: Run, compared: Sequence[Run], num_validation: int | None = None) -> str:
    """Whether selection helps, by the validation losses; `num_validation`: samples that they are of, where that is known."""
    curve = main.curves.get("loss/validation")
    if not curve:
        return (
            "Whether selection helps cannot be said: the run has no validation loss (data.validation). Its loss over selected "
            "tokens is of other tokens at every step and says nothing of that."
        )
    step, loss = curve[-1]
    losses = f"validation loss is {loss:.4g} after {_steps(step)}"
    if len(curve) > 1:
        first_step, first = curve[0]
        losses += f" ({first:.4g} {'before training' if first_step == 0 else f'after {first_step}'})"
    if not compared:
        return _sentences(
            "whether selection helps cannot be said: no run to compare with was given (--compare)", losses
        )
    rivals, problems = _rivals(main, compared)
    if not rivals:
        return _sentences(losses, *problems)
    told = [
        f"“{one.name}” has {one.loss:.4g}"
        + ("" if one.step == step else f" after {_steps(one.step)} (this run: {one.own:.4g})")
        for one in rivals
    ]
    on = f", validated on {counted(num_validation, 'sample')}" if num_validation else ""
    caution = f"each is a single run of {_steps(step)}{on}: another seed may turn the order round"
    return _sentences(f"{_conclusion(main, rivals)}: {losses}; {' and '.join(told)}", *problems, caution)


def _rivals(main: Run, compared: Sequence[Run]) -> tuple[list[_Rival], list[str]]:
    """Those that can be compared with, and what is wrong with the others."""
    rivals, problems = [], []
    own = dict(main.curves["loss/validation"])
    of_data = main.data.get("validation_fingerprint")
    for run in compared:
        losses = dict(run.curves.get("loss/validation", []))
        other = run.data.get("validation_fingerprint")
        common = max((step for step in losses if step in own and step > 0), default=None)
        if not losses:
            problems.append(f"“{run.name}” has no validation loss to compare with")
        elif of_data and other and of_data != other:
            problems.append(f"“{run.name}” was validated on other data: it cannot be compared with")
        elif common is None:
            last = max(losses)
            told = f"“{run.name}” has {losses[last]:.4g} after {_steps(last)}"
            problems.append(f"{told} and was not validated at a step of this run: it cannot be compared with")
        else:
            rivals.append(_Rival(run.name, run.method, common, losses[common], own[common]))
    return rivals, problems


def _conclusion(main: Run, rivals: Sequence[_Rival]) -> str:
    if main.method == "full":
        return "this run trains on every token, so it is the one to compare a selecting run with"
    plain = [one for one in rivals if one.method == "full"]
    against = max(plain or rivals, key=lambda one: one.difference)
    if abs(against.difference) <= MARGIN * against.loss:
        verdict = f"no difference that one seed could show ({_above(against)})"
    elif plain:
        does = "helps here" if against.difference < 0 else "does not help here"
        verdict = f"selection {does} ({_above(against)})"
    else:
        verdict = f"the loss is {_above(against)}; a run of method “full” would say whether selection helps"
    chance = next((one for one in rivals if one.method == "random"), None)
    if plain and chance:
        if abs(chance.difference) <= MARGIN * chance.loss:
            does = "do as well"
        else:
            does = "do better" if chance.difference > 0 else "do worse"
        verdict += f", and as many tokens drawn at random {does} (this run is {_above(chance)})"
    return verdict


def _above(rival: _Rival) -> str:
    return f"{abs(rival.difference):.2g} nats {'above' if rival.difference > 0 else 'below'} “{rival.name}”"


def dropping(
    main: Run,
    steps: Mapping[int, StepFigures],
    total: StepFigures,
    kinds: KindFigures,
    texts: Mapping[int, str],
    groups: Sequence[Mapping[str, Any]] = (),
) -> str:
    """What is dropped, and which groups and kinds of tokens more often than others.

    `texts` has those of `KindFigures.notable`; `groups` of tokens have `name`, `count`, `dropped`.
    """
    if main.method == "full" and not total.num_dropped:
        return "Nothing is dropped: method “full” trains on every response token."
    if not total.num_response:
        share = main.curves.get("selection/share")
        known = f"; {_percent(1 - share[-1][1])} were dropped at step {share[-1][0]}" if share else ""
        return f"What is dropped cannot be said: there are no token records (logging.records_every){known}."
    if not total.num_dropped:
        return f"Nothing is dropped: all {total.num_response:,} recorded response tokens are trained on."
    text = f"{_percent(total.dropped_share)} of the response tokens recorded{_at(steps)} are dropped; "
    often = [
        f"{texts[one]!r} ({_percent(share)} of {count:,})" for one, share, count in _dropped_more(total, kinds, texts)
    ]
    group = _group_dropped_more(total, groups)
    if group:
        text += f"clearly more often {group}"
        text += f", of single tokens {', '.join(often)}" if often else ""
    else:
        text += (
            f"clearly more often: {', '.join(often)}" if often else "no kind of token clearly more often than others"
        )
    return f"{text}. {_losses(main, total)}."


def _at(steps: Mapping[int, StepFigures]) -> str:
    """The steps of the records; nothing where they name none, as those of `score`."""
    numbers = sorted(steps)
    if not any(numbers):
        return ""
    if len(numbers) > SHOWN:
        return f" at {len(numbers)} steps from {numbers[0]:,} to {numbers[-1]:,}"
    *first, last = [f"{one:,}" for one in numbers]
    return f" at steps {', '.join(first)} and {last}" if first else f" at step {last}"


def _dropped_more(total: StepFigures, kinds: KindFigures, texts: Mapping[int, str]) -> list[tuple[int, float, int]]:
    """Kinds that are dropped clearly more often than the average, those first that lose most by it: id, share, count."""
    ids = np.array(sorted(texts), dtype=np.int64)
    count = kinds["count"][ids]
    dropped = count - kinds["selected"][ids]
    excess, is_clear = _excess(count, dropped, total)
    chosen = [place for place in np.argsort(-excess, kind="stable").tolist() if is_clear[place]][:SHOWN]
    return [(int(ids[one]), float(dropped[one] / count[one]), int(count[one])) for one in chosen]


def _excess(count: np.ndarray, dropped: np.ndarray, total: StepFigures) -> tuple[np.ndarray, np.ndarray]:
    """By how many tokens more than the average would are dropped, and where that is clear."""
    average = total.dropped_share
    excess = dropped - average * count
    deviation = np.sqrt(count * average * (1 - average))
    return excess, (count >= FEW) & (excess > 0) & (excess >= CLEARLY * deviation)


def _group_dropped_more(total: StepFigures, groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The group that loses most by being dropped clearly more often than the average."""
    count, dropped = (np.array([one[name] for one in groups], dtype=np.int64) for name in ("count", "dropped"))
    excess, is_clear = _excess(count, dropped, total)
    if not is_clear.any():
        return None
    chosen = int(np.argmax(np.where(is_clear, excess, -np.inf)))
    share = _percent(float(dropped[chosen] / count[chosen]))
    return f"{groups[chosen]['name']} ({share}, {dropped[chosen]:,} of the {total.num_dropped:,} dropped)"


def _losses(main: Run, total: StepFigures) -> str:
    """Mean losses of dropped and kept tokens: the last ones of the curves, which the charts show, or else the records'."""
    of_dropped, of_kept = (main.curves.get(f"loss/{name}") for name in ("dropped", "selected"))
    if of_dropped and of_kept and of_dropped[-1][0] == of_kept[-1][0]:
        step, loss = of_dropped[-1]
        return f"At step {step:,} dropped tokens have a mean loss of {loss:.4g} nats, kept ones {of_kept[-1][1]:.4g}"
    kept = f", kept ones {total.loss_selected / total.num_selected:.4g}" if total.num_selected else ""
    return f"Dropped tokens have a mean loss of {total.loss_dropped / total.num_dropped:.4g} nats{kept}"


def drift_bound(main: Run) -> float | None:
    """What drift is measured against; None where the history is another model's, the distance to which says nothing of it."""
    other = main.setting("history", "hf_path")
    if other and other != main.setting("model", "hf_path"):
        return None
    known = main.setting("selection", "drift_bound")
    return float(known) if isinstance(known, int | float) else DRIFT_BOUND


def drifting(main: Run, steps: Mapping[int, StepFigures]) -> str:
    """Whether dropped tokens become worse than they were under the history."""
    if main.method == "full" and not any(one.num_dropped for one in steps.values()):
        return "No token is dropped, so none can drift."
    of_records: Curve = [(step, one.drift) for step, one in sorted(steps.items()) if one.num_changed]
    logged = main.curves.get("loss/dropped_minus_history")
    curve = logged or of_records
    if not curve:
        if steps and not any(one.num_dropped for one in steps.values()):
            return "No token is dropped, so none can drift."
        return "Whether anything drifts cannot be said: there are no history losses of dropped tokens."
    step, last = curve[-1]
    text = f"dropped tokens are {abs(last):.3g} nats {'above' if last > 0 else 'below'} their history losses at step {step:,}"
    if logged:
        now = dict(of_records).get(step)
        text += f" (a running mean{f'; {now:.3g} in the records of that step' if now is not None else ''})"
    bound = drift_bound(main)
    if bound is None:
        other = main.setting("history", "hf_path")
        return _sentences(
            f"the history is another model's ({other}), so the distance to it says nothing of drift", text
        )
    lasting = main.setting("selection", "drift_steps")
    is_short = isinstance(lasting, int) and step <= lasting
    caution = (
        f"too short a run for its own warning, which takes {lasting} steps above the bound (selection.drift_steps)"
    )
    return _sentences(f"{_state(curve, bound)}: {text}{_course(curve, bound)}", *([caution] if is_short else []))


def _course(curve: Curve, bound: float) -> str:
    """The peak, since when the curve is where it is, and where that is."""
    last = curve[-1][1]
    peak_step, peak = max(curve, key=lambda point: point[1])
    if len(curve) == 1 or (last <= 0 and peak <= 0):
        text = ""
    elif peak == last:
        text = ", their highest so far"
    else:
        text = f", after a peak of {peak:.3g} at step {peak_step:,}"
    if last > 0 and len(curve) > 1:
        level = bound if last > bound else 0.0
        name = f"the bound of {_bound_text(bound)}" if last > bound else "0"
        text += f", and above {name} since step {_onset(curve, level):,}"
    elif last > bound:
        text += f", above the bound of {_bound_text(bound)}"
    return text


def _state(curve: Curve, bound: float) -> str:
    """The answer; it names the bound where the curve is above 0 and below it, `_course` where it is beyond."""
    last, peak = curve[-1][1], max(value for _, value in curve)
    middle = curve[(len(curve) - 1) // 2][1]
    is_back = last < (1 - STEADY) * peak
    if last > bound:
        return "drifted, and coming back" if is_back else "drifting"
    if last <= 0:
        return "drifted, and came back" if peak > bound else "no drift"
    if peak > bound:
        return f"drifted, and came back within the bound of {_bound_text(bound)}"
    is_rising = not is_back and last - middle > STEADY * abs(middle)
    return f"not beyond the bound of {_bound_text(bound)}{' so far, but rising' if is_rising else ''}"


def _bound_text(bound: float) -> str:
    return f"{bound:g} (selection.drift_bound)"


def _onset(curve: Curve, level: float) -> int:
    """The step from which on the curve has stayed above a level; its last value is."""
    onset = curve[-1][0]
    for step, value in reversed(curve):
        if value <= level:
            break
        onset = step
    return onset


def _sentences(*texts: str) -> str:
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in texts)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _steps(number: int) -> str:
    return counted(number, "step")


def counted(number: int, noun: str) -> str:
    """The number with its noun, in the plural where it needs one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
