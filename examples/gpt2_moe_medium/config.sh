# shellcheck shell=bash disable=SC2034  # sourced: launch.sh and count_parameters.py read it
#
# GPT2-MoE-Medium with ScMoE: what the model is and how it is trained, as flags of
# pretrain_gpt_scmoe.py. Every variable can be set from outside; README.md has them in a table.

: "${NUM_EXPERTS:=8}"          # routed experts in every second block; the paper has 8 and 16
: "${MICRO_BATCH_SIZE:=8}"     # sequences a GPU computes at once
: "${GLOBAL_BATCH_SIZE:=512}"  # sequences a step; times 2048 is about a million tokens
: "${TRAIN_ITERS:=20000}"      # steps; 21 billion tokens
: "${TENSOR_PARALLEL:=1}"
: "${PIPELINE_PARALLEL:=1}"    # has to divide the 12 pairs of blocks
# Expert parallelism within a node, if the node has the GPUs.
: "${EXPERT_PARALLEL:=$((NUM_EXPERTS < GPUS_PER_NODE ? NUM_EXPERTS : GPUS_PER_NODE))}"

VOCABULARY=50257  # GPT-2's, for made-up data; Megatron pads it to 50304

MODEL_FLAGS=(
    # GPT-2 Medium. Without a flag for another one, the activation is GELU.
    --num-layers 24
    --hidden-size 1024
    --ffn-hidden-size 4096
    --num-attention-heads 16
    --seq-length 2048
    --max-position-embeddings 2048
    --position-embedding-type learned_absolute
    --normalization LayerNorm
    --disable-bias-linear  # Megatron's shared experts have no biases
    --hidden-dropout 0
    --attention-dropout 0

    # MoE in every second block: one routed expert a token, and a shared one of the same size.
    --moe-layer-freq '[0,1]*12'
    --num-experts "$NUM_EXPERTS"
    --moe-ffn-hidden-size 4096
    --moe-shared-expert-intermediate-size 4096
    --moe-router-topk 1
    --moe-router-pre-softmax  # or the softmax over the one kept logit gives the router no gradient
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.01
    --moe-router-dtype fp32

    # ScMoE: the tap between attention and MLP of the preceding block, a gate on the shared expert.
    --scmoe-tap pos2
    --scmoe-combine cg1
)

OPTIMIZER_FLAGS=(
    --micro-batch-size "$MICRO_BATCH_SIZE"
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "$TRAIN_ITERS"
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
    --lr 3e-4
    --min-lr 3e-5
    --lr-decay-style cosine
    --lr-warmup-fraction 0.01  # not in steps: a short run (-- --train-iters 10) stays valid
)

KERNEL_FLAGS=(  # the run chooses the rest: --scmoe-tune
    --bf16
    --transformer-impl transformer_engine
)

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
