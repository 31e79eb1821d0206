"""How well each score tells noise from clean tokens, on the probe: by the very scores that select in training."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.evidence.arms import TIMES
from benchmarks.evidence.data import kinds_of, noise_of
from megatron_sstoken.config import SelectionSettings
from megatron_sstoken.selection.methods import score_tokens, select_tokens
from megatron_sstoken.selection.signals import TokenSignals

SCORES = ("sstoken", "rel", "attention", "rho1", "probability", "entropy", "random")
RHO = 0.6
FEWEST_CLEAN = 10
"""Noise is compared with the clean tokens of the same samples where there is at least one for so many noisy ones: where a
whole answer is noise, only the end of the turn is clean."""


def recovery_of(probes: Sequence[Path], reference: Sequence[Path], folder: Path) -> Iterator[tuple[str, float]]:
    """Measures of the probe's signals in `probes`, from the start to the end; history is the start.

    Of each time and score: AUC (the chance that a clean token has a higher score than noise: 0.5 says nothing), by kind of
    fault too; the share of noise that is dropped at `RHO`, and of clean tokens; and the mean loss of what is selected.
    """
    noise = noise_of(folder)
    kinds = np.array(kinds_of(folder))
    tables = [pq.read_table(path) for path in probes]
    sample, position = (tables[0][name].to_numpy() for name in ("sample", "position"))
    is_noise = np.array([noise[one][place] for one, place in zip(sample.tolist(), position.tolist(), strict=True)])
    history = torch.from_numpy(tables[0]["loss"].to_numpy().copy())
    compared = torch.from_numpy(pq.read_table(reference[0])["loss"].to_numpy().copy()) if reference else None
    for time, table in zip(TIMES, tables, strict=True):
        loss, attention, entropy = (
            torch.from_numpy(table[name].to_numpy().copy()) for name in ("loss", "attention", "entropy")
        )
        yield f"probe loss of noise, {time}", float(loss[is_noise].mean())
        yield f"probe loss of clean tokens, {time}", float(loss[~is_noise].mean())
        for score in SCORES:
            if score == "rho1" and compared is None:
                continue
            past = compared if score == "rho1" and compared is not None else history
            values = {"loss": loss, "attention": attention, "entropy": entropy, "history_loss": past}
            scores, kept = _scores(sample, position, values, score)
            yield f"AUC {score}, {time}", auc(scores[~is_noise], scores[is_noise])
            for kind in sorted(set(kinds) - {"clean"}):
                within = kinds[sample] == kind
                if 0 < (within & is_noise).sum() < FEWEST_CLEAN * (within & ~is_noise).sum():
                    yield f"AUC {score}, {time}, {kind}", auc(scores[within & ~is_noise], scores[within & is_noise])
            yield f"noise dropped by {score}, {time}", float(1 - kept[is_noise].mean())
            yield f"clean dropped by {score}, {time}", float(1 - kept[~is_noise].mean())
            yield f"loss of selected by {score}, {time}", float(loss.numpy()[kept].mean())


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Chance that one of `positives` is above one of `negatives`, ties counting half (Mann and Whitney)."""
    both = np.concatenate([positives, negatives])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    above = ranks[: len(positives)].sum() - len(positives) * (len(positives) + 1) / 2
    return float(above / (len(positives) * len(negatives)))


def _scores(
    sample: np.ndarray, position: np.ndarray, values: dict[str, torch.Tensor], method: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scores fp32 [n], and which tokens each sample keeps at `RHO`, bool [n]."""
    _, segment = np.unique(sample, return_inverse=True)
    signals = TokenSignals(
        segment=torch.from_numpy(segment),
        num_segments=int(segment.max()) + 1,
        response=torch.ones(len(sample), dtype=torch.bool),
        sample=torch.from_numpy(sample.copy()),
        position=torch.from_numpy(position.astype(np.int64)),
        values=values,
    )
    settings = SelectionSettings()
    options: dict[str, Any] = {"gamma": settings.gamma, "rel_floor": settings.rel_floor, "seed": 0, "step": 0}
    score, _ = score_tokens(signals, method, **options)
    selection = select_tokens(signals, method=method, rho=RHO, scope="sample", group=None, **options)
    return score.numpy(), selection.mask.numpy()
