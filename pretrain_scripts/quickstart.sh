#!/usr/bin/env bash
# The main job on a toy, from nothing: environment, data, history, fine-tuning on 2 processes, export, proof, and what other
# methods make of the same start.
#
#   bash pretrain_scripts/quickstart.sh
#
# WORK: folder for all that it makes (default: quickstart in the repository); a run before is replaced.
# PYTHON, VENV: see setup.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

WORK="$(realpath -m "${WORK:-$ROOT/quickstart}")" # the caller's folder is left below
MARK="$WORK/.made_by_quickstart"
if [[ -e "$WORK" && ! -e "$MARK" ]]; then
    echo "error: WORK=$WORK exists and was not made by quickstart.sh: name another folder" >&2
    exit 2
fi
rm -rf "$WORK"
mkdir -p "$WORK"
touch "$MARK"

cd "$ROOT"
export SSTOKEN_DEVICE=cpu OMP_NUM_THREADS=1 # so small a model wants no GPU, and two processes share the cores

say() { printf '\n== %s\n' "$1"; }

say "toy data, tokenizer, and a small Llama that has read other conversations"
python tools/make_toy.py --output "$WORK/toy"

say "prepare: chats to tokens and roles"
python tools/prepare_data.py --input "$WORK/toy/chat.jsonl" --tokenizer "$WORK/toy/model" --output "$WORK/train"
python tools/prepare_data.py --input "$WORK/toy/validation.jsonl" --tokenizer "$WORK/toy/model" --output "$WORK/validation"

DATA=(--config pretrain_scripts/configs/quickstart.yaml --model.hf_path="$WORK/toy/model"
    --data.train="$WORK/train" --data.validation="$WORK/validation")

say "fine-tune with ssToken, tensor parallel 2 (scores the history first)"
python -m megatron_sstoken.launch --standalone --nproc-per-node 2 -m megatron_sstoken.train "${DATA[@]}" \
    --checkpoint.directory="$WORK/run" --parallel.tensor=2

say "the same steps on every response token (full), and on as many drawn at random: one process each, side by side"
declare -A JOBS
trap 'kill "${JOBS[@]}" 2>/dev/null || true' EXIT
for method in full random; do
    python -m megatron_sstoken.train "${DATA[@]}" --selection.method="$method" --logging.directory="$WORK/$method/logs" \
        --checkpoint.save_every=0 --logging.records_every=0 >"$WORK/$method.txt" 2>&1 &
    JOBS[$method]=$!
done
for method in full random; do
    wait "${JOBS[$method]}" || { cat "$WORK/$method.txt" >&2; exit 1; }
    grep validation "$WORK/$method.txt" | tail -n 1 | sed "s/^/$method: /"
done
trap - EXIT

say "export to Hugging Face"
python tools/convert_checkpoint.py to-hf --checkpoint "$WORK/run" --output "$WORK/exported"

say "a page: which tokens were chosen, and whether that helped"
python tools/report_selection.py --run "$WORK/run" --compare "$WORK/full" "$WORK/random" --output "$WORK/report.html"

say "what happened"
python pretrain_scripts/quickstart_report.py --work "$WORK" --seconds "$SECONDS"
