# shellcheck shell=bash disable=SC2034  # sourced by launch.sh
#
# A small model for CPUs: what the model is, as flags of pretrain_gpt_scmoe.py. Every variable can be
# set from outside; ../README.md has them in a table. Its sizes are those of the benchmarks.

: "${NUM_EXPERTS:=8}"  # routed experts in every second block
: "${MICRO_BATCH_SIZE:=4}"  # sequences a rank computes at once
: "${GLOBAL_BATCH_SIZE:=16}"  # sequences of 128 tokens a step
: "${TRAIN_ITERS:=200}"  # steps; 400 thousand tokens
: "${LEARNING_RATE:=1e-3}" "${MIN_LEARNING_RATE:=1e-4}"
: "${NUM_WORKERS:=1}"  # PyTorch warns of more processes than cores
: "${TENSOR_PARALLEL:=1}"
: "${PIPELINE_PARALLEL:=1}"  # has to divide the 2 pairs of blocks
: "${EXPERT_PARALLEL:=2}"  # the ranks that share the experts

VOCABULARY=512  # for made-up data
read_shape cpu

MODEL_FLAGS=("${SHAPE_FLAGS[@]}" "${LLAMA_STYLE[@]}" "${ROUTER_FLAGS[@]}")

SCMOE_FLAGS=(  # left out with BASELINE
    --scmoe-tap pos2
    --scmoe-combine add
)

KERNEL_FLAGS=(
    --transformer-impl local
    --distributed-backend gloo
    --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion
    --no-rope-fusion
    --no-persist-layer-norm
)
