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

# check_layout RANKS: whether experts, blocks, heads and batch can be divided as the run is told.
check_layout() {
    local ranks=$1 experts layers heads unit=2 model data SIZE GIVEN
    local tensor='' stages='' expert='' micro='' batch=''  # sizes
    local of_tensor of_stages of_expert of_micro of_batch  # how they were given
    experts=$(flag_value --num-experts)
    layers=$(flag_value --num-layers)
    heads=$(flag_value --num-attention-heads)
    [[ $(flag_value --moe-layer-freq) == *,* && -z ${BASELINE:-} ]] || unit=1
    read_size TENSOR_PARALLEL --tensor-model-parallel-size && tensor=$SIZE of_tensor=$GIVEN
    read_size PIPELINE_PARALLEL --pipeline-model-parallel-size && stages=$SIZE of_stages=$GIVEN
    read_size EXPERT_PARALLEL --expert-model-parallel-size && expert=$SIZE of_expert=$GIVEN
    read_size MICRO_BATCH_SIZE --micro-batch-size && micro=$SIZE of_micro=$GIVEN
    read_size GLOBAL_BATCH_SIZE --global-batch-size && batch=$SIZE of_batch=$GIVEN
    [[ -n $tensor && -n $stages && -n $expert && -n $micro && -n $batch ]] || return 0
    model=$((tensor * stages))
    data=$((ranks / model))

    if ((experts % expert)); then
        wrong "$of_expert: accepted: a divisor of the $experts experts"
    fi
    if ((ranks % model)); then
        wrong "$of_tensor $of_stages: accepted: a product that divides the $ranks ranks"
        return
    fi
    if ((ranks % (expert * stages))); then
        wrong "$of_expert $of_stages: accepted: a product that divides the $ranks ranks"
    fi
    if ((layers % (unit * stages))); then
        wrong "$of_stages: accepted: a divisor of $((layers / unit)), the \
$( ((unit == 2)) && echo "pairs of " )blocks"
    fi
    if ((heads % tensor)); then
        wrong "$of_tensor: accepted: a divisor of the $heads attention heads"
    fi
    if ((batch % (micro * data))); then
        wrong "$of_batch: accepted: a multiple of $((micro * data)), \
$of_micro on each of $data data-parallel ranks"
    fi
}

# read_size VARIABLE FLAG: set SIZE to what the run is told last, and GIVEN to how it was said.
read_size() {
    SIZE=$(flag_value "$2")
    GIVEN="$1=$SIZE"
    [[ " ${EXTRA_FLAGS[*]} " != *" $2 "* ]] || GIVEN="$2 $SIZE"
    if [[ ! $SIZE =~ ^[1-9][0-9]*$ ]]; then
        wrong "$GIVEN: accepted: a whole number, 1 or more"
        return 1
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
    local words word suffix script folder=$CHECKPOINT_DIR hint="CHECK_FILES=0 if only the nodes see it"
    if [[ ${MOCK_DATA:-} != 1 ]]; then
        read -r -a words <<<"$DATA_PATH"
        for word in "${words[@]}"; do
            [[ ! $word =~ ^[0-9.]+([eE][+-]?[0-9]+)?$ ]] || continue  # a weight of a blend
            for suffix in bin idx; do
                [[ -f $word.$suffix ]] || wrong "DATA_PATH: no file $word.$suffix here; $hint"
            done
        done
        [[ -e $TOKENIZER_MODEL ]] || wrong "TOKENIZER_MODEL: no $TOKENIZER_MODEL here; $hint"
    fi
    [[ -z ${PRETRAINED:-} || -e $PRETRAINED ]] || wrong "PRETRAINED: no $PRETRAINED here; $hint"
    script=${PRETRAIN_SCRIPT:-$REPO_DIR/$SCRIPT}
    if [[ -z ${CONTAINER_IMAGE:-} && ! -f $script ]]; then  # a container has its own
        word=REPO_DIR
        [[ -z ${PRETRAIN_SCRIPT:-} ]] || word=PRETRAIN_SCRIPT
        wrong "$word: no $script here; $hint"
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
