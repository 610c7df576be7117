#!/usr/bin/env bash
# Train LongCat-Flash with ScMoE on all GPUs of this machine; ../README.md has the variables.
#
#   DATA_PATH=/data/text_document TOKENIZER_MODEL=/data/tokenizer CHECKPOINT_DIR=/runs/longcat ./train.sh
#   ... ./train.sh --dry-run                 # check, print the command, do not run it
#   ... ./train.sh -- --train-iters 10       # flags behind -- go to pretrain_gpt_scmoe.py
#   REHEARSAL=1 MOCK_DATA=1 CHECKPOINT_DIR=/tmp/try ./train.sh   # a small model of its kind, on two GPUs
set -euo pipefail

PROGRAM=train.sh
EXAMPLE_DIR=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
# shellcheck source=../launch.sh
source "$EXAMPLE_DIR/../launch.sh"
parse_command_line "$@"
run_here
