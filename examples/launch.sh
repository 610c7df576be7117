# shellcheck shell=bash disable=SC2034  # sourced by train.sh and train.sbatch
#
# What the recipes' train.sh and train.sbatch share: the command line, required variables, the flags
# that name data and folders, and "run it or print it" on this machine. slurm.sh runs it on all nodes of
# a job, checks.sh says what cannot work. Nothing about the model stands here. PROGRAM is the name of
# the script in messages, EXAMPLE_DIR the folder with config.sh.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    echo "launch.sh: error: it runs nothing by itself; accepted: train.sh or train.sbatch" >&2
    exit 2
fi

: "${REPO_DIR:=$(realpath "$EXAMPLE_DIR/../..")}"
# shellcheck source=checks.sh
source "$EXAMPLE_DIR/../checks.sh"
# shellcheck source=training.sh
source "$EXAMPLE_DIR/../training.sh"
# shellcheck source=slurm.sh
source "$EXAMPLE_DIR/../slurm.sh"

DRY_RUN=
EXTRA_FLAGS=()

complain() {
    echo "$PROGRAM: error: $1" >&2
}

fail() {
    complain "$1"
    exit 2
}

# parse_command_line WORD...: set DRY_RUN and EXTRA_FLAGS.
parse_command_line() {
    while (($#)); do
        case $1 in
            --dry-run) DRY_RUN=1 ;;
            -h | --help)
                echo "usage: [VARIABLE=VALUE ...] $PROGRAM [--dry-run] [-- FLAG ...]"
                echo "  --dry-run  print the command, resolved and quoted, and do not run it"
                echo "  FLAG ...   go to pretrain_gpt_scmoe.py, behind the example's own flags"
                echo "variables: $(realpath "$EXAMPLE_DIR/..")/README.md"
                exit 0
                ;;
            --)
                shift
                EXTRA_FLAGS=("$@")
                return
                ;;
            *) fail "$1: accepted: --dry-run, --help, and flags for the training behind --" ;;
        esac
        shift
    done
}

# require NAME MEANING ...: stop with a line for each variable that is not set.
require() {
    local missing=
    while (($#)); do
        if [[ -z ${!1:-} ]]; then
            complain "$1 is not set: $2"
            missing=1
        fi
        shift 2
    done
    [[ -z $missing ]] || exit 2
}

# require_counts NAME ...: stop at a variable that is set to anything but 1 or more.
require_counts() {
    local name
    for name; do
        if [[ -n ${!name:-} && ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
            fail "$name=${!name}: accepted: a whole number, 1 or more"
        fi
    done
}

# require_numbers NAME ...: stop at a variable that is set to anything but a number of 0 or more.
require_numbers() {
    local name
    for name; do
        if [[ -n ${!name:-} && ! ${!name} =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$ ]]; then
            fail "$name=${!name}: accepted: a number, such as 3e-4"
        fi
    done
}

# require_switches NAME ...: stop at a variable that is set to anything but 0 or 1.
require_switches() {
    local name
    for name; do
        [[ ${!name:-0} =~ ^[01]$ ]] || fail "$name=${!name}: accepted: 0, 1"
    done
}

# prepare: check the variables, read config.sh, set PRETRAIN_FLAGS and ENVIRONMENT.
prepare() {
    local word
    require_switches MOCK_DATA CHECK_FILES ASYNC_SAVE SKIP_DAMAGED REQUEUE REHEARSAL
    if [[ ${MOCK_DATA:-} == 1 ]]; then
        require CHECKPOINT_DIR "the folder to save checkpoints in and to resume from"
    else
        require \
            DATA_PATH "the tokenised data, without .bin and .idx (or MOCK_DATA=1 for none)" \
            TOKENIZER_MODEL "a SentencePiece .model file, or a Hugging Face tokenizer's folder" \
            CHECKPOINT_DIR "the folder to save checkpoints in and to resume from"
    fi
    require_counts GPUS_PER_NODE NUM_EXPERTS MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE TRAIN_ITERS \
        TENSOR_PARALLEL PIPELINE_PARALLEL EXPERT_PARALLEL SAVE_INTERVAL EVAL_INTERVAL MASTER_PORT
    [[ ${NUM_WORKERS:-0} =~ ^[0-9]+$ ]] || fail "NUM_WORKERS=$NUM_WORKERS: accepted: a whole number, 0 or more"
    [[ ${RESTARTS:-0} =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS: accepted: a whole number, 0 or more"
    require_numbers LEARNING_RATE MIN_LEARNING_RATE
    [[ ${DATA_SPLIT:-1} =~ ^[0-9.]+(,[0-9.]+){0,2}$ ]] ||
        fail "DATA_SPLIT=$DATA_SPLIT: accepted: shares of training, validation and test, such as 989,10,1"
    ((${MASTER_PORT:-1} < 65536)) || fail "MASTER_PORT=$MASTER_PORT: accepted: 1 to 65535"

    SCRIPT=pretrain_gpt_scmoe.py
    if [[ -n ${BASELINE:-} ]]; then
        SCRIPT=examples/pretrain_baseline.py
        [[ $BASELINE =~ ^(top2|shared)$ ]] || fail "BASELINE=$BASELINE: accepted: top2, shared"
    fi
    OWN_VARIABLES=()
    # shellcheck source=gpt2_moe_medium/config.sh
    source "$EXAMPLE_DIR/config.sh"
    for word in PRETRAINED REHEARSAL; do
        [[ -z ${!word:-} || ${!word} == 0 || " ${OWN_VARIABLES[*]} " == *" $word "* ]] ||
            fail "$word=${!word}: this recipe does not read it; accepted: leave it out, or longcat_flash"
    done
    set_training_flags
    set_run_flags
    PRETRAIN_FLAGS=(
        "${MODEL_FLAGS[@]}" "${OPTIMIZER_FLAGS[@]}" "${KERNEL_FLAGS[@]}" "${PARALLEL_FLAGS[@]}"
        "${RUN_FLAGS[@]}"
    )
    # The run of ScMoE chooses what makes it fast; Megatron's own model has to be told.
    if [[ -z ${BASELINE:-} ]]; then
        PRETRAIN_FLAGS+=("${SCMOE_FLAGS[@]}")
    elif [[ " ${KERNEL_FLAGS[*]} " == *" transformer_engine "* ]]; then
        PRETRAIN_FLAGS+=(
            --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion
            --cross-entropy-loss-fusion --cross-entropy-fusion-impl native
            --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        )
    fi
    ENVIRONMENT=()
    [[ -z ${EXTRA_ENV:-} ]] || read -r -a ENVIRONMENT <<<"$EXTRA_ENV"
    for word in "${ENVIRONMENT[@]}"; do
        [[ $word =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
            fail "EXTRA_ENV: $word: accepted: words such as NCCL_DEBUG=INFO"
    done
    if ((TENSOR_PARALLEL > 1)); then
        ENVIRONMENT+=(CUDA_DEVICE_MAX_CONNECTIONS=1)  # Megatron asks for it, up to Hopper
    fi
}

# read_shape NAME: set SHAPE_FLAGS, the sizes of a shape of the benchmarks, with NUM_EXPERTS experts.
read_shape() {
    local words
    words=$(python3 "$EXAMPLE_DIR/../shape_flags.py" "$1" --system "${BASELINE:-scmoe}" \
        --experts "$NUM_EXPERTS") || exit 2
    mapfile -t SHAPE_FLAGS <<<"$words"
}

# set_run_flags: set RUN_FLAGS, what this run reads, writes and logs.
set_run_flags() {
    local data
    : "${SAVE_INTERVAL:=1000}" "${EVAL_INTERVAL:=500}" "${ASYNC_SAVE:=1}" "${SKIP_DAMAGED:=0}"
    if [[ ${MOCK_DATA:-} == 1 ]]; then
        RUN_FLAGS=(--mock-data --tokenizer-type NullTokenizer --vocab-size "$VOCABULARY")
    else
        read -r -a data <<<"$DATA_PATH"  # a prefix, or a blend: weight prefix weight prefix ...
        if [[ $TOKENIZER_MODEL == *.model ]]; then
            : "${TOKENIZER_TYPE:=SentencePieceTokenizer}"
        else
            : "${TOKENIZER_TYPE:=HuggingFaceTokenizer}"
        fi
        RUN_FLAGS=(
            --data-path "${data[@]}"
            --data-cache-path "${DATA_CACHE_DIR:-$CHECKPOINT_DIR/data_cache}"
            --tokenizer-type "$TOKENIZER_TYPE"
            --tokenizer-model "$TOKENIZER_MODEL"
        )
    fi
    RUN_FLAGS+=(
        --split "${DATA_SPLIT:-989,10,1}"
        --num-workers "${NUM_WORKERS:-4}"
        --save "$CHECKPOINT_DIR"
        --load "$CHECKPOINT_DIR"
        --save-interval "$SAVE_INTERVAL"
        --ckpt-format torch_dist
        --eval-interval "$EVAL_INTERVAL"
        --eval-iters 20
        --log-interval 10
        --log-throughput
        --tensorboard-dir "${TENSORBOARD_DIR:-$CHECKPOINT_DIR/tensorboard}"
    )
    if [[ $ASYNC_SAVE == 1 && -z ${BASELINE:-} ]]; then
        RUN_FLAGS+=(--async-save --async-strategy mcore)  # Megatron's own writer: it was tried
    fi
    if [[ $SKIP_DAMAGED == 1 && -z ${BASELINE:-} ]]; then
        RUN_FLAGS+=(--scmoe-damaged-checkpoint skip)
    fi
}

# set_launch_words: set LAUNCH_WORDS, the launcher of a node's ranks and what it always gets.
set_launch_words() {
    : "${LAUNCHER:=torchrun}" "${RESTARTS:=3}"
    case $LAUNCHER in
        torchrun) LAUNCH_WORDS=(torchrun) ;;
        ft_launcher)  # of nvidia-resiliency-ext: ends ranks that hang, and starts all of them again
            : "${FT_TIMEOUTS:=setup:1800,step:600,checkpointing:1800}"
            LAUNCH_WORDS=(
                ft_launcher
                --max-restarts "$RESTARTS"
                --ft-rank-section-timeouts "$FT_TIMEOUTS"
                --ft-rank-out-of-section-timeout 1800
            )
            PRETRAIN_FLAGS+=(--enable-ft-package --calc-ft-timeouts)
            ;;
        *) fail "LAUNCHER=$LAUNCHER: accepted: torchrun, ft_launcher" ;;
    esac
}

# run_here: train on all GPUs of this machine.
run_here() {
    local launcher
    if [[ -z ${GPUS_PER_NODE:-} ]]; then
        GPUS_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || GPUS_PER_NODE=0
        if ((GPUS_PER_NODE == 0)); then
            [[ -n $DRY_RUN ]] || fail "no GPU found by nvidia-smi; GPUS_PER_NODE sets their number"
            echo "$PROGRAM: no GPU here: the command is for 8" >&2
            GPUS_PER_NODE=8
        fi
    fi
    prepare
    check_recipe "$GPUS_PER_NODE"
    set_launch_words
    launcher=("${LAUNCH_WORDS[@]}" --standalone --nproc-per-node "$GPUS_PER_NODE")
    if ((${#ENVIRONMENT[@]})); then
        launcher=(env "${ENVIRONMENT[@]}" "${launcher[@]}")
    fi
    run_or_print exec "${launcher[@]}" "${PRETRAIN_SCRIPT:-$REPO_DIR/$SCRIPT}" "${PRETRAIN_FLAGS[@]}" \
        "${EXTRA_FLAGS[@]}"
}

# run_or_print HOW WORD ...: run the command by HOW, or with --dry-run print it in one line.
run_or_print() {
    local how=$1 word line=
    shift
    if [[ -z $DRY_RUN ]]; then
        "$how" "$@"
        return
    fi
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+="$word "
    done
    echo "${line% }"
    echo "$PROGRAM: --dry-run: that is the command; nothing was run" >&2
}
