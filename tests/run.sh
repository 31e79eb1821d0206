#!/usr/bin/env bash
# Sets up what is missing and runs all tests; arguments go to pytest: bash tests/run.sh -k store
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../pretrain_scripts/setup.sh"

cd "$ROOT"
export OMP_NUM_THREADS=1 # the tests' processes share few cores
exec python -m pytest --quiet "$@"
