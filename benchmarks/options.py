"""The command line of step_time.py. Whatever cannot be done is refused before anything is measured."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from shapes import SCMOE, SHAPES, SYSTEMS, Shape

from megatron_scmoe.config import DEFAULT_EXPERT_SLOT, AllToAllName, Exchange, slot_or_auto
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, num_slots, slot_behind_second_attention
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, check_output, positive

OF_SCMOE = ("tap", "slot", "chunks", "exchange", "copied", "operators", "trace")
"""Options that say something of ScMoE only."""


def parse(on_cpu: bool, argv: Sequence[str] | None = None) -> Namespace:
    """The options, with ``sizes``, the shape they make.

    Raises:
        UsageError: if they cannot be followed; the message is one line.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    given = {name for name in vars(options) if getattr(options, name) not in (None, False)}
    if options.systems is None:
        options.systems = all_that_run(on_cpu, options.cuda_graphs is not None)
    _check_systems(options, given, on_cpu)
    shape = SHAPES[options.shape]
    _check_shape(options, shape)
    if on_cpu:
        _check_without_gpu(given)
    _check_outputs(options)
    options.tap = options.tap or ("pos1" if shape.every_block else "pos2")
    options.chunks = options.chunks or 1
    options.exchange = options.exchange or "collective"
    _check_schedule(options)
    if options.train_rounds is None:
        options.train_rounds = 5 if options.cuda_graphs is None else 0
    if options.train_micro_batches and not options.train_rounds:
        raise UsageError(
            f"--train-micro-batches {options.train_micro_batches} with --train-rounds 0: none is "
            "measured; accepted: --train-rounds above 0"
        )
    options.train_micro_batches = options.train_micro_batches or 1
    options.sizes = replace(
        shape,
        micro_batch=options.micro_batch or shape.micro_batch,
        blocks=options.blocks or shape.blocks,
        router_fusion=options.router_fusion,
        cuda_graphs=_graph_modules(options),
    )
    return options


def all_that_run(on_cpu: bool, graphs: bool) -> list[str]:
    """The systems that run: Megatron's 1F1B wants a GPU, and captures nothing here."""
    return [name for name in SYSTEMS if name != "top2-1f1b" or not (on_cpu or graphs)]


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description="Step time of ScMoE and of stock Megatron-Core, side by side."
    )
    parser.add_argument("--shape", choices=SHAPES, required=True, help="model and micro-batch")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM",
        help=f"of {', '.join(SYSTEMS)}; default: all that can run")  # fmt: skip
    parser.add_argument("--micro-batch", type=positive, metavar="N", help="instead of the shape's")
    parser.add_argument("--blocks", type=positive, metavar="N", help="instead of the shape's")
    parser.add_argument("--router-fusion", action="store_true", help="in all systems")
    parser.add_argument("--cuda-graphs", nargs="*", metavar="MODULE",
        help="capture MODULEs of ScMoE, as --cuda-graph-modules names them (default: all it can), and "
        "of stock all it can")  # fmt: skip

    scmoe = parser.add_argument_group("of ScMoE")
    scmoe.add_argument("--tap", choices=sorted(TAP_BOUNDARY), help="default: pos2")
    scmoe.add_argument("--slot", type=slot_or_auto, metavar="N",
        help="expert slot, or auto: measured (default: the tap's)")  # fmt: skip
    scmoe.add_argument("--chunks", type=positive, metavar="N", help="token chunks (default: 1)")
    scmoe.add_argument("--exchange", choices=get_args(Exchange),
        help="what carries its all-to-alls (default: collective)")  # fmt: skip
    scmoe.add_argument("--copied", nargs="+", choices=get_args(AllToAllName), metavar="NAME",
        help=f"which of them the copy engines carry, of {', '.join(get_args(AllToAllName))} "
        "(default: all)")  # fmt: skip

    nccl = parser.add_argument_group("NCCL, of all systems")
    nccl.add_argument("--ep-channels", type=positive, metavar="N",
        help="channels of the expert group at most")  # fmt: skip
    nccl.add_argument("--ep-high-priority", action="store_true", help="stream of the expert group")

    run = parser.add_argument_group("the run")
    run.add_argument("--rounds", type=positive, default=15, metavar="N", help="measured rounds")
    run.add_argument("--warmup", type=_count, default=4, metavar="N", help="rounds before")
    run.add_argument("--train-rounds", type=_count, metavar="N",
        help="measured training iterations (train_ms; default: 5, with --cuda-graphs 0)")  # fmt: skip
    run.add_argument("--train-micro-batches", type=positive, metavar="N",
        help="micro-batches of each iteration; train_ms is the time of one (default: 1)")  # fmt: skip
    run.add_argument("--operators", action="store_true", help="measure operator times and slots")
    run.add_argument("--trace", type=Path, metavar="FILE", help="profiler trace of a scmoe step")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    run.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart (.png)")
    return parser


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _check_systems(options: Namespace, given: set[str], on_cpu: bool) -> None:
    for name in options.systems:
        if name not in all_that_run(on_cpu, options.cuda_graphs is not None):
            reason = "without a GPU" if on_cpu else "with --cuda-graphs"
            raise UsageError(f"--systems {name}: it does not run {reason}; leave it out")
    for name in OF_SCMOE:
        if name in given and not set(SCMOE) & set(options.systems):
            raise UsageError(f"--{name}: accepted with a system of {', '.join(SCMOE)}")
    for word, wanted in (
        ("--operators", options.operators),
        ("--trace", options.trace),
        ("--slot auto", options.slot == "auto"),
    ):
        if wanted and "scmoe" not in options.systems:
            raise UsageError(f"{word}: it measures scmoe; accepted: --systems with scmoe")
    if options.cuda_graphs is not None and options.train_rounds:
        raise UsageError("--train-rounds with --cuda-graphs: the optimizer moves captured weights")


def _check_shape(options: Namespace, shape: Shape) -> None:
    if shape.every_block and options.tap not in (None, "pos1"):
        raise UsageError(
            f"--tap {options.tap}: {options.shape} has MoE in every block; accepted: pos1"
        )
    if not shape.every_block and (options.blocks or 2) % 2:
        raise UsageError(f"--blocks {options.blocks}: ScMoE pairs blocks; accepted: even numbers")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if shape.experts % ranks:
        raise UsageError(
            f"--shape {options.shape}: {ranks} ranks cannot share {shape.experts} experts"
        )


def _check_without_gpu(given: set[str]) -> None:
    for name in (
        "cuda_graphs",
        "router_fusion",
        "exchange",
        "copied",
        "ep_channels",
        "ep_high_priority",
    ):
        if name in given:
            raise UsageError(f"--{name.replace('_', '-')}: there is no GPU; leave it out")


def _check_outputs(options: Namespace) -> None:
    for flag, path, suffixes in (
        ("--json", options.json, [".json"]),
        ("--plot", options.plot, [".png"]),
        ("--trace", options.trace, [".json", ".gz"]),
    ):
        if path is not None:
            check_output(flag, path, suffixes)


def _check_schedule(options: Namespace) -> None:
    slots = num_slots(options.tap)
    if isinstance(options.slot, int) and not 0 <= options.slot < slots:
        raise UsageError(
            f"--slot {options.slot}: with --tap {options.tap} accepted are 0 to {slots - 1} and auto"
        )
    if options.slot is None:
        options.slot = DEFAULT_EXPERT_SLOT[options.tap]
    if options.copied and options.exchange == "collective":
        raise UsageError(
            f"--copied {' '.join(options.copied)} with --exchange collective: there are no copy "
            "engines; accepted: --exchange copy-host or copy-peer"
        )
    if options.exchange == "copy-peer" and os.environ.get("NCCL_P2P_DISABLE") == "1":
        raise UsageError("--exchange copy-peer under NCCL_P2P_DISABLE=1: it copies from GPU to GPU "
            "all the same; accepted: copy-host")  # fmt: skip


def _graph_modules(options: Namespace) -> tuple[str, ...]:
    """What is captured of ScMoE; by default all it can be (see megatron_scmoe/validation)."""
    if options.cuda_graphs is None:
        return ()
    if options.cuda_graphs:
        return tuple(options.cuda_graphs)
    if options.tap == "pos1" or options.chunks > 1:
        return ("attn",)
    whole = options.slot != "auto" and options.slot >= slot_behind_second_attention(options.tap)
    return ("attn", *(["mlp"] if whole else []), "moe_router", "moe_preprocess")
