#!/usr/bin/env bash
# Sourced by the launchers: finds the configuration and starts the processes, or checks the plan with --dry_run.
#
# VENV: folder of the virtual environment (default: .venv in the repository); without one, python is PATH's.
set -euo pipefail

# sbatch runs a copy of its script from elsewhere, and names the folder that it was submitted from.
ROOT="${SSTOKEN_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
VENV="${VENV:-$ROOT/.venv}"
[[ -d "$VENV/bin" ]] && export PATH="$VENV/bin:$PATH"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# megatron's tensor parallel overlaps communication by the order of kernels in one queue.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# launch NUM_PROCESSES TORCHRUN_ARGUMENT… -- CONFIG SETTING…
#   CONFIG: a name of pretrain_scripts/configs, or a YAML file.
launch() {
    local num_processes="$1" torchrun=()
    shift
    while [[ "$1" != -- ]]; do
        torchrun+=("$1")
        shift
    done
    shift
    local config="${1:-}" configs="$ROOT/pretrain_scripts/configs"
    [[ -f "$config" ]] || config="$configs/$config.yaml"
    if [[ ! -f "$config" ]]; then
        echo "error: name a configuration, one of $(basename -s .yaml -a "$configs"/*.yaml | xargs), or a YAML file" >&2
        exit 2
    fi
    config="$(realpath "$config")"
    shift
    cd "$ROOT"
    if [[ " $* " == *" --dry_run "* ]]; then
        exec python -m megatron_sstoken.train --config "$config" "$@" --world_size="$num_processes"
    fi
    exec python -m torch.distributed.run "${torchrun[@]}" -m megatron_sstoken.train --config "$config" "$@"
}
