"""The command line of train_run.py. Whatever cannot be done is refused before anything is started."""

import argparse
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from shapes import SHAPES
from train_settings import GRAPH_WARMUP, SYSTEMS, Layout, Variant, all_settings

from megatron_scmoe.platform.command_line import OneLineParser, UsageError, check_output, positive


def parse(on_cpu: bool, argv: Sequence[str] | None = None) -> Namespace:
    """The options, with ``sizes``, ``layout`` and ``variants``: the shape, where it lies, what runs.

    Raises:
        UsageError: if they cannot be followed; the message is one line.
    """
    options = _parser().parse_args(argv)
    shape = SHAPES[options.shape]
    options.sizes = replace(
        shape,
        blocks=options.blocks or shape.blocks,
        micro_batch=options.micro_batch or shape.micro_batch,
    )
    options.variants = _variants(options)
    options.layout = _layout(options)
    _check_settings(options, on_cpu)
    _check_length(options)
    for pattern, _ in options.flags:
        if not any(fnmatch(variant.name, pattern) for variant in options.variants):
            names = ", ".join(variant.name for variant in options.variants)
            raise UsageError(f"--flags {pattern}=...: no run has such a name; accepted: {names}")
    for flag, path, suffix in (("--json", options.json, ".json"), ("--plot", options.plot, ".png")):
        if path is not None:
            check_output(flag, path, [suffix])
    for flag, folder in (("--trace", options.trace), ("--keep-logs", options.keep_logs)):
        if folder is not None:
            _make(flag, folder)
    return options


def _make(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: cannot be made ({error.strerror}); accepted: a folder in one that exists"
        ) from error


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description="Whole training runs of ScMoE and of stock Megatron-Core, in turn."
    )
    parser.add_argument("--shape", choices=SHAPES, required=True, help="model and micro-batch")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM",
        help=f"of {', '.join(SYSTEMS)}; default: all")  # fmt: skip
    parser.add_argument("--settings", nargs="+", metavar="SETTINGS",
        help="flags of speed (train_settings.py), each with every system: "
        f"{', '.join(all_settings(False))}; default: defaults")  # fmt: skip
    parser.add_argument("--runs", nargs="+", type=_run, metavar="SYSTEM/SETTINGS",
        help="instead of --systems and --settings, such as scmoe/none top2/best")  # fmt: skip
    parser.add_argument("--flags", action="append", type=_override, default=[],
        metavar="RUN=FLAGS",
        help="flags of the pretraining script that runs of this name get on top of their settings; "
        "a pattern, such as 'scmoe/best*=--scmoe-expert-slot 1'")  # fmt: skip
    parser.add_argument("--blocks", type=positive, metavar="N", help="instead of the shape's")
    parser.add_argument("--micro-batch", type=positive, metavar="N", help="instead of the shape's")
    parser.add_argument("--micro-batches", type=positive, default=4, metavar="N",
        help="of each rank in an iteration")  # fmt: skip
    parser.add_argument("--tensor-parallel", type=positive, default=1, metavar="N",
        help="ranks that share attention and dense MLPs, with sequence parallelism")  # fmt: skip
    parser.add_argument("--pipeline-parallel", type=positive, default=1, metavar="N",
        help="pipeline stages")  # fmt: skip
    parser.add_argument("--model-chunks", type=positive, default=1, metavar="N",
        help="of a pipeline stage, which interleaves them")  # fmt: skip
    parser.add_argument("--expert-parallel", type=positive, metavar="N",
        help="ranks that share the experts (default: all of a pipeline stage)")  # fmt: skip
    parser.add_argument("--routing", choices=("balanced", "real"), default="balanced",
        help="forced to be balanced, or as the router decides")  # fmt: skip
    parser.add_argument("--data-path", metavar="PREFIX",
        help="a dataset of tools/preprocess_data.py (default: Megatron's mock data)")  # fmt: skip

    run = parser.add_argument_group("the runs")
    run.add_argument("--rounds", type=positive, default=2, metavar="N", help="runs of each")
    run.add_argument("--iterations", type=positive, default=14, metavar="N", help="of a run")
    run.add_argument("--warmup", type=positive, default=8, metavar="N",
        help="iterations at the begin of a run that do not count")  # fmt: skip
    run.add_argument("--time-limit", type=positive, default=300, metavar="SECONDS", help="of a run")
    run.add_argument("--trace", type=Path, metavar="FOLDER",
        help="trace two more iterations of each last run; the traces are kept there")  # fmt: skip
    run.add_argument(
        "--keep-logs", type=Path, metavar="FOLDER", help="keep the output of all ranks"
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    run.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart (.png)")
    return parser


def _override(text: str) -> tuple[str, str]:
    pattern, equals, flags = text.partition("=")
    if not (pattern and equals and flags.startswith("--")):
        raise argparse.ArgumentTypeError(f"{text}: accepted: RUN=FLAGS, as scmoe/best=--manual-gc")
    return pattern, flags


def _run(text: str) -> Variant:
    system, _, settings = text.partition("/")
    if system not in SYSTEMS or settings not in all_settings(False):
        raise argparse.ArgumentTypeError(
            f"{text}: accepted: SYSTEM/SETTINGS, of {', '.join(SYSTEMS)} and "
            f"{', '.join(all_settings(False))}"
        )
    return Variant(system, settings)


def _variants(options: Namespace) -> list[Variant]:
    if options.runs is None:
        return [
            Variant(system, settings)
            for settings in dict.fromkeys(options.settings or ["defaults"])
            for system in dict.fromkeys(options.systems or SYSTEMS)
        ]
    for flag, given in (("--systems", options.systems), ("--settings", options.settings)):
        if given is not None:
            raise UsageError(f"--runs with {flag}: it names both; accepted: one or the other")
    return list(dict.fromkeys(options.runs))


def _layout(options: Namespace) -> Layout:
    shape, ranks = options.sizes, int(os.environ.get("WORLD_SIZE", "1"))
    tensor, pipeline = options.tensor_parallel, options.pipeline_parallel
    if ranks % (tensor * pipeline):
        raise UsageError(
            f"--tensor-parallel {tensor} --pipeline-parallel {pipeline}: they do not divide {ranks} "
            "ranks; accepted: sizes whose product does"
        )
    stage = ranks // pipeline
    layout = Layout(ranks, options.expert_parallel or stage, tensor, pipeline, options.model_chunks)
    if stage % layout.expert:
        raise UsageError(
            f"--expert-parallel {layout.expert}: accepted: divisors of the {stage} ranks of a stage"
        )
    if shape.experts % layout.expert:
        raise UsageError(
            f"--shape {options.shape}: {layout.expert} ranks cannot share {shape.experts} experts"
        )
    if layout.chunks > 1 and pipeline == 1:
        raise UsageError(
            f"--model-chunks {layout.chunks}: accepted with --pipeline-parallel: 2, ..."
        )
    if not shape.every_block and shape.blocks % 2:
        raise UsageError(f"--blocks {shape.blocks}: ScMoE pairs blocks; accepted: even numbers")
    multiple = pipeline * layout.chunks * (1 if shape.every_block else 2)
    if shape.blocks % multiple:
        raise UsageError(
            f"--blocks {shape.blocks}: a pair of blocks is not split, and there are {pipeline} stages "
            f"of {layout.chunks} model chunks; accepted: multiples of {multiple}"
        )
    return layout


def _check_settings(options: Namespace, on_cpu: bool) -> None:
    for name in dict.fromkeys(variant.settings for variant in options.variants):
        if name not in all_settings(on_cpu):
            where = " without a GPU" if on_cpu else ""
            accepted = ", ".join(all_settings(on_cpu))
            raise UsageError(f"--settings {name}: accepted{where}: {accepted}")
    if on_cpu and options.trace is not None:
        raise UsageError("--trace: there is no GPU whose kernels it could show; leave it out")


def _check_length(options: Namespace) -> None:
    if options.warmup >= options.iterations:
        raise UsageError(
            f"--warmup {options.warmup} with --iterations {options.iterations}: none is left to be "
            f"measured; accepted: less than {options.iterations}"
        )
    if any(variant.graphs for variant in options.variants) and options.warmup <= GRAPH_WARMUP:
        raise UsageError(
            f"--warmup {options.warmup}: graphs are captured behind iteration {GRAPH_WARMUP}; "
            f"accepted: above {GRAPH_WARMUP}"
        )
