#!/usr/bin/env bash
# Fine-tune on the GPUs of one machine.
#
#   bash pretrain_scripts/node.sh Llama-3.1-8B [--section.key=value …] [--dry_run]
#   bash pretrain_scripts/node.sh preflight [--folder runs]       # looks at the GPUs, their links and the disk
#
# GPUS: how many (default: 8). VENV, MAX_RESTARTS, LOGS, CLUSTER_ENV: see launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

GPUS="${GPUS:-8}"
launch "$GPUS" --standalone --nproc-per-node="$GPUS" -- "$@"
