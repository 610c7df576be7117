"""Print the sizes of a shape of the benchmarks as Megatron's flags, a word a line, for a recipe.

    python3 examples/shape_flags.py gpt2-medium
    python3 examples/shape_flags.py gpt2-medium --system top2 --experts 16

It needs Python 3.8 or newer and nothing else: recipes ask it on login nodes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from shapes import SHAPES

SYSTEMS = ("scmoe", "top2", "shared")


def main() -> None:
    """Print the flags of the shape that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES, help="name in benchmarks/shapes.py")
    parser.add_argument(
        "--system",
        choices=SYSTEMS,
        default="scmoe",
        help="top2 has no shared expert and twice the routed ones a token (default: scmoe)",
    )
    parser.add_argument(
        "--experts", type=int, help="routed experts of a block (default: the shape's)"
    )
    options = parser.parse_args()
    print("\n".join(flags(options.shape, options.system, options.experts)))


def flags(name: str, system: str = "scmoe", experts=None) -> list:
    """The words of the sizes: blocks, width, heads, sequence, experts and how many a token visits.

    Args:
        name: of the shape; the whole model is meant, where the benchmarks cut it.
        system: one of ``SYSTEMS``; ScMoE and ``shared`` have a shared expert.
        experts: routed ones of a block; None for those of the shape.
    """
    shape = SHAPES[name]
    blocks = shape.of_blocks or shape.blocks
    topk = 2 * shape.topk if system == "top2" else shape.topk
    words = (
        f"--num-layers {blocks} --hidden-size {shape.hidden} --ffn-hidden-size {shape.ffn} "
        f"--num-attention-heads {shape.heads} --seq-length {shape.sequence} "
        f"--max-position-embeddings {shape.sequence} "
        f"--moe-layer-freq {1 if shape.every_block else f'[0,1]*{blocks // 2}'} "
        f"--num-experts {experts or shape.experts} --moe-ffn-hidden-size {shape.expert_ffn} "
        f"--moe-router-topk {topk}"
    )
    if shape.query_groups:
        words += f" --group-query-attention --num-query-groups {shape.query_groups}"
    if system != "top2":
        words += f" --moe-shared-expert-intermediate-size {shape.topk * shape.expert_ffn}"
    return words.split()


if __name__ == "__main__":
    main()
