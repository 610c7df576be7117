"""Print the sizes of a shape of the benchmarks as Megatron's flags, a word a line, for a recipe.

    python3 examples/shape_flags.py gpt2-medium
    python3 examples/shape_flags.py gpt2-medium --system top2 --experts 16

It needs Python 3.8 or newer and nothing else: recipes ask it on login nodes.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from shapes import SHAPES, size_flags

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
    """The words of the sizes of the whole model, also where the benchmarks cut it.

    Args:
        name: of the shape.
        system: one of ``SYSTEMS``; ScMoE and ``shared`` have a shared expert.
        experts: routed ones of a block; None for those of the shape.
    """
    shape = SHAPES[name]
    shape = replace(shape, experts=experts or shape.experts)
    return size_flags(shape, has_shared_expert=system != "top2", whole=True)


if __name__ == "__main__":
    main()
