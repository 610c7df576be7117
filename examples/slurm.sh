# shellcheck shell=bash  # sourced by launch.sh
#
# Train on all nodes of a Slurm job: srun of one torchrun a node, plain or in a container, a log for each
# rank, and what to do at the signal before the time limit. launch.sh has set what is used here.

# run_under_slurm NODES: train on all nodes of this job; without one --dry-run is for NODES.
run_under_slurm() {
    local nodes hosts first_node launcher=()
    : "${GPUS_PER_NODE:=${SLURM_GPUS_ON_NODE:-8}}" "${MASTER_PORT:=29500}"
    if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
        nodes=$SLURM_JOB_NUM_NODES
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        first_node=${hosts%%$'\n'*}
    elif [[ -n $DRY_RUN ]]; then
        nodes=$1
        first_node=FIRST_NODE
        echo "$PROGRAM: no Slurm job here: the command is for $nodes nodes, FIRST_NODE is the first" >&2
    else
        fail "no Slurm job here (SLURM_JOB_NODELIST is not set); start it with sbatch, or try --dry-run"
    fi
    prepare
    check_recipe $((nodes * GPUS_PER_NODE))

    # One folder for each start: a requeued job keeps its number and counts its restarts.
    LOG_DIR=${LOG_DIR:-$CHECKPOINT_DIR/logs}/${SLURM_JOB_ID:-0}.${SLURM_RESTART_COUNT:-0}
    set_launcher "$nodes" "${MASTER_ADDR:-$first_node}"
    run_or_print run_step "${launcher[@]}" "${PRETRAIN_SCRIPT:-$REPO_DIR/$SCRIPT}" \
        "${PRETRAIN_FLAGS[@]}" --exit-signal-handler --exit-signal SIGUSR1 "${EXTRA_FLAGS[@]}"
}

# set_launcher NODES ADDRESS: set the words of run_under_slurm's `launcher`, all before the script.
set_launcher() {
    # The nodes' folders of logs have their numbers, which only the nodes know.
    # shellcheck disable=SC2016
    local extra=() in_its_folder='exec "$1" --log-dir "$0/node${SLURM_NODEID:-0}" "${@:2}"'
    set_launch_words
    [[ -z ${SRUN_FLAGS:-} ]] || read -r -a extra <<<"$SRUN_FLAGS"
    launcher=(
        srun --nodes="$1" --ntasks-per-node=1 --kill-on-bad-exit=1 --cpu-bind=none "${extra[@]}"
    )
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        require CONTAINER_MOUNTS "what the container sees of the file system, such as /lustre:/lustre"
        : "${CONTAINER_RUNTIME:=pyxis}"
        case $CONTAINER_RUNTIME in
            pyxis)
                launcher+=(
                    --container-image="$CONTAINER_IMAGE"
                    --container-mounts="$CONTAINER_MOUNTS"
                    --no-container-mount-home  # packages below ~/.local would hide the container's
                )
                ;;
            apptainer)
                launcher+=(apptainer exec --nv --no-home --bind "$CONTAINER_MOUNTS" "$CONTAINER_IMAGE")
                ;;
            *) fail "CONTAINER_RUNTIME=$CONTAINER_RUNTIME: accepted: pyxis, apptainer" ;;
        esac
        : "${PRETRAIN_SCRIPT:=/workspace/megatron_scmoe/$SCRIPT}"  # as in the Dockerfile
    fi
    launcher+=(
        # Slurm signals every process of the step. torchrun has to live on until its ranks have saved.
        # It stands behind the container's runtime, which would set the signals anew.
        env --ignore-signal=USR1 "${ENVIRONMENT[@]}"
        bash -c "$in_its_folder" "$LOG_DIR" "${LAUNCH_WORDS[@]}"
        --redirects 3
        --tee 3
        --nnodes "$1"
        --nproc-per-node "$GPUS_PER_NODE"
        --rdzv-backend c10d
        --rdzv-endpoint "$2:$MASTER_PORT"
        --rdzv-id "${SLURM_JOB_ID:-0}.${SLURM_RESTART_COUNT:-0}"
    )
}

# run_step WORD ...: run srun. At USR1 or TERM the ranks are told to save and to stop, and with REQUEUE=1
# the job is queued again. A failure is said in a last line for each rank that had an error.
run_step() {
    local step status
    SIGNALLED=
    trap 'forward USR1 "$!"' USR1  # $! is srun, the only process in the background
    trap 'forward TERM "$!"' TERM
    "$@" &
    step=$!
    while true; do  # a signal ends `wait`, not the step
        status=0
        wait "$step" || status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    trap - USR1 TERM
    if ((status != 0)); then
        echo "$PROGRAM: error: the step ended with status $status; a log for each rank: $LOG_DIR" >&2
        show_errors >&2 || true
        exit "$status"
    fi
    if [[ -z $SIGNALLED ]]; then
        return
    fi
    if [[ ${REQUEUE:-} == 1 ]]; then
        echo "$PROGRAM: stopped at SIG$SIGNALLED with a checkpoint; the job is queued again" >&2
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "$PROGRAM: stopped at SIG$SIGNALLED with a checkpoint; submit again to go on" >&2
    fi
}

# forward SIGNAL STEP: tell all ranks to save and to stop. Megatron waits for one signal only.
forward() {
    SIGNALLED=$1
    echo "$PROGRAM: SIG$1 came: the ranks save a checkpoint and stop" >&2
    kill -USR1 "$2"
}

# show_errors: the last error of each rank, those that say the same once; nothing where there is none.
show_errors() {
    local log line
    find "$LOG_DIR" \( -name error.json -o -name stderr.log \) -size +0 | sort |
        while read -r log; do
            # What a rank leaves in advance, lest it be killed, says nothing of who was.
            line=$(last_error "$log") && [[ $line != *"signal and said nothing"* ]] &&
                printf '%s\t%s\n' "$line" "${log#"$LOG_DIR/"}"
        done | sort --field-separator=$'\t' --key=1,1 --unique | head -n 5 |
        while IFS=$'\t' read -r line log; do
            echo "$PROGRAM: $log: $line"
        done
}

# last_error LOG: of what a rank wrote, or of what it told torchrun (error.json).
last_error() {
    if [[ $1 == *.json ]]; then
        python3 -c 'import json, sys; said = json.load(open(sys.argv[1]))["message"]
print((said["message"] if isinstance(said, dict) else said).strip().splitlines()[-1])' "$1"
    else
        grep -E '(Error|Exception|error:)' "$1" | tail -n 1
    fi
}
