# shellcheck shell=bash disable=SC2034  # sourced by launch.sh
#
# What recipes share: styles of models that a config.sh names, and how a model is trained where it does not
# say so itself: optimizer, kernels, parallelism. Which kernels and overlaps a run of ScMoE takes beyond
# these it chooses itself (--scmoe-tune).

# GPT-2's style. Without a flag for another one, the activation is GELU.
GPT2_STYLE=(
    --position-embedding-type learned_absolute
    --normalization LayerNorm
    --disable-bias-linear  # Megatron's shared experts have no biases
    --hidden-dropout 0
    --attention-dropout 0
)

# LLaMA's style.
LLAMA_STYLE=(
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --hidden-dropout 0
    --attention-dropout 0
)

# A routed expert's weight is its probability among all experts.
ROUTER_FLAGS=(
    --moe-router-pre-softmax  # with top-1 the router gets no gradient without it
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
    --moe-router-dtype fp32
)

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
