"""What planning says of settings that cannot work, and stores with other facts."""

from pathlib import Path

import numpy as np
import pytest

from megatron_sstoken.config import SettingsError
from megatron_sstoken.data.store import StoreWriter
from megatron_sstoken.validate.run import plan_run
from tests.helpers.workbench import VOCABULARY
from tests.reference.hf_reference import Sample

NUM_SAMPLES = 20
"""In the data of the tests of plans."""


def problems_of(settings, world_size: int = 1) -> list[str]:
    """Everything that planning says."""
    with pytest.raises(SettingsError) as error:
        plan_run(settings, world_size)
    return error.value.problems


def only_problem(settings, world_size: int = 1) -> str:
    """The one thing that planning says."""
    (problem,) = problems_of(settings, world_size)
    return problem


def write_samples(folder: Path, samples: list[Sample], **changes) -> str:
    """A store of these samples with other facts in its manifest."""
    facts = {"vocabulary_size": VOCABULARY, "tokenizer_fingerprint": "toy", "tokenizer_path": "toy", "template": None}
    facts |= changes
    writer = StoreWriter(folder)
    for row, sample in enumerate(samples):
        writer.add(np.array(sample.tokens, dtype=np.int32), np.array(sample.roles, dtype=np.uint8), 10 * row)
    writer.finalize(eos_token_id=1, **facts)
    return str(folder)
