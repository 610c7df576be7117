#!/usr/bin/env bash
# Train GPT3-MoE-XL with ScMoE on all GPUs of this machine; ../README.md has the variables.
#
#   DATA_PATH=/data/text_document TOKENIZER_MODEL=/data/tokenizer CHECKPOINT_DIR=/runs/gpt3_moe_xl ./train.sh
#   ... ./train.sh --dry-run                 # check, print the command, do not run it
#   ... ./train.sh -- --train-iters 10       # flags behind -- go to pretrain_gpt_scmoe.py
#   BASELINE=top2 ... ./train.sh             # Megatron's own model of the same active size
set -euo pipefail

PROGRAM=train.sh
EXAMPLE_DIR=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
# shellcheck source=../launch.sh
source "$EXAMPLE_DIR/../launch.sh"
parse_command_line "$@"
run_here
