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
    # Unit tests often wait, so two at a time; the others start processes of their own.
    passed=0
    python -m pytest --quiet --numprocesses 2 --dist loadfile tests/unit || passed=$?
    python -m pytest --quiet --ignore tests/unit || passed=$?
    exit "$passed"
fi
exec python -m pytest --quiet "$@"
