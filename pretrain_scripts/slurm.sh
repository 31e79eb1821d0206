#!/usr/bin/env bash
# Fine-tune on a Slurm cluster; submit it from the root of the repository.
#
#   sbatch --nodes=2 pretrain_scripts/slurm.sh Llama-3.1-8B [--section.key=value …]
#   NNODES=16 bash pretrain_scripts/slurm.sh Llama-3.1-70B --dry_run        # checks the plan, needs no Slurm
#
# Five minutes before its time is up, and when it is preempted, the job saves and ends; the same line goes on from there
# (--requeue has Slurm do it after a preemption).
#SBATCH --job-name=sstoken
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=sstoken-%j.log
set -euo pipefail

export SSTOKEN_ROOT="${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
if [[ " $* " == *" --dry_run "* ]]; then
    exec bash "$SSTOKEN_ROOT/pretrain_scripts/nodes.sh" "$@"
fi
: "${SLURM_JOB_ID:?submit this script with sbatch, or give --dry_run}"
export NNODES="$SLURM_JOB_NUM_NODES" RUN_ID="$SLURM_JOB_ID"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# What a run asked to stop has for its last step and its checkpoint, before torchrun kills it (seconds; torch's own is 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-180}"
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# One task a machine, which is torchrun; SLURM_NODEID is known inside the task only.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$SSTOKEN_ROOT/pretrain_scripts/nodes.sh" "$@"' nodes "$@"
