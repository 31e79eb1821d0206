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
fi
exec python -m pytest --quiet "$@"
