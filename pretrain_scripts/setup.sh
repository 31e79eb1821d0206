#!/usr/bin/env bash
# Makes the virtual environment and installs this package into it; takes no time where that is done already.
#
#   bash pretrain_scripts/setup.sh       # or sourced by another script, which then has ROOT, VENV and `python` of VENV
#
# PYTHON: interpreter to make the environment with (default: python3). VENV: its folder (default: .venv in the repository).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-$ROOT/.venv}"

make_environment() {
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: PYTHON=$PYTHON is not Python 3.10 or later: set PYTHON to one that is" >&2
        exit 1
    fi
    if ! "$PYTHON" -m venv "$VENV"; then
        echo "error: $PYTHON cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2
        exit 1
    fi
}

install_package() {
    local pip=("$VENV/bin/python" -m pip install --quiet --no-input --disable-pip-version-check)
    # torch first and alone: whichever build (CPU or CUDA) the machine offers for this version stays.
    echo "installing $(grep '^torch==' "$ROOT/constraints.txt") ..."
    "${pip[@]}" "$(grep '^torch==' "$ROOT/constraints.txt")"
    echo "installing megatron-sstoken and what it needs ..."
    "${pip[@]}" --constraint "$ROOT/constraints.txt" --editable "$ROOT[dev]"
}

# What the installation depends on; the stamp holds it once all of it has been installed.
installation() {
    echo "$ROOT"
    cat "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | sha256sum
}

mkdir -p "$(dirname "$VENV")"
(
    flock 9 # another script may be setting up the same environment
    stamp="$VENV/.installed"
    if [[ ! -x "$VENV/bin/python" || ! -f "$stamp" || "$(installation)" != "$(cat "$stamp")" ]]; then
        echo "setting up $VENV"
        [[ -x "$VENV/bin/python" ]] || make_environment
        install_package
        installation >"$stamp"
    fi
) 9>"$VENV.lock"

export PATH="$VENV/bin:$PATH"
