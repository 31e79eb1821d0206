#!/usr/bin/env bash
# Sourced by the launchers: finds the configuration and starts the processes, or checks the plan with --dry_run. The folder of
# the caller stays: relative paths, of settings too, mean it.
#
# VENV: folder of the virtual environment (default: .venv in the repository); without one, python is PATH's.
# MAX_RESTARTS: how often processes that fail are started again, from the newest checkpoint (default: 0); never after a mistake
# in the settings. LOGS: folder where the output of every process is also appended to a file of its own (default: none).
# STOPPED_CODE: exit code of a run that a signal has stopped (default: 128 + the signal's number).
# CLUSTER_ENV: a file of variables for this cluster (default: cluster.env beside this script, if there is one).
set -euo pipefail

ROOT="${SSTOKEN_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
if [[ -n "${CLUSTER_ENV:-}" && ! -f "$CLUSTER_ENV" ]]; then
    echo "error: CLUSTER_ENV=$CLUSTER_ENV is not a file: copy pretrain_scripts/cluster.env.example, or unset it" >&2
    exit 2
fi
CLUSTER_ENV="${CLUSTER_ENV:-$ROOT/pretrain_scripts/cluster.env}"
if [[ -f "$CLUSTER_ENV" ]]; then
    set -a
    # shellcheck source=/dev/null
    source "$CLUSTER_ENV"
    set +a
fi

VENV="${VENV:-$ROOT/.venv}"
[[ -d "$VENV/bin" ]] && export PATH="$VENV/bin:$PATH"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# megatron's tensor parallel overlaps communication by the order of kernels in one queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# launch NUM_PROCESSES TORCHRUN_ARGUMENT… -- CONFIG SETTING…
#   CONFIG: a name of pretrain_scripts/configs, or a YAML file. `preflight` instead looks at the machines that would run.
launch() {
    local num_processes="$1" torchrun=(--max-restarts="${MAX_RESTARTS:-0}" --need-gpus)
    [[ -z "${LOGS:-}" ]] || torchrun+=(--logs="$LOGS")
    [[ -z "${STOPPED_CODE:-}" ]] || torchrun+=(--stopped-code="$STOPPED_CODE")
    shift
    while [[ "$1" != -- ]]; do
        torchrun+=("$1")
        shift
    done
    shift
    if [[ "${1:-}" == preflight ]]; then
        exec python -m megatron_sstoken.launch "${torchrun[@]}" -m megatron_sstoken.preflight "${@:2}"
    fi
    local config="${1:-}" configs="$ROOT/pretrain_scripts/configs"
    [[ -f "$config" ]] || config="$configs/$config.yaml"
    if [[ ! -f "$config" ]]; then
        echo "error: name a configuration, one of $(basename -s .yaml -a "$configs"/*.yaml | xargs), or a YAML file" >&2
        exit 2
    fi
    shift
    if [[ " $* " == *" --dry_run "* ]]; then
        exec python -m megatron_sstoken.train --config "$config" "$@" --world_size="$num_processes"
    fi
    exec python -m megatron_sstoken.launch "${torchrun[@]}" -m megatron_sstoken.train --config "$config" "$@"
}
