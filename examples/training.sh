# shellcheck shell=bash disable=SC2034  # sourced by launch.sh
#
# How recipes train, where their config.sh does not say it: optimizer, kernels, parallelism. Which kernels
# and overlaps a run of ScMoE takes beyond these it chooses itself (--scmoe-tune).

# set_training_flags: set OPTIMIZER_FLAGS, KERNEL_FLAGS and PARALLEL_FLAGS.
set_training_flags() {
    [[ -v OPTIMIZER_FLAGS ]] || OPTIMIZER_FLAGS=(
        --optimizer adam
        --adam-beta1 0.9
        --adam-beta2 0.95
        --weight-decay 0.1
        --clip-grad 1.0
        --lr "$LEARNING_RATE"
        --min-lr "$MIN_LEARNING_RATE"
        --lr-decay-style cosine
        --lr-warmup-fraction 0.01  # not in steps: a short run (-- --train-iters 10) stays valid
    )
    OPTIMIZER_FLAGS+=(
        --micro-batch-size "$MICRO_BATCH_SIZE"
        --global-batch-size "$GLOBAL_BATCH_SIZE"
        --train-iters "$TRAIN_ITERS"
    )
    [[ -v KERNEL_FLAGS ]] || KERNEL_FLAGS=(--bf16 --transformer-impl transformer_engine)
    PARALLEL_FLAGS=(
        --tensor-model-parallel-size "$TENSOR_PARALLEL"
        --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
        --expert-model-parallel-size "$EXPERT_PARALLEL"
        --expert-tensor-parallel-size 1
        --moe-token-dispatcher-type alltoall
        --distributed-timeout-minutes 30  # the first start indexes the data while other ranks wait
    )
    if ((TENSOR_PARALLEL > 1)); then
        PARALLEL_FLAGS+=(--sequence-parallel)  # MoE under tensor parallelism needs it
    fi
}
