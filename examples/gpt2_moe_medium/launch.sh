# shellcheck shell=bash disable=SC2034  # sourced by train.sh and train.sbatch
#
# What the examples' train.sh and train.sbatch share: the command line, required variables, the flags
# that name data and folders, and "run it or print it", here or on all nodes of a Slurm job. Nothing
# about the model stands here. PROGRAM is the name of the script in messages, EXAMPLE_DIR the folder
# with config.sh.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    echo "launch.sh: error: it runs nothing by itself; accepted: train.sh or train.sbatch" >&2
    exit 2
fi

: "${REPO_DIR:=$(realpath "$EXAMPLE_DIR/../..")}"
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
                echo "variables: $EXAMPLE_DIR/README.md"
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

# prepare: check the variables, read config.sh, set PRETRAIN_FLAGS and ENVIRONMENT.
prepare() {
    if [[ ${MOCK_DATA:-} == 1 ]]; then
        require CHECKPOINT_DIR "the folder to save checkpoints in and to resume from"
    else
        require \
            DATA_PATH "the tokenised data, without .bin and .idx (or MOCK_DATA=1 for none)" \
            TOKENIZER_MODEL "a SentencePiece .model file, or a Hugging Face tokenizer's folder" \
            CHECKPOINT_DIR "the folder to save checkpoints in and to resume from"
    fi
    require_counts GPUS_PER_NODE NUM_EXPERTS MICRO_BATCH_SIZE GLOBAL_BATCH_SIZE TRAIN_ITERS \
        TENSOR_PARALLEL PIPELINE_PARALLEL EXPERT_PARALLEL SAVE_INTERVAL EVAL_INTERVAL

    # shellcheck source=config.sh
    source "$EXAMPLE_DIR/config.sh"
    set_run_flags
    PRETRAIN_FLAGS=(
        "${MODEL_FLAGS[@]}" "${OPTIMIZER_FLAGS[@]}" "${KERNEL_FLAGS[@]}" "${PARALLEL_FLAGS[@]}"
        "${RUN_FLAGS[@]}"
    )
    ENVIRONMENT=()
    if ((TENSOR_PARALLEL > 1)); then
        ENVIRONMENT+=(CUDA_DEVICE_MAX_CONNECTIONS=1)  # Megatron asks for it, up to Hopper
    fi
}

# set_run_flags: set RUN_FLAGS, what this run reads, writes and logs.
set_run_flags() {
    local data
    : "${SAVE_INTERVAL:=1000}" "${EVAL_INTERVAL:=500}"
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
        --num-workers 4
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
}

# run_under_slurm: train on all nodes of this Slurm job, in a container if one is named.
run_under_slurm() {
    local nodes hosts first_node launcher
    : "${GPUS_PER_NODE:=${SLURM_GPUS_ON_NODE:-8}}" "${MASTER_PORT:=29500}"
    if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
        nodes=$SLURM_JOB_NUM_NODES
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        first_node=${hosts%%$'\n'*}
    elif [[ -n $DRY_RUN ]]; then
        nodes=${DRY_RUN_NODES:?}
        first_node=FIRST_NODE
        echo "$PROGRAM: no Slurm job here: the command is for $nodes nodes, FIRST_NODE is the first" >&2
    else
        fail "no Slurm job here (SLURM_JOB_NODELIST is not set); start it with sbatch, or try --dry-run"
    fi
    prepare

    launcher=(srun --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none)
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        require CONTAINER_MOUNTS "what the container sees of the file system, such as /lustre:/lustre"
        launcher+=(
            --container-image="$CONTAINER_IMAGE"
            --container-mounts="$CONTAINER_MOUNTS"
            --no-container-mount-home  # packages below ~/.local would hide the container's
        )
        : "${PRETRAIN_SCRIPT:=/workspace/megatron_scmoe/pretrain_gpt_scmoe.py}"  # as in the Dockerfile
    fi
    launcher+=(
        # Slurm signals every process of the step. torchrun has to live on until its ranks have saved.
        env --ignore-signal=USR1 "${ENVIRONMENT[@]}"
        torchrun
        --nnodes "$nodes"
        --nproc-per-node "$GPUS_PER_NODE"
        --rdzv-backend c10d
        --rdzv-endpoint "$first_node:$MASTER_PORT"
        --rdzv-id "${SLURM_JOB_ID:-0}"
    )
    run_or_print "${launcher[@]}" "${PRETRAIN_SCRIPT:-$REPO_DIR/pretrain_gpt_scmoe.py}" \
        "${PRETRAIN_FLAGS[@]}" --exit-signal-handler --exit-signal SIGUSR1 "${EXTRA_FLAGS[@]}"
}

# run_or_print WORD ...: replace this script by the command, or with --dry-run print it in one line.
run_or_print() {
    local word line=
    if [[ -z $DRY_RUN ]]; then
        exec "$@"
    fi
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
        line+="$word "
    done
    echo "${line% }"
    echo "$PROGRAM: --dry-run: that is the command; nothing was run" >&2
}
