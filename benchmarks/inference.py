"""Prefill and decode of ScMoE and of stock Megatron-Core, side by side in one process group.

    torchrun --nproc-per-node 2 benchmarks/inference.py --shape gpt2-medium --json medium.json
    NCCL_P2P_DISABLE=1 torchrun ...      # host-staged communication, the PCIe-like case
    benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/inference.py --shape cpu   # no GPU

Every rank has sequences of its own and a part of the experts. A prefill reads prompts of the shape's
length and micro-batch, and gives the logits behind the last token. A decode reads one token of each
sequence behind a key-value cache, for every batch size; its time is that of one token, with the greedy
choice of the next. The systems take turns, so that drift of the machine hits all alike; medians over
the rounds are reported, of the slowest rank.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from inference_page import BENCHMARK, decode_key, inference_table
from shapes import SHAPES

from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, num_slots
from megatron_scmoe.platform.command_line import (
    OneLineParser,
    UsageError,
    asks_for_help,
    check_output,
    positive,
    run_tool,
)

SYSTEMS = ("top2", "shared", "scmoe-serial", "scmoe")
BATCH_SIZES = (1, 8, 64, 256)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The options, with ``sizes``, the shape they make.

    Raises:
        UsageError: if they cannot be followed; the message is one line.
    """
    parser = OneLineParser(description=__doc__.split("\n")[0])
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


if __name__ == "__main__" and asks_for_help():
    parse()  # shows it and ends, before the seconds that the imports below take

import machine  # maps CUDA to the CPU where there is no GPU: before Megatron
import torch
from measurement import summary, timed, turns
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.utils import InferenceMode
from report import write
from systems import build_all, switch

from megatron_scmoe.config import ScMoEConfig


def main() -> None:
    """Build the systems, measure them in turn, report."""
    options = parse()
    if "RANK" not in os.environ:
        raise UsageError(
            "started alone; accepted: torchrun --nproc-per-node N benchmarks/inference.py ..., or "
            "benchmarks/two_hosts.sh"
        )
    scmoe = ScMoEConfig(tap=options.tap, combine="add", expert_slot=options.slot)
    machine.initialise(None, False)
    models = build_all(options.systems, options.sizes, scmoe)
    for model in models.values():
        model.eval()
    with torch.no_grad(), InferenceMode.active():
        systems = measure(models, scmoe, options)
    if torch.distributed.get_rank() == 0:
        result = describe_run(options, scmoe) | {"systems": systems}
        write(result, options.json, None)
        print(inference_table(result), flush=True)
    torch.distributed.destroy_process_group()


def measure(models: dict, scmoe: ScMoEConfig, options: Namespace) -> dict[str, dict]:
    """Medians and quartiles in ms by system: ``prefill_ms``, and ``decode_ms`` by batch size."""
    shape = options.sizes
    prompts = _random_tokens(shape.micro_batch, shape.sequence, shape.vocab)
    found = {}
    for name, model, counts in turns(models, options.rounds, options.warmup):
        switch(name, model, scmoe)
        sequences = _Sequences(model, shape.micro_batch, shape.sequence)
        took = {"prefill_ms": timed(partial(sequences.read, prompts))}
        del sequences  # its cache
        for batch in options.batch_sizes:
            took[decode_key(batch)] = _decode(model, batch, options)
        for key, ms in took.items():
            if counts:
                found.setdefault(name, {}).setdefault(key, []).append(ms)
    return {name: summary(found[name]) for name in models}


def describe_run(options: Namespace, scmoe: ScMoEConfig) -> dict:
    """What was measured, on what, how: everything a rerun needs."""
    same = ("shape", "batch_sizes", "context", "tokens", "rounds", "warmup")
    return {
        "benchmark": BENCHMARK,
        **{name: getattr(options, name) for name in same},
        "sizes": asdict(options.sizes),
        "tap": scmoe.tap,
        "slot": scmoe.expert_slot,
        **machine.describe(),
    }


def _decode(model, batch: int, options: Namespace) -> float:
    """Milliseconds of a token."""
    sequences = _Sequences(model, batch, options.context + options.tokens)
    tokens = sequences.read(_random_tokens(batch, options.context, options.sizes.vocab))

    def run() -> None:
        chosen = tokens
        for _ in range(options.tokens):
            chosen = sequences.read(chosen)

    return timed(run) / options.tokens


class _Sequences:
    """Sequences of this rank, read from left to right into a key-value cache of its own."""

    def __init__(self, model, batch: int, length: int):
        context = StaticInferenceContext(batch, length)
        context.config.materialize_only_last_token_logits = True
        self._wrapper = GPTInferenceWrapper(model, context)
        self._wrapper.prep_model_for_inference()
        self._read = 0

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read the next tokens, int64 [b, n], and give the likeliest behind them, [b, 1]."""
        end = self._read + tokens.shape[1]
        positions = torch.arange(self._read, end, device=tokens.device).expand_as(tokens)
        logits = self._wrapper.run_one_forward_step(
            dict(tokens=tokens, position_ids=positions, attention_mask=None)
        )
        self._read = end
        return logits[:, -1:].argmax(-1)


def _random_tokens(batch: int, length: int, vocab: int) -> torch.Tensor:
    """Different on every rank."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    return torch.randint(vocab, (batch, length), generator=generator).cuda()


if __name__ == "__main__":
    run_tool(main)
