"""The selector: what it selects from reports by its settings, in a micro-batch and over the whole batch."""

from dataclasses import replace

import torch

from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.training.selector import signals_of
from tests.helpers.token_batches import TURNS, indices, make_batch, make_report, make_selector


def test_signals_of_a_report():
    report = make_report(make_batch(TURNS, 8))
    signals = signals_of(report)
    assert (
        signals.num_segments == 3
        and signals["loss"] is report.loss
        and signals["attention"] is report.values["attention"]
    )
    assert signals["history_loss"] is report.batch.history_loss
    for name in ("segment", "response", "sample", "position"):
        assert getattr(signals, name) is getattr(report.batch, name)
    assert set(signals_of(make_report(make_batch(TURNS, 8, history=False), attention=False)).values) == {"loss"}


def by_hand(values: torch.Tensor, batch, counts: list[int]) -> list[int]:
    """Indices of the `counts[s]` highest values among the response tokens of each sample s."""
    chosen = []
    for number, count in enumerate(counts):
        mine = [t for t in range(len(values)) if batch.segment[t] == number and batch.response[t]]
        chosen += sorted(mine, key=lambda t: -float(values[t]))[:count]
    return sorted(chosen)


def test_selector_uses_gamma_rho_and_the_reports_values():
    batch = make_batch(TURNS, 8, seed=3)
    report = make_report(batch, seed=3, selected=False)
    counts = [2, 1, 1]  # half of 3, 2 and 1, rounded up
    by_attention = make_selector(gamma=0.0, rho=0.5)(report)
    assert indices(by_attention.mask) == by_hand(report.values["attention"], batch, counts)
    by_rel = make_selector(gamma=1.0, rho=0.5)(report)
    assert indices(by_rel.mask) == by_hand(batch.history_loss - report.loss, batch, counts)
    assert by_rel.mask.tolist() != by_attention.mask.tolist()
    assert torch.equal(make_selector(method="full")(report).mask, batch.response)


def test_random_selection_depends_on_seed_and_step():
    report = make_report(make_batch([[0] + [1] * 60] * 2, 64), selected=False)
    masks = [
        make_selector(method="random", rho=0.5, seed=seed, step=step)(report).mask.tolist()
        for seed, step in ((1, 2), (1, 2), (1, 3), (2, 2))
    ]
    assert masks[0] == masks[1] and len(set(map(tuple, masks))) == 3
    assert sum(masks[0]) == 60


def test_a_selection_over_the_whole_batch():
    """The tokens of both micro-batches compete: all of the higher one's are taken before any of the other's."""
    batches = [make_batch([[0] + [1] * 4], 8), make_batch([[0] + [1] * 6, [0, 1]], 8, first_sample=9)]
    high, low = (make_report(batch, selected=False) for batch in batches)
    reports = [
        TokenReport(batch, {"loss": report.loss, "attention": attention})
        for batch, report, attention in (
            (batches[0], low, torch.linspace(0.1, 0.2, 8)),
            (batches[1], high, torch.linspace(0.9, 0.5, 16)),
        )
    ]
    choose = make_selector(gamma=0.0, rho=0.75, scope="batch", method="attention")
    assert choose.needs_all_scores
    (first, second), rho = choose.over_batch(reports)
    assert rho == 0.75
    assert torch.equal(second.mask, batches[1].response), "7 of the 9 that are wanted"
    assert indices(first.mask) == [3, 4], "the highest two of the rest"
    assert not make_selector(method="full", scope="batch").needs_all_scores
    assert not make_selector(scope="microbatch").needs_all_scores and make_selector(rho="auto").needs_all_scores


def test_a_threshold_or_a_choice_needs_no_second_pass():
    for changes in (
        {"rule": "threshold", "threshold": 0.1, "scope": "batch"},
        {"scope": "dataset"},
        {"method": "external"},
    ):
        assert not make_selector(**{"method": "random"} | changes).needs_all_scores
    batch = make_batch(TURNS, 8)
    report = make_report(batch, selected=False)
    found = make_selector(method="probability", rule="threshold", threshold=0.1, scope="batch")(report)
    assert torch.equal(found.mask, batch.response & (torch.exp(-report.loss) >= 0.1)) and found.mask.any()
    assert found.num_selected == batch.response.sum() > found.mask.sum()
    chosen = torch.where(torch.arange(len(batch.sample)) % 2 == 0, 1.0, 0.0)
    known = replace(report, batch=replace(batch, known={"chosen": chosen}, facts=None))
    found = make_selector(method="external")(known)
    assert torch.equal(found.mask, batch.response & (chosen == 1)) and found.num_selected == found.mask.sum() > 0


def test_an_adaptive_share_of_scores_of_any_size():
    """Otsu's cut of RHO-1's scores: those far above the others are taken."""
    batch = make_batch([[0] + [1] * 20], 32)
    excess = torch.where(torch.arange(32) % 4 == 0, 7.0, -3.0)
    report = TokenReport(batch, {"loss": batch.history_loss + excess})
    ((selection,), rho) = make_selector(method="rho1", rho="auto", rho_min=0.1).over_batch([report])
    assert rho == 0.25 and torch.equal(selection.mask, batch.response & (excess > 0))
