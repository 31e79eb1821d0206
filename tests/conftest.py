"""Set-up of all tests. Time limits and warnings are in pyproject.toml."""

import os
import sys

import pytest
from hypothesis import settings

# Before torch and tokenizers are imported: processes of distributed tests share few cores. They also inherit the CPU,
# since they are more than the GPUs of most machines; tests of GPUs ask for them themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SSTOKEN_DEVICE", "cpu")

# The cores are shared, so the time that one example takes says nothing; the same examples every time.
settings.register_profile("shared", deadline=None, derandomize=True)
settings.load_profile("shared")


@pytest.fixture(autouse=True, scope="module")
def leave_process_groups():
    """What runs a program in the tests' own process leaves the group of one that it starts, for the next file's sake."""
    yield
    if (parallel := sys.modules.get("megatron_sstoken.parallel")) is not None:
        parallel.leave_groups()
