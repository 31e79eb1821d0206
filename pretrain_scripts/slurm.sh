#!/usr/bin/env bash
# Fine-tune on a Slurm cluster. Relative paths mean the folder that it is submitted from.
#
#   sbatch --nodes=2 pretrain_scripts/slurm.sh Llama-3.1-8B [--section.key=value …]
#   sbatch --nodes=2 pretrain_scripts/slurm.sh preflight [--folder runs]       # looks at the machines before a long run
#   NNODES=16 bash pretrain_scripts/slurm.sh Llama-3.1-70B --dry_run        # checks the plan, needs no Slurm
#
# Five minutes before its time is up the job saves, ends, and queues itself again, to go on from there; when it is preempted or
# loses a machine, Slurm queues it again. It stays in the queue no longer once it has ended by itself: done, or with an error.
#
# SSTOKEN_ROOT: the repository, where sbatch is called from elsewhere. LOGS: folder for the output of each process (default:
# sstoken-JOB beside the job's log). MAX_RESTARTS: within one job (default: 3). GPUS: a machine (default: what Slurm gives).
# CONTAINER_IMAGE, CONTAINER_MOUNTS: run in a container with Pyxis (see container/). VENV, CLUSTER_ENV: see launch.sh.
#SBATCH --job-name=sstoken
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=sstoken-%j.log
#SBATCH --open-mode=append
set -euo pipefail

# sbatch runs a copy of its script from elsewhere: what it was called as stands in the job's record.
find_root() {
    local script="${BASH_SOURCE[0]}"
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        script="$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')"
    fi
    (cd "$(dirname "$script")/.." && pwd)
}

if [[ -z "${SSTOKEN_ROOT:-}" ]]; then
    SSTOKEN_ROOT="$(find_root)"
fi
export SSTOKEN_ROOT
if [[ ! -f "$SSTOKEN_ROOT/pretrain_scripts/nodes.sh" ]]; then
    echo "error: SSTOKEN_ROOT=$SSTOKEN_ROOT does not hold pretrain_scripts/nodes.sh: set it to the folder of the repository" >&2
    exit 2
fi
if [[ " $* " == *" --dry_run "* ]]; then
    exec bash "$SSTOKEN_ROOT/pretrain_scripts/nodes.sh" "$@"
fi
: "${SLURM_JOB_ID:?submit this script with sbatch, or give --dry_run}"
source "$SSTOKEN_ROOT/pretrain_scripts/launch.sh" # for cluster.env, which may name a container

export NNODES="$SLURM_JOB_NUM_NODES" RUN_ID="$SLURM_JOB_ID" GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-8}}"
export MAX_RESTARTS="${MAX_RESTARTS:-3}" LOGS="${LOGS:-$PWD/sstoken-$SLURM_JOB_ID}"
# Another port for each job, below those that Linux gives to connections (32768 and up).
export MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}"
machines="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${machines%%$'\n'*}"

container=()
if [[ -n "${CONTAINER_IMAGE:-}" ]]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD")
    container+=(--container-mounts="$SSTOKEN_ROOT:$SSTOKEN_ROOT,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    export VENV=/none # the container has its own python
fi

is_time_up=
# shellcheck disable=SC2329
save_and_queue_again() {
    is_time_up=1
    echo "$(date --iso-8601=seconds): the time of job $SLURM_JOB_ID is nearly up: saving"
    scancel --signal=TERM "$SLURM_JOB_ID" # its steps, not this script
}
trap save_and_queue_again USR1
trap true TERM # preempted or cancelled: Slurm has told the steps as well, and this script waits for them

# srun ends all machines when one ends badly: a machine that has stopped as it was asked to must not.
export STOPPED_CODE=0
# One task a machine, which starts its processes, on all of its cores; SLURM_NODEID is known inside the task only.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpu-bind=none "${container[@]}" \
    bash -c 'NODE_RANK="$SLURM_NODEID" exec bash "$SSTOKEN_ROOT/pretrain_scripts/nodes.sh" "$@"' nodes "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal to this script ends the waiting, not the step
    code=0
    wait "$step" || code=$?
done
if [[ -n "$is_time_up" ]] && ((code != 2)); then
    echo "$(date --iso-8601=seconds): queueing job $SLURM_JOB_ID again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
