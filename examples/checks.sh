# shellcheck shell=bash  # sourced by launch.sh
#
# What cannot work is said before anything is started, on the login node too: the layout of ranks, the
# files and the folder to write. Each error is a line; all of them are said at once.

# check_recipe RANKS: stop if the flags cannot be laid out on so many ranks, or a file is missing.
check_recipe() {
    local errors=0
    check_layout "$1"
    [[ ${CHECK_FILES:-1} == 0 ]] || check_files
    ((errors == 0)) || exit 2
}

# wrong MESSAGE: say it, and count it in check_recipe's `errors`.
wrong() {
    complain "$1"
    errors=$((errors + 1))
}

# check_layout RANKS: whether experts, blocks, heads and batch can be divided as the variables say.
check_layout() {
    local ranks=$1 experts layers heads unit=2 stages=$PIPELINE_PARALLEL model data
    experts=$(flag_value --num-experts)
    layers=$(flag_value --num-layers)
    heads=$(flag_value --num-attention-heads)
    [[ $(flag_value --moe-layer-freq) == *,* && -z ${BASELINE:-} ]] || unit=1
    model=$((TENSOR_PARALLEL * stages))
    data=$((ranks / model))

    if ((experts % EXPERT_PARALLEL)); then
        wrong "EXPERT_PARALLEL=$EXPERT_PARALLEL: accepted: a divisor of the $experts experts"
    fi
    if ((ranks % model)); then
        wrong "TENSOR_PARALLEL=$TENSOR_PARALLEL PIPELINE_PARALLEL=$stages: accepted: a product that \
divides the $ranks ranks"
        return
    fi
    if ((ranks % (EXPERT_PARALLEL * stages))); then
        wrong "EXPERT_PARALLEL=$EXPERT_PARALLEL PIPELINE_PARALLEL=$stages: accepted: a product that \
divides the $ranks ranks"
    fi
    if ((layers % (unit * stages))); then
        wrong "PIPELINE_PARALLEL=$stages: accepted: a divisor of $((layers / unit)), the \
$( ((unit == 2)) && echo "pairs of " )blocks"
    fi
    if ((heads % TENSOR_PARALLEL)); then
        wrong "TENSOR_PARALLEL=$TENSOR_PARALLEL: accepted: a divisor of the $heads attention heads"
    fi
    if ((GLOBAL_BATCH_SIZE % (MICRO_BATCH_SIZE * data))); then
        wrong "GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE: accepted: a multiple of $((MICRO_BATCH_SIZE * data)), \
MICRO_BATCH_SIZE=$MICRO_BATCH_SIZE on each of $data data-parallel ranks"
    fi
}

# flag_value FLAG: the word behind the last FLAG of the run.
flag_value() {
    local words=("${PRETRAIN_FLAGS[@]}" "${EXTRA_FLAGS[@]}") i
    for ((i = ${#words[@]} - 2; i >= 0; i--)); do
        if [[ ${words[i]} == "$1" ]]; then
            echo "${words[i + 1]}"
            return
        fi
    done
}

# check_files: whether data and tokenizer are there, and checkpoints can be written.
check_files() {
    local words word suffix folder=$CHECKPOINT_DIR hint="CHECK_FILES=0 if only the nodes see it"
    if [[ ${MOCK_DATA:-} != 1 ]]; then
        read -r -a words <<<"$DATA_PATH"
        for word in "${words[@]}"; do
            [[ ! $word =~ ^[0-9.]+([eE][+-]?[0-9]+)?$ ]] || continue  # a weight of a blend
            for suffix in bin idx; do
                [[ -f $word.$suffix ]] || wrong "DATA_PATH: no file $word.$suffix here; $hint"
            done
        done
        [[ -z ${PRETRAINED:-} || -e $PRETRAINED ]] || wrong "PRETRAINED: no $PRETRAINED here; $hint"
        [[ -e $TOKENIZER_MODEL ]] || wrong "TOKENIZER_MODEL: no $TOKENIZER_MODEL here; $hint"
    fi
    while [[ ! -e $folder && $folder == */* ]]; do  # what is not there yet will be made
        folder=${folder%/*}
    done
    : "${folder:=/}"
    [[ -e $folder ]] || folder=.
    if [[ ! -d $folder ]]; then
        wrong "CHECKPOINT_DIR=$CHECKPOINT_DIR: $folder is no folder; $hint"
    elif [[ ! -w $folder ]]; then
        wrong "CHECKPOINT_DIR=$CHECKPOINT_DIR: $folder cannot be written; $hint"
    fi
}
