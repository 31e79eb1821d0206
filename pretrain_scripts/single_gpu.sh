#!/usr/bin/env bash
# Fine-tune on one GPU, whatever layout the configuration has for more of them.
#
#   bash pretrain_scripts/single_gpu.sh Llama-3.2-1B [--section.key=value …] [--dry_run]
#
# All of AdamW's state fits 80 GB up to about 3 billion parameters. VENV, MAX_RESTARTS, LOGS, CLUSTER_ENV: see launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

ONE=(--parallel.tensor=1 --parallel.pipeline=1 --parallel.virtual_pipeline=1 --parallel.context=1 --parallel.sequence=false)
[[ "${1:-}" == preflight ]] && ONE=()
launch 1 --standalone --nproc-per-node=1 -- "${1:-}" "${ONE[@]}" "${@:2}"
