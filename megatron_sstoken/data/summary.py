"""What a prepared folder holds, in words."""

from pathlib import Path

import numpy as np

from megatron_sstoken.data.mixing import DUPLICATES
from megatron_sstoken.data.output import SKIPPED, store_folders
from megatron_sstoken.data.prepare import SKIPPED_NOTE
from megatron_sstoken.data.store import SampleStore

NUM_NOTES = 20  # of each kind that are told; the manifest has all
NUM_LABELS = 10


def summary(path: str | Path) -> str:
    """A short table of what preparation made of `path`: one folder of samples, or `train` and `validation`."""
    stores = [SampleStore(folder) for folder in store_folders(Path(path)) or [Path(path)]]
    manifests = [store.manifest for store in stores]
    first = manifests[0]
    samples = sum(manifest.num_samples for manifest in manifests)
    tokens = sum(manifest.num_tokens for manifest in manifests)
    responses = sum(manifest.num_response_tokens for manifest in manifests)
    lengths = np.concatenate([store.lengths for store in stores])
    reasons = {text[len(SKIPPED_NOTE) :]: count for text, count in first.notes.items() if text.startswith(SKIPPED_NOTE)}
    notes = {text: count for text, count in first.notes.items() if not text.startswith(SKIPPED_NOTE)}
    entries = {}
    if not any("--mix" in note for note in notes):
        entries["rows"] = f"{samples + first.num_skipped + notes.get(DUPLICATES, 0):,}"
    parts = [f"{store.path.name} {len(store):,}" for store in stores] if len(stores) > 1 else []
    entries |= {
        "samples": f"{samples:,}" + (f" ({', '.join(parts)})" if parts else ""),
        "skipped": f"{first.num_skipped:,}" + (f" (see {Path(path) / SKIPPED})" if first.num_skipped else ""),
        "tokens": f"{tokens:,}",
        "response tokens": f"{responses:,} ({responses / tokens:.1%})",
        "longest sample": f"{max(lengths):,} tokens",
        "median sample": f"{np.median(lengths):,.0f} tokens",
        "template": first.template_source,
    }
    if len(shares := _shares(stores)) > 1:
        largest = sorted(shares.items(), key=lambda one: -one[1])
        told = ", ".join(f"{name} {count:,} ({count / samples:.1%})" for name, count in largest[:NUM_LABELS])
        entries["sources"] = told + (f" and {len(shares) - NUM_LABELS} more" if len(shares) > NUM_LABELS else "")
    entries["output"] = str(path)
    lines = [f"{name:<16} {value}" for name, value in entries.items()]
    return "\n".join(
        [*lines, *_counted("rows skipped because:", reasons), *_counted("noticed, with numbers of rows:", notes)]
    )


def _shares(stores: list[SampleStore]) -> dict[str, int]:
    """Samples of each label."""
    shares: dict[str, int] = {}
    for store in stores:
        names = store.manifest.labels
        for name, count in zip(names, np.bincount(store.labels, minlength=len(names)).tolist(), strict=False):
            shares[name] = shares.get(name, 0) + count
    return shares


def _counted(title: str, counts: dict[str, int]) -> list[str]:
    most = sorted(counts.items(), key=lambda one: -one[1])
    lines = [f"{count:>10,}  {text}" for text, count in most[:NUM_NOTES]]
    more = [f"{'':>10}  … and {len(most) - NUM_NOTES} more kinds (manifest.json)"] if len(most) > NUM_NOTES else []
    return [title, *lines, *more] if lines else []
