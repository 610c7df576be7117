#!/usr/bin/env bash
# What a container does without a command: versions, and three iterations of a small model.
#
#   docker run --rm --gpus all --ipc host megatron-scmoe    # without --gpus: on the CPU
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

"$python" - <<'END'
import torch
from importlib.metadata import PackageNotFoundError, version

print(f"GPUs: {torch.cuda.device_count()}; CUDA {torch.version.cuda}, NCCL", end=" ")
print(".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not asked")
for name in ("megatron-scmoe", "megatron-core", "torch", "transformer-engine", "apex", "deep-ep"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
END

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus == 1 ? 1 : 2))  # two on the CPU too
precision=()
((gpus == 0)) || precision=(--bf16)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A container's own name need not lead anywhere: the ranks meet at the loopback address.
"$python" -m torch.distributed.run --standalone --local-addr 127.0.0.1 \
    --nproc-per-node "$ranks" pretrain_gpt_scmoe.py \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --swiglu \
    --disable-bias-linear --num-experts 4 --expert-model-parallel-size "$ranks" \
    --moe-layer-freq '[0,1]*1' --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64 \
    --moe-aux-loss-coeff 0.01 --mock-data --tokenizer-type NullTokenizer --vocab-size 64 \
    --micro-batch-size 2 --train-iters 3 --lr 1e-3 --log-interval 1 --eval-iters 0 \
    --scmoe-tune off "${precision[@]}" >"$log" 2>&1 ||
    { cat "$log" >&2; echo "smoke_test.sh: error: the training above failed" >&2; exit 1; }
grep -E ' iteration +[0-9]+/' "$log" | grep -oE '(iteration +[0-9]+|lm loss: [0-9.E+-]+)' | paste - -
echo "smoke test passed on $ranks ranks"
