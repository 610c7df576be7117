"""Prefill and decode of ScMoE and of stock Megatron-Core, side by side in one process group.

    torchrun --nproc-per-node 2 benchmarks/inference.py --shape gpt2-medium --json medium.json
    NCCL_P2P_DISABLE=1 torchrun ...      # host-staged communication, the PCIe-like case
    benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/inference.py --shape cpu   # no GPU

Every rank has sequences of its own and a part of the experts. A prefill reads prompts of the shape's
length and micro-batch, and gives the logits behind the last token. A decode reads one token of each
sequence behind a key-value cache, for every batch size; its time is that of one token, with the greedy
choice of the next. It is measured as Megatron does it; with padded experts, which exchange no sizes
(megatron_scmoe/inference/expert_padding.py); and, with --graphs, with these in a CUDA graph
(megatron_scmoe/inference/decode_graphs.py). Stock models are treated in the same way. The
systems take turns, so that drift of the machine hits all alike; medians over the rounds are reported,
of the slowest rank.
"""

from argparse import Namespace
from dataclasses import asdict
from functools import partial
from itertools import product

from inference_options import parse
from inference_page import BENCHMARK, HOW, IN_GRAPHS, PLAIN, decode_key, inference_table
from launched import check_launched

from megatron_scmoe.platform.command_line import UsageError, asks_for_help, run_tool

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
from megatron.core.transformer.moe.router import Router
from report import write
from systems import build_all, switch

from megatron_scmoe.config import ON, ScMoEConfig
from megatron_scmoe.inference.decode_graphs import DecodeGraphs
from megatron_scmoe.inference.expert_padding import ExpertPadding
from megatron_scmoe.overlap.cuda_graph import can_capture


def main() -> None:
    """Build the systems, measure them in turn, report."""
    options = parse()
    check_launched()
    if options.graphs and not can_capture():
        raise UsageError("--graphs: there is no GPU; accepted: without it")
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
        padding = ExpertPadding(model, ON)
        sequences = _Sequences(model, shape.micro_batch, shape.sequence)
        took = {"prefill_ms": timed(partial(sequences.read, prompts))}
        del sequences  # its cache
        for batch, how in product(options.batch_sizes, HOW if options.graphs else HOW[:2]):
            padding.set(how != PLAIN)
            _balance(model, how != IN_GRAPHS)  # random numbers are no part of a graph
            took[decode_key(batch, how)] = _decode(model, batch, how == IN_GRAPHS, options)
        padding.set(False)
        _balance(model, True)
        for key, ms in took.items():
            if counts:
                found.setdefault(name, {}).setdefault(key, []).append(ms)
    return {name: summary(found[name]) for name in models}


def _balance(model, forced: bool) -> None:
    """Force routing to be balanced, or not: padded experts have as many rows either way."""
    for module in model.modules():
        if isinstance(module, Router):
            module.config.moe_router_force_load_balancing = forced


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


def _decode(model, batch: int, in_graphs: bool, options: Namespace) -> float:
    """Milliseconds of a token."""
    sequences = _Sequences(model, batch, options.context + options.tokens + in_graphs)
    tokens = sequences.read(_random_tokens(batch, options.context, options.sizes.vocab))
    read = sequences.read_in_graph if in_graphs else sequences.read
    if in_graphs:
        tokens = read(tokens)  # captures

    def run() -> None:
        chosen = tokens
        for _ in range(options.tokens):
            chosen = read(chosen)

    return timed(run) / options.tokens


class _Sequences:
    """Sequences of this rank, read from left to right into a key-value cache of its own."""

    def __init__(self, model, batch: int, length: int):
        context = StaticInferenceContext(batch, length)
        context.config.materialize_only_last_token_logits = True
        self._wrapper = GPTInferenceWrapper(model, context)
        self._wrapper.prep_model_for_inference()
        self._read = 0
        self._graphs = DecodeGraphs(model, context)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read the next tokens, int64 [b, n], and give the likeliest behind them, [b, 1]."""
        logits = self._forward(tokens, self._positions(tokens))
        self._read += tokens.shape[1]
        return logits[:, -1:].argmax(-1)

    def read_in_graph(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same of one token of each."""
        key = len(tokens), ""
        logits, _ = self._graphs.read(
            self._forward, key, tokens, self._positions(tokens), self._read, None
        )
        self._read += 1
        return logits.argmax(-1)

    def _positions(self, tokens: torch.Tensor) -> torch.Tensor:
        end = self._read + tokens.shape[1]
        return torch.arange(self._read, end, device=tokens.device).expand_as(tokens)

    def _forward(self, tokens, positions, mask=None) -> torch.Tensor:
        return self._wrapper.run_one_forward_step(
            dict(tokens=tokens, position_ids=positions, attention_mask=mask)
        )


def _random_tokens(batch: int, length: int, vocab: int) -> torch.Tensor:
    """Different on every rank."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    return torch.randint(vocab, (batch, length), generator=generator).cuda()


if __name__ == "__main__":
    run_tool(main)
