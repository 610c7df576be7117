"""The command line of inference.py. Whatever cannot be done is refused before anything is measured."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shapes import SHAPES

from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, num_slots
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, check_output, positive

SYSTEMS = ("top2", "shared", "scmoe-serial", "scmoe")
BATCH_SIZES = (1, 8, 64, 256)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The options, with ``sizes``, the shape they make.

    Raises:
        UsageError: if they cannot be followed; the message is one line.
    """
    parser = OneLineParser(
        description="Prefill and decode of ScMoE and of stock Megatron-Core, side by side."
    )
    parser.add_argument("--shape", choices=SHAPES, required=True, help="model and prompts")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS),
        metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)}; default: all")  # fmt: skip
    parser.add_argument("--blocks", type=positive, metavar="N", help="instead of the shape's")
    parser.add_argument("--micro-batch", type=positive, metavar="N",
        help="prompts of a rank in a prefill, instead of the shape's")  # fmt: skip
    parser.add_argument("--batch-sizes", nargs="+", type=positive, default=list(BATCH_SIZES),
        metavar="N", help="sequences of a rank in a decode "
        f"(default: {' '.join(map(str, BATCH_SIZES))})")  # fmt: skip
    parser.add_argument("--context", type=positive, default=128, metavar="N",
        help="tokens in the cache before the first decode (default: 128)")  # fmt: skip
    parser.add_argument("--tokens", type=positive, default=8, metavar="N",
        help="decoded in a row for one measurement (default: 8)")  # fmt: skip
    parser.add_argument("--graphs", action="store_true",
        help="on GPUs: measure decodes in CUDA graphs too, with collectives in them")  # fmt: skip
    parser.add_argument("--tap", choices=sorted(TAP_BOUNDARY), help="default: pos2")
    parser.add_argument("--slot", type=int, metavar="N", help="default: the tap's")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N",
        help="in which each system is measured once (default: 5)")  # fmt: skip
    parser.add_argument(
        "--warmup", type=positive, default=2, metavar="N", help="rounds before them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args(argv)
    shape = SHAPES[options.shape]
    options.tap = options.tap or ("pos1" if shape.every_block else "pos2")
    if options.slot is not None and not 0 <= options.slot < num_slots(options.tap):
        raise UsageError(
            f"--slot {options.slot}: with --tap {options.tap} accepted are 0 to "
            f"{num_slots(options.tap) - 1}"
        )
    if (options.tap == "pos1") != shape.every_block:
        kind = "has experts in every block" if shape.every_block else "has pairs of blocks"
        accepted = "pos1" if shape.every_block else "pos2 or pos3"
        raise UsageError(f"--tap {options.tap}: {options.shape} {kind}; accepted: {accepted}")
    options.sizes = replace(
        shape,
        blocks=options.blocks or shape.blocks,
        micro_batch=options.micro_batch or shape.micro_batch,
    )
    if not shape.every_block and options.sizes.blocks % 2:
        raise UsageError(f"--blocks {options.blocks}: ScMoE pairs blocks; accepted: even numbers")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if shape.experts % ranks:
        raise UsageError(
            f"--shape {options.shape}: {ranks} ranks cannot share {shape.experts} experts"
        )
    if options.json is not None:
        check_output("--json", options.json, [".json"])
    return options
