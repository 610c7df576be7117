# shellcheck shell=bash disable=SC2034  # sourced by launch.sh
#
# A model of 64 fine experts with ScMoE: what the model is, as flags of pretrain_gpt_scmoe.py.
# Every variable can be set from outside; ../README.md has them in a table. The sizes are those of the
# benchmarks.

: "${NUM_EXPERTS:=64}"  # routed experts in every second block
: "${MICRO_BATCH_SIZE:=4}"  # sequences a GPU computes at once
: "${GLOBAL_BATCH_SIZE:=256}"  # sequences of 4096 tokens a step
: "${TRAIN_ITERS:=20000}"  # steps; 21 billion tokens
: "${LEARNING_RATE:=3e-4}" "${MIN_LEARNING_RATE:=3e-5}"
: "${TENSOR_PARALLEL:=1}"
: "${PIPELINE_PARALLEL:=1}"  # has to divide the 4 pairs of blocks
# Expert parallelism within a node, if the node has the GPUs.
: "${EXPERT_PARALLEL:=$((NUM_EXPERTS < GPUS_PER_NODE ? NUM_EXPERTS : GPUS_PER_NODE))}"

VOCABULARY=32000  # for made-up data
read_shape fine

MODEL_FLAGS=("${SHAPE_FLAGS[@]}" "${LLAMA_STYLE[@]}" "${ROUTER_FLAGS[@]}")

SCMOE_FLAGS=(  # left out with BASELINE
    --scmoe-tap pos2
    --scmoe-combine add
)
