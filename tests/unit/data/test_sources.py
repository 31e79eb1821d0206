"""Sources of samples: those with the most response tokens have names of their own."""

import numpy as np

from megatron_sstoken.data.sources import MOST, NO_SOURCES, OTHERS, Sources
from megatron_sstoken.data.store import SampleStore, StoreWriter


def store_of(folder, labels: list[str], lengths: list[int]) -> SampleStore:
    with StoreWriter(folder) as writer:
        for row, (label, length) in enumerate(zip(labels, lengths, strict=True)):
            roles = np.array([0] + [1] * length, dtype=np.uint8)
            writer.add(np.ones(length + 1, dtype=np.int32), roles, row, label=label)
        writer.finalize(vocabulary_size=9, eos_token_id=1, tokenizer_fingerprint="", tokenizer_path="", template=None)
    return SampleStore(folder)


def test_each_sample_has_its_source(tmp_path):
    sources = Sources.of(store_of(tmp_path / "a", ["maths", "", "maths", "chat"], [3, 1, 2, 9]))
    assert [sources.names[number] for number in sources.of_sample] == ["maths", "unnamed", "maths", "chat"]


def test_one_source_is_none(tmp_path):
    assert Sources.of(store_of(tmp_path / "a", ["maths", "maths"], [3, 1])) is NO_SOURCES


def test_small_sources_are_together(tmp_path):
    labels = [f"source {number}" for number in range(MOST + 1)] + [OTHERS]
    lengths = [50 - number for number in range(MOST + 1)] + [60]
    sources = Sources.of(store_of(tmp_path / "a", labels, lengths))
    assert sources.names == (*labels[:MOST], OTHERS) and len(set(sources.names)) == MOST + 1
    assert sources.of_sample.tolist() == [*range(MOST), MOST, MOST]
    few = Sources.of(store_of(tmp_path / "b", ["maths", OTHERS], [1, 1]))
    assert few.names == ("maths", OTHERS)
