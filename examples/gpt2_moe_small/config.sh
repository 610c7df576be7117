# shellcheck shell=bash disable=SC2034  # sourced by launch.sh
#
# GPT2-MoE-Small with ScMoE: what the model is, as flags of pretrain_gpt_scmoe.py.
# Every variable can be set from outside; ../README.md has them in a table. The sizes are those of the
# benchmarks.

: "${NUM_EXPERTS:=8}"  # routed experts in every second block
: "${MICRO_BATCH_SIZE:=16}"  # sequences a GPU computes at once
: "${GLOBAL_BATCH_SIZE:=512}"  # sequences of 1024 tokens a step
: "${TRAIN_ITERS:=20000}"  # steps; 10 billion tokens
: "${LEARNING_RATE:=6e-4}" "${MIN_LEARNING_RATE:=6e-5}"
: "${TENSOR_PARALLEL:=1}"
: "${PIPELINE_PARALLEL:=1}"  # has to divide the 6 pairs of blocks
# Expert parallelism within a node, if the node has the GPUs.
: "${EXPERT_PARALLEL:=$((NUM_EXPERTS < GPUS_PER_NODE ? NUM_EXPERTS : GPUS_PER_NODE))}"

VOCABULARY=50257  # GPT-2's, for made-up data; Megatron pads it to 50304
read_shape gpt2-small

MODEL_FLAGS=(
    "${SHAPE_FLAGS[@]}"

    # GPT-2's style. Without a flag for another one, the activation is GELU.
    --position-embedding-type learned_absolute
    --normalization LayerNorm
    --disable-bias-linear  # Megatron's shared experts have no biases
    --hidden-dropout 0
    --attention-dropout 0

    # A routed expert's weight is its probability among all experts.
    --moe-router-pre-softmax  # with top-1 the router gets no gradient without it
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
    --moe-router-dtype fp32
)

SCMOE_FLAGS=(  # left out with BASELINE
    --scmoe-tap pos2
    --scmoe-combine cg1
)
