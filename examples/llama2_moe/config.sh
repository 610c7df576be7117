# shellcheck shell=bash disable=SC2034  # sourced by launch.sh
#
# LLaMA2-MoE with ScMoE: what the model is, as flags of pretrain_gpt_scmoe.py.
# Every variable can be set from outside; ../README.md has them in a table. The sizes are those of the
# benchmarks.

: "${NUM_EXPERTS:=8}"  # routed experts in every block
: "${MICRO_BATCH_SIZE:=4}"  # sequences a GPU computes at once
: "${GLOBAL_BATCH_SIZE:=512}"  # sequences of 2048 tokens a step
: "${TRAIN_ITERS:=50000}"  # steps; 52 billion tokens
: "${LEARNING_RATE:=2e-4}" "${MIN_LEARNING_RATE:=2e-5}"
: "${TENSOR_PARALLEL:=1}"
: "${PIPELINE_PARALLEL:=1}"  # has to divide the 24 blocks
# Expert parallelism within a node, if the node has the GPUs.
: "${EXPERT_PARALLEL:=$((NUM_EXPERTS < GPUS_PER_NODE ? NUM_EXPERTS : GPUS_PER_NODE))}"

VOCABULARY=32000  # LLaMA 2's, for made-up data
read_shape llama2

MODEL_FLAGS=("${SHAPE_FLAGS[@]}" "${LLAMA_STYLE[@]}" "${ROUTER_FLAGS[@]}")

SCMOE_FLAGS=(  # left out with BASELINE
    --scmoe-tap pos1
    --scmoe-combine cg1
)
