"""Programs of one process, which `python -m megatron_sstoken NAME` starts, and tools/NAME.py as well."""
