"""What benchmarks measure: systems, and shapes of models and micro-batches, also as flags."""

from __future__ import annotations  # recipes read this on login nodes, of any Python 3.8

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model and a micro-batch. Sizes in elements, ``sequence`` and ``micro_batch`` per rank.

    ``topk`` experts are routed to beside a shared expert of ``topk`` times their size, against
    2 x ``topk`` experts without one: the same active parameters. All have RMSNorm, SwiGLU and rope.
    """

    blocks: int
    hidden: int
    heads: int
    ffn: int
    expert_ffn: int
    experts: int
    topk: int
    sequence: int
    micro_batch: int
    vocab: int = 32000
    every_block: bool = False
    query_groups: int | None = None
    of_blocks: int | None = None
    """Of how many blocks the model is cut, so that all systems fit on one GPU beside each other."""
    router_fusion: bool = False
    cuda_graphs: tuple[str, ...] = ()


SHAPES = {
    "gpt2-small": Shape(12, 768, 12, 3072, 3072, 8, 1, 1024, 64, of_blocks=12),
    "gpt2-medium": Shape(12, 1024, 16, 4096, 4096, 8, 1, 2048, 32, of_blocks=24),
    "gpt3-xl": Shape(8, 2048, 32, 8192, 8192, 8, 1, 2048, 16, of_blocks=24),
    "llama2": Shape(
        8, 2048, 16, 5632, 5632, 8, 1, 2048, 16, every_block=True, query_groups=4, of_blocks=24
    ),
    "fine": Shape(8, 2048, 16, 5632, 1408, 64, 4, 4096, 8),
    "wide": Shape(12, 2048, 16, 5632, 5632, 8, 1, 4096, 4),
    "cpu": Shape(4, 256, 4, 512, 512, 8, 1, 128, 16, vocab=512),
}
"""By name; the first four are the paper's. Micro-batches are large enough that kernels, not their
launches, take the time."""


def size_flags(shape: Shape, has_shared_expert: bool, whole: bool = False) -> list[str]:
    """The words of Megatron's flags for the model's sizes: blocks, width, sequence, experts.

    Args:
        has_shared_expert: whether ``topk`` experts are beside a shared one, or twice as many alone.
        whole: all blocks of the model that the shape is cut of.
    """
    blocks = (whole and shape.of_blocks) or shape.blocks
    words = (
        f"--num-layers {blocks} --hidden-size {shape.hidden} --ffn-hidden-size {shape.ffn} "
        f"--num-attention-heads {shape.heads} --seq-length {shape.sequence} "
        f"--max-position-embeddings {shape.sequence} "
        f"--moe-layer-freq {1 if shape.every_block else f'[0,1]*{blocks // 2}'} "
        f"--num-experts {shape.experts} --moe-ffn-hidden-size {shape.expert_ffn} "
        f"--moe-router-topk {shape.topk if has_shared_expert else 2 * shape.topk}"
    )
    if shape.query_groups:
        words += f" --group-query-attention --num-query-groups {shape.query_groups}"
    if has_shared_expert:
        words += f" --moe-shared-expert-intermediate-size {shape.topk * shape.expert_ffn}"
    return words.split()


STOCK = ("top2", "top1", "shared", "shared-overlap", "top2-1f1b")
SCMOE = ("scmoe-serial", "scmoe", "floor")
SYSTEMS = (*STOCK, *SCMOE)
