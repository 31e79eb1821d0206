"""Three sentences that follow from the figures and tell them: does selection help, what does it drop, is anything drifting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
"""Kinds of tokens that a sentence names."""
FEW = 20
"""Tokens of a kind that are too few to say how often the kind is dropped."""

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


def helps(main: Run, compared: Sequence[Run]) -> str:
    """Whether selection helps, by the validation losses."""
    curve = main.curves.get("loss/validation")
    if not curve:
        return (
            "Whether selection helps cannot be said: the run has no validation loss (data.validation). Its loss over selected "
            "tokens is of other tokens at every step and says nothing of that."
        )
    step, loss = curve[-1]
    text = f"Validation loss is {loss:.4g} after {_steps(step)}"
    if len(curve) > 1:
        first_step, first = curve[0]
        text += f" ({first:.4g} {'before training' if first_step == 0 else f'after {first_step}'})"
    if not compared:
        return f"{text}. Whether selection helps cannot be said: no run to compare with was given (--compare)."
    rivals, problems = _rivals(main, compared)
    if rivals:
        told = [
            f"“{one.name}” has {one.loss:.4g}"
            + ("" if one.step == step else f" after {_steps(one.step)} (this run: {one.own:.4g})")
            for one in rivals
        ]
        text += f"; {' and '.join(told)}: {_conclusion(main, rivals)}"
    return ". ".join([text, *problems]) + "."


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
    if plain and chance and chance.difference >= 0:
        verdict += f", and as many tokens drawn at random do no worse ({_above(chance)})"
    return verdict


def _above(rival: _Rival) -> str:
    return f"{abs(rival.difference):.2g} nats {'above' if rival.difference > 0 else 'below'} “{rival.name}”"


def dropping(main: Run, total: StepFigures, kinds: KindFigures, texts: Mapping[int, str]) -> str:
    """What is dropped, by kinds of tokens; `texts` has those of `KindFigures.notable`."""
    if main.method == "full" and not total.num_dropped:
        return "Nothing is dropped: method “full” trains on every response token."
    if not total.num_response:
        share = main.curves.get("selection/share")
        known = f"; {_percent(1 - share[-1][1])} were dropped at step {share[-1][0]}" if share else ""
        return f"What is dropped cannot be said: there are no token records (logging.records_every){known}."
    if not total.num_dropped:
        return f"Nothing is dropped: all {total.num_response:,} recorded response tokens are trained on."
    ids = np.array(sorted(texts), dtype=np.int64)
    count = kinds["count"][ids]
    dropped = count - kinds["selected"][ids]
    text = f"{_percent(total.dropped_share)} of the response tokens are dropped"
    if total.num_selected:
        kept = total.loss_selected / total.num_selected
        text += f", at a mean loss of {total.loss_dropped / total.num_dropped:.3g} nats (kept: {kept:.3g})"
    most = [place for place in np.argsort(-dropped, kind="stable")[:SHOWN].tolist() if dropped[place] > 0]
    named = [f"{texts[int(ids[one])]!r} ({_percent(dropped[one] / total.num_dropped)})" for one in most]
    text += f", mostly {', '.join(named)} of them"
    often = np.where(count >= FEW, dropped / np.maximum(count, 1), 0.0)
    rarely_kept = [
        one for one in np.argsort(-often, kind="stable")[:SHOWN].tolist() if often[one] > 1.5 * total.dropped_share
    ]
    if rarely_kept:
        named = [f"{texts[int(ids[one])]!r} ({_percent(often[one])} of {int(count[one]):,})" for one in rarely_kept[:3]]
        text += f"; dropped more often than others: {', '.join(named)}"
    return text + "."


def drifting(main: Run, steps: Mapping[int, StepFigures]) -> str:
    """Whether dropped tokens become worse than they were under the history."""
    if main.method == "full" and not any(one.num_dropped for one in steps.values()):
        return "No token is dropped, so none can drift."
    curve: Curve = main.curves.get("loss/dropped_minus_history") or [
        (step, one.drift) for step, one in sorted(steps.items()) if one.num_changed
    ]
    if not curve:
        if steps and not any(one.num_dropped for one in steps.values()):
            return "No token is dropped, so none can drift."
        return "Whether anything drifts cannot be said: there are no history losses of dropped tokens."
    step, last = curve[-1]
    side = f"{abs(last):.3g} nats {'above' if last > 0 else 'below'} their history losses"
    middle_step, middle = curve[(len(curve) - 1) // 2]
    way = "steady" if abs(last - middle) <= STEADY * abs(middle) else "rising" if last > middle else "falling"
    text = f"Dropped tokens are {side} at step {step}"
    if len(curve) > 1:
        text += f" ({way}: {middle:.3g} at step {middle_step})"
    other = main.setting("history", "hf_path")
    if other and other != main.setting("model", "hf_path"):
        return f"{text}. The history is another model's ({other}), so the distance to it says nothing of drift."
    known = main.setting("selection", "drift_bound")
    bound = float(known) if isinstance(known, int | float) else DRIFT_BOUND
    if last > bound:
        state = "drifted, and coming back" if way == "falling" else "drifting"
        return f"{text}, more than {bound:g} (selection.drift_bound): {state}."
    if last <= 0:
        return f"{text}: not drifting."
    within = f"within the bound of {bound:g} (selection.drift_bound)"
    return f"{text}, {within}: {'not drifting yet' if way == 'rising' and len(curve) > 1 else 'not drifting'}."


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _steps(number: int) -> str:
    return f"{number:,} step{'' if number == 1 else 's'}"
