"""Flags of a small model, two blocks with four experts, and the data it trains on."""

from pathlib import Path

VOCAB = 128

MODEL = f"""
    --num-layers 2 --moe-layer-freq [0,1]*1 --hidden-size 32 --num-attention-heads 2 --seq-length 32
    --ffn-hidden-size 64 --swiglu --disable-bias-linear --normalization RMSNorm
    --position-embedding-type rope --untie-embeddings-and-output-weights
    --num-experts 4 --moe-ffn-hidden-size 32 --moe-router-topk 2
    --moe-shared-expert-intermediate-size 32 --tokenizer-type NullTokenizer --vocab-size {VOCAB}
""".split()

STEPS = """
    --micro-batch-size 2 --lr 1e-3 --moe-aux-loss-coeff 1e-2 --num-workers 0 --log-interval 1
    --eval-iters 0
""".split()
"""How it trains, but for the data and the number of steps."""

EP2 = ("--expert-model-parallel-size", "2")


def write_dataset(prefix: Path, documents: int = 40, seed: int = 1) -> Path:
    """Documents of 50 random ids each, at ``prefix``, which is returned."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # takes seconds

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in np.random.default_rng(seed).integers(0, VOCAB, (documents, 50)):
        builder.add_document(document, [document.size])
    builder.finalize(f"{prefix}.idx")
    return prefix
