"""Whole training runs of ScMoE and of stock Megatron-Core, through Megatron's own loop, in turn.

    torchrun --nproc-per-node 2 benchmarks/train_run.py --shape wide --settings best best+graphs
    NCCL_P2P_DISABLE=1 torchrun ...      # host-staged communication, the PCIe-like case
    benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/train_run.py --shape cpu   # no GPU

Each run is a short training of its own: pretrain_gpt_scmoe.py, or the same loop on Megatron's own
model. The systems take turns, in another order every round. What is measured is the time that Megatron
logs for each iteration behind the warm-up: data, forwards, backwards, optimizer and the log itself.
The JSON is written after every run: what an interrupted measurement has found is kept.
"""

import os
import random
import signal
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from launched import check_launched
from train_options import parse
from train_settings import TRACED, Variant, flags, run_flags

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.platform.command_line import asks_for_help, run_tool

if __name__ == "__main__" and asks_for_help():
    parse(on_cpu=False)  # shows it and ends, before the seconds that the imports below take

import torch
from link import link_name
from report import train_table, write
from train_processes import Ranks
from train_result import Measurement

from megatron_scmoe.analysis.profiler_trace import TraceError, gpu_use
from megatron_scmoe.platform import cpu_backend


def main() -> None:
    """Run the systems in turn, report."""
    on_cpu = cpu_backend.is_asked_for() or not torch.cuda.is_available()
    options = parse(on_cpu)
    check_launched()
    signal.signal(signal.SIGTERM, _interrupt)  # what runs is ended, what was measured is shown
    series = _Series(options, Ranks.of_launcher(ahead=not on_cpu), on_cpu)
    try:
        series.run()
    finally:
        if series.is_first and series.has_measured:
            print(train_table(series.result()), flush=True)
    series.ranks.close()
    failed = [f"{name}: {found.error}" for name, found in series.found.items() if found.error]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise _RunFailedError(f"{failed[0]}{more}; --keep-logs FOLDER keeps the whole output")


class _RunFailedError(ScMoEError):
    status = 1


class _Series:
    """The runs of all rounds, and what was found so far."""

    def __init__(self, options: Namespace, ranks: Ranks, on_cpu: bool):
        self.options, self.ranks, self.on_cpu = options, ranks, on_cpu
        self.link = link_name(on_cpu)
        self.found = {
            variant.name: Measurement(options.warmup, options.iterations)
            for variant in options.variants
        }
        self.machine: dict = {}
        self.is_first = ranks.rank == 0
        self.has_measured = False

    def run(self) -> None:
        """All rounds. A variant that failed is left out of the next ones; two at the begin end it."""
        for turn in range(self.options.rounds):
            variants = list(self.options.variants)
            random.Random(turn).shuffle(variants)
            for variant in variants:
                if self.found[variant.name].error is None:
                    self._run_one(variant, turn)
                failures = sum(found.error is not None for found in self.found.values())
                if failures >= 2 and not self.has_measured:
                    return

    def _run_one(self, variant: Variant, turn: int) -> None:
        traced = self.options.trace is not None and turn + 1 == self.options.rounds
        found = self.found[variant.name]
        name = variant.name.replace("/", "-")
        with tempfile.TemporaryDirectory() as folder:
            words = self.flags(variant) + run_flags(
                self.options.iterations,
                self.options.data_path,
                self.on_cpu,
                with_tail=self.options.trace is not None,
                trace_into=folder if traced else None,
            )
            log = self.options.keep_logs and (
                self.options.keep_logs / f"{name}-round{turn + 1}-rank{self.ranks.rank}.log"
            )
            ranks = self.ranks.run(variant.is_stock, words, self.options.time_limit, log)
            found.add(ranks)
            if found.error is None and traced and self.is_first:
                found.trace = _use_of_trace(folder, self.options.trace / f"{name}.json.gz")
        self.has_measured |= found.error is None
        self.machine = ranks[0].get("machine") or self.machine
        if self.is_first:
            last = (
                found.error or f"median {self._row(variant)['rounds_ms'][-1]:.1f} ms an iteration"
            )
            print(f"round {turn + 1}, {variant.name}: {last}", flush=True)
            if self.has_measured:
                write(self.result(), self.options.json, self.options.plot)

    def flags(self, variant: Variant) -> list[str]:
        """Those that make the run what it is."""
        options = self.options
        return flags(
            variant,
            options.sizes,
            self.link,
            options.layout,
            options.micro_batches,
            options.routing == "balanced",
            self.on_cpu,
            options.flags,
        )

    def _row(self, variant: Variant) -> dict:
        layout, sizes = self.options.layout, self.options.sizes
        of_all = sizes.micro_batch * sizes.sequence * self.options.micro_batches * layout.data
        tokens = of_all // layout.ranks
        row = self.found[variant.name].row(variant, tokens, self.machine.get("device", "cpu"))
        return row | {"flags": " ".join(self.flags(variant))}

    def result(self) -> dict:
        """What was found so far, as the JSON holds it."""
        options = self.options
        return {
            "benchmark": "train_run",
            "shape": options.shape,
            "sizes": asdict(options.sizes),
            "selected": [variant.name for variant in options.variants],
            "overrides": [f"{pattern}={words}" for pattern, words in options.flags],
            "layout": asdict(options.layout),
            "micro_batches": options.micro_batches,
            "routing": options.routing,
            "data": "own" if options.data_path else "mock",
            "rounds": options.rounds,
            "iterations": options.iterations,
            "warmup": options.warmup,
            **self.machine,
            "runs": {
                variant.name: self._row(variant)
                for variant in options.variants
                if self.found[variant.name].rounds or self.found[variant.name].error
            },
        }


def _use_of_trace(folder: str, kept: Path) -> dict | None:
    """What the GPU did, per iteration; None if the trace is missing or shows nothing."""
    written = Path(folder, "torch_profile", "rank-0.json.gz")
    try:
        use = gpu_use(written)
    except TraceError as error:
        print(error, file=sys.stderr)
        return None
    kept.write_bytes(written.read_bytes())
    return use.per_iteration(TRACED)


def _interrupt(number: int, _) -> None:
    """As Ctrl-C does."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_tool(main)
