# shellcheck shell=bash disable=SC2034  # sourced: launch.sh reads it
#
# LongCat-Flash with ScMoE: what the model is and how it is trained, as flags of
# pretrain_gpt_scmoe.py. Every variable can be set from outside; README.md has them in a table.

OWN_VARIABLES=(PRETRAINED REHEARSAL)
[[ -z ${BASELINE:-} ]] ||
    fail "BASELINE=$BASELINE: accepted: none, as stock Megatron has no zero experts"
if [[ ${REHEARSAL:-} == 1 ]]; then  # a small model of the same kind, for two GPUs
    : "${GLOBAL_BATCH_SIZE:=8}" "${TRAIN_ITERS:=20}"
    : "${PIPELINE_PARALLEL:=1}" "${EXPERT_PARALLEL:=2}" "${NUM_EXPERTS:=16}"
fi
: "${NUM_EXPERTS:=512}"         # routed experts in every second block
: "${MICRO_BATCH_SIZE:=1}"      # sequences a GPU computes at once
: "${GLOBAL_BATCH_SIZE:=1024}"  # sequences a step; times 8192 is about 8 million tokens
: "${TRAIN_ITERS:=1000}"        # steps; 8 billion tokens
: "${LEARNING_RATE:=2e-5}" "${MIN_LEARNING_RATE:=2e-6}"
: "${TENSOR_PARALLEL:=1}"
: "${PIPELINE_PARALLEL:=4}"     # has to divide the 28 pairs of blocks
: "${EXPERT_PARALLEL:=32}"      # has to divide the experts

VOCABULARY=131072  # for made-up data

MODEL_FLAGS=(
    # 28 layers, each with two attentions and two dense MLPs: pairs of Megatron's blocks.
    --num-layers 56
    --hidden-size 6144
    --ffn-hidden-size 12288
    --num-attention-heads 64
    --seq-length 8192
    --max-position-embeddings 131072
    --position-embedding-type rope
    --rope-type rope
    --rotary-base 10000000
    --no-rope-fusion  # Megatron fuses MLA's rotation for YaRN only
    --normalization RMSNorm
    --norm-epsilon 1e-5
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --hidden-dropout 0
    --attention-dropout 0
    --init-method-std 0.02

    # Multi-latent attention, with scaled latents.
    --multi-latent-attention
    --qk-layernorm
    --q-lora-rank 1536
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --scmoe-mla-scale
    --scmoe-mla-norm-epsilon 1e-6

    # 12 of 512 experts and 256 zero experts; the second dense MLP is the shared expert.
    --moe-layer-freq '[0,1]*28'
    --num-experts "$NUM_EXPERTS"
    --scmoe-zero-experts 256
    --moe-ffn-hidden-size 2048
    --moe-shared-expert-intermediate-size 12288
    --moe-router-topk 12
    --moe-router-score-function softmax
    --moe-router-pre-softmax
    --moe-router-topk-scaling-factor 6.0
    --moe-router-dtype fp32
    --moe-router-load-balancing-type none
    --moe-aux-loss-coeff 0
    --scmoe-expert-bias proportional
)
if [[ ${REHEARSAL:-} == 1 ]]; then
    MODEL_FLAGS+=(
        --num-layers 4
        --moe-layer-freq '[0,1]*2'
        --hidden-size 1024
        --ffn-hidden-size 2048
        --num-attention-heads 8
        --seq-length 2048
        --q-lora-rank 384
        --kv-lora-rank 128
        --scmoe-zero-experts 8
        --moe-ffn-hidden-size 512
        --moe-shared-expert-intermediate-size 2048
        --moe-router-topk 4
    )
fi

SCMOE_FLAGS=(
    # ScMoE: the tap behind the first attention, through the norm of the first dense MLP.
    --scmoe-tap pos2
    --scmoe-router-norm shared
    --scmoe-combine add
)

OPTIMIZER_FLAGS=(
    --optimizer adam
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
    --lr "$LEARNING_RATE"
    --min-lr "$MIN_LEARNING_RATE"
    --lr-decay-style cosine
    --lr-warmup-fraction 0.01
    --moe-router-bias-update-rate 1e-3
)

KERNEL_FLAGS=(  # the run chooses the rest: --scmoe-tune
    --bf16
    --transformer-impl transformer_engine
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 2  # a pair of blocks
)

if [[ -n ${PRETRAINED:-} ]]; then
    MODEL_FLAGS+=(--pretrained-checkpoint "$PRETRAINED")  # read while CHECKPOINT_DIR has none
fi
