#!/usr/bin/env bash
# Train GPT2-MoE-Medium with ScMoE on all GPUs of this machine.
#
#   DATA_PATH=/data/text_document TOKENIZER_MODEL=/data/gpt2 CHECKPOINT_DIR=/runs/medium ./train.sh
#   ... ./train.sh --dry-run                 # print the command, do not run it
#   ... ./train.sh -- --train-iters 10       # flags behind -- go to pretrain_gpt_scmoe.py
set -euo pipefail

PROGRAM=train.sh
EXAMPLE_DIR=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
# shellcheck source=launch.sh
source "$EXAMPLE_DIR/launch.sh"
parse_command_line "$@"

if [[ -z ${GPUS_PER_NODE:-} ]]; then
    GPUS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || GPUS_PER_NODE=0
    if ((GPUS_PER_NODE == 0)); then
        [[ -n $DRY_RUN ]] || fail "no GPU found by nvidia-smi; GPUS_PER_NODE sets their number"
        echo "$PROGRAM: no GPU here: the command is for 8" >&2
        GPUS_PER_NODE=8
    fi
fi
prepare

launcher=(torchrun --standalone --nproc-per-node "$GPUS_PER_NODE")
if ((${#ENVIRONMENT[@]})); then
    launcher=(env "${ENVIRONMENT[@]}" "${launcher[@]}")
fi
run_or_print "${launcher[@]}" "${PRETRAIN_SCRIPT:-$REPO_DIR/pretrain_gpt_scmoe.py}" \
    "${PRETRAIN_FLAGS[@]}" "${EXTRA_FLAGS[@]}"
