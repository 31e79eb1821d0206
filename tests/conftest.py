"""Set-up of all tests. Time limits and warnings are in pyproject.toml."""

import os

from hypothesis import settings

# Before torch and tokenizers are imported: processes of distributed tests share few cores. They also inherit the CPU,
# since they are more than the GPUs of most machines; tests of GPUs ask for them themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SSTOKEN_DEVICE", "cpu")

# The cores are shared, so the time that one example takes says nothing; the same examples every time.
settings.register_profile("shared", deadline=None, derandomize=True)
settings.load_profile("shared")
