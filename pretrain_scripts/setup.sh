#!/usr/bin/env bash
# Makes the virtual environment and installs this package into it; takes no time where that is done already.
#
#   bash pretrain_scripts/setup.sh       # or sourced by another script, which then has ROOT, VENV and `python` of VENV
#
# PYTHON: interpreter to make the environment with (default: python3). VENV: its folder (default: .venv in the repository).
# Which line of megatron-core is installed follows from the interpreter's version: see docs/platform.md.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NAMED_PYTHON="${PYTHON:-}"
PYTHON="${PYTHON:-python3}"
VENV="$(realpath -m "${VENV:-$ROOT/.venv}")" # also where another folder is entered later

# pyenv's commands answer only for versions that it has activated: take the newest it has by that name.
find_python() {
    local version
    if ! "$PYTHON" -c '' 2>/dev/null && version="$(pyenv latest "${PYTHON#python}" 2>/dev/null)"; then
        PYTHON="$(pyenv prefix "$version")/bin/python"
    fi
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: PYTHON=$PYTHON is not Python 3.10 or later: set PYTHON to one that is" >&2
        exit 1
    fi
}

make_environment() {
    find_python
    if ! "$PYTHON" -m venv "$VENV"; then
        echo "error: $PYTHON cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2
        exit 1
    fi
}

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# An environment that is already there keeps its interpreter: another one that is named would go unnoticed.
check_environment() {
    [[ -n "$NAMED_PYTHON" && -x "$VENV/bin/python" ]] || return 0
    local wanted found
    find_python
    wanted="$(version_of "$PYTHON")"
    found="$(version_of "$VENV/bin/python")"
    if [[ "$wanted" != "$found" ]]; then
        echo "error: PYTHON=$PYTHON is Python $wanted, and VENV=$VENV has Python $found: name another VENV, or remove it" >&2
        exit 1
    fi
}

install_package() {
    local torch pip=("$VENV/bin/python" -m pip install --no-input --disable-pip-version-check)
    torch="$(grep '^torch==' "$ROOT/constraints.txt")"
    echo "Python $(version_of "$VENV/bin/python"): installing $torch (about 200 MB for CPUs, 3 GB for GPUs) ..."
    # torch first and alone: whichever build (CPU or CUDA) the machine offers for this version stays.
    telling_the_time "$torch" "${pip[@]}" "$torch"
    echo "installing megatron-sstoken, megatron-core and what else they need ..."
    telling_the_time megatron-sstoken "${pip[@]}" --constraint "$ROOT/constraints.txt" --editable "${ROOT}[dev]"
    "$VENV/bin/python" -m pip list --disable-pip-version-check 2>/dev/null |
        grep -E '^(torch|megatron-core|transformers) ' || true
}

# pip is silent while it downloads and unpacks: a line every 20 seconds tells that it is at work.
telling_the_time() {
    local what="$1" start=$SECONDS code=0 clock
    shift
    while sleep 20 >/dev/null 2>&1; do echo "  ... installing $what for $((SECONDS - start)) s"; done 9>&- &
    clock=$!
    "$@" | without_what_is_there || code=$?
    kill "$clock"
    wait "$clock" 2>/dev/null || true
    ((code == 0)) && echo "$what: installed in $((SECONDS - start)) s"
    return "$code"
}

without_what_is_there() { grep --line-buffered -v '^Requirement already satisfied\|^  Preparing\|^  Getting' || true; }

# What the installation depends on; the stamp holds it once all of it has been installed.
installation() {
    echo "$ROOT"
    cat "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/megatron_sstoken/supported.py" | sha256sum
}

mkdir -p "$(dirname "$VENV")"
(
    check_environment
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
