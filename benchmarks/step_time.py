"""Step time of ScMoE and of stock Megatron-Core, side by side in one process group.

    torchrun --nproc-per-node 4 benchmarks/step_time.py --shape wide --json wide.json --plot wide.png
    NCCL_P2P_DISABLE=1 torchrun ...      # host-staged communication, the PCIe-like case
    benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/step_time.py --shape cpu   # no GPU

Every system is a whole GPTModel of the same shape, with experts spread over all ranks and routing
forced to be balanced. The systems take turns, step by step, so that drift of the machine hits all
alike; medians over the rounds are reported.
"""

import gc
from argparse import Namespace
from dataclasses import asdict, replace
from functools import partial

from launched import check_launched
from options import parse

from megatron_scmoe.platform.command_line import asks_for_help

if __name__ == "__main__" and asks_for_help():
    parse(on_cpu=False)  # shows it and ends, before the seconds that the imports below take

import machine  # maps CUDA to the CPU where there is no GPU: before Megatron
import torch
from measurement import Batch, evaluate, measure, measure_operators, measure_training, step, trace
from report import table, write
from systems import build_all, capture, switch

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.platform.command_line import run_tool


def main() -> None:
    """Build the systems, measure them in turn, report."""
    options = parse(machine.ON_CPU)
    check_launched()
    shape = options.sizes
    scmoe = ScMoEConfig(
        tap=options.tap,
        combine="add",
        expert_slot=options.slot,
        chunks=options.chunks,
        exchange=options.exchange,
        copy_engine_all_to_alls=options.copied,
    )
    machine.initialise(options.ep_channels, options.ep_high_priority, bool(shape.cuda_graphs))
    models = build_all(options.systems, shape, scmoe)
    times = slots = None
    if "scmoe" in models:
        switch("scmoe", models["scmoe"], scmoe)
        if options.operators or options.slot == "auto":
            times, slots, fastest = measure_operators(models["scmoe"], shape, scmoe)
            if options.slot == "auto":
                scmoe = replace(scmoe, expert_slot=fastest)
    captures = capture(models, shape)  # after tuning, which runs operators one by one
    if options.trace:
        switch("scmoe", models["scmoe"], scmoe)
        trace(options.trace, partial(step, models["scmoe"], Batch.random(shape)))
    gc.collect()
    gc.freeze()
    gc.disable()  # as --manual-gc does: a collection on one rank keeps all waiting
    run = describe_run(options, scmoe) | {"operators": times and asdict(times), "slots": slots}
    systems = measure(models, shape, scmoe, options.rounds, options.warmup)
    result = run | evaluate(systems, shape)
    first_rank = torch.distributed.get_rank() == 0
    if first_rank:  # optimizers may not fit into memory
        write(result, options.json, options.plot)
    if options.train_rounds:
        took = measure_training(
            models, shape, scmoe, options.train_rounds, options.warmup, options.train_micro_batches
        )
        for name, milliseconds in took.items():
            systems[name]["train_ms"] = milliseconds
        result = run | evaluate(systems, shape)
        if first_rank:
            write(result, options.json, options.plot)
    if first_rank:
        print(table(result), flush=True)
    for helper in captures:  # NCCL waits for graphs that hold its collectives
        helper.delete_cuda_graphs()
    torch.distributed.destroy_process_group()


def describe_run(options: Namespace, scmoe: ScMoEConfig) -> dict:
    """What was measured, on what, how: everything a rerun needs."""
    return {
        "shape": options.shape,
        "sizes": asdict(options.sizes),
        "tap": scmoe.tap,
        "slot": scmoe.expert_slot,
        "chunks": scmoe.chunks,
        "exchange": scmoe.exchange,
        "copied": scmoe.copy_engine_all_to_alls,
        "ep_channels": options.ep_channels,
        "ep_high_priority": options.ep_high_priority,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "train_rounds": options.train_rounds,
        "train_micro_batches": options.train_micro_batches,
        **machine.describe(),
    }


if __name__ == "__main__":
    run_tool(main)
