#!/usr/bin/env bash
# Sets up what is missing, checks style and types, and runs all tests. With arguments pytest alone, which takes them:
# bash tests/run.sh -k store
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../pretrain_scripts/setup.sh"

cd "$ROOT"
export OMP_NUM_THREADS=1 # the tests' processes share few cores
if (($# == 0)); then
    ruff check
    ruff format --check
    mypy
    # Two workers, for tests often wait; a file's tests share what they have made. In the order of the folders those of real
    # processes come first, and the unit tests' many small files keep both workers busy to the end.
    exec python -m pytest --quiet --numprocesses 2 --dist loadfile --no-loadscope-reorder
fi
exec python -m pytest --quiet "$@"
