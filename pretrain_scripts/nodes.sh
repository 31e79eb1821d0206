#!/usr/bin/env bash
# Fine-tune on several machines: start the same line on each of them, with its own NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash pretrain_scripts/nodes.sh Llama-3.1-8B [--section.key=value …] [--dry_run]
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash pretrain_scripts/nodes.sh preflight [--folder runs]    # looks at the machines
#
# NNODES: machines (default: 2). NODE_RANK: number of this one; the rendezvous is on machine 0. MASTER_ADDR, MASTER_PORT:
# where the others reach machine 0 (default port: 29500). GPUS: processes a machine (default: 8). RUN_ID: tells runs apart
# that share machine and port. VENV, MAX_RESTARTS, LOGS, CLUSTER_ENV: see launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

GPUS="${GPUS:-8}"
NNODES="${NNODES:-2}"
if [[ " $* " != *" --dry_run "* ]]; then
    : "${NODE_RANK:?set NODE_RANK to the number of this machine, from 0}"
    : "${MASTER_ADDR:?set MASTER_ADDR to the name or address of machine 0}"
fi
# Whether this machine is the one named by MASTER_ADDR cannot always be told from its name: so it is said.
is_host="$([[ "${NODE_RANK:-0}" == 0 ]] && echo true || echo false)"
launch $((NNODES * GPUS)) --nnodes="$NNODES" --nproc-per-node="$GPUS" --rdzv-id="${RUN_ID:-sstoken}" --rdzv-backend=c10d \
    --rdzv-endpoint="${MASTER_ADDR:-}:${MASTER_PORT:-29500}" --rdzv-conf="is_host=$is_host" -- "$@"
