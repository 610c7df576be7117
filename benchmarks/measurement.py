"""How benchmarks measure: times, memory, training iterations, operators, traces, and rates from these.

The systems take turns, in another order every round, so that drift of the machine hits all alike.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from machine import ON_CPU  # maps CUDA to the CPU where there is no GPU: before Megatron
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from result import hidden_share, measured_keys
from shapes import Shape
from systems import flops, switch

from megatron_scmoe.analysis import operator_timer, slot_tuner
from megatron_scmoe.analysis.simulator import OperatorTimes
from megatron_scmoe.config import ScMoEConfig

MICRO_BATCHES_1F1B = 8
"""Micro-batches in which top2-1f1b is timed: it overlaps one's forward with another's backward."""


def measure(
    models: dict[str, GPTModel], shape: Shape, scmoe: ScMoEConfig, rounds: int, warmup: int
) -> dict[str, dict]:
    """Medians and quartiles of step and forward in ms, and peak memory in MiB, by system."""
    batch = Batch.random(shape)
    times = {name: {"step_ms": [], "forward_ms": []} for name in models}
    peaks = {}
    for name, model, counts in turns(models, rounds, warmup):
        switch(name, model, scmoe)
        found = {}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if name == "top2-1f1b":  # it has no forward of its own
            found["step_ms"] = timed(partial(steps_1f1b, model, batch)) / MICRO_BATCHES_1F1B
        else:
            found["forward_ms"] = timed(partial(forward, model, batch))
            found["step_ms"] = timed(partial(step, model, batch))
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        for parameter in model.parameters():
            parameter.grad = None
        gc.collect()
        if counts:
            for key, value in found.items():
                times[name][key].append(value)
    return {name: summary(found) | {"peak_memory_mb": peaks[name]} for name, found in times.items()}


def measure_training(
    models: dict[str, GPTModel],
    shape: Shape,
    scmoe: ScMoEConfig,
    rounds: int,
    warmup: int,
    micro_batches: int,
) -> dict[str, float]:
    """Median ms of whole training iterations, a micro-batch, by system; models are wrapped for good.

    None of top2-1f1b: it overlaps several micro-batches.
    """
    batch = Batch.random(shape)
    trainers: dict[int, Trainer] = {}
    times: dict[str, list[float]] = {}
    for name, model, counts in turns(models, rounds, warmup):
        if name == "top2-1f1b":
            continue
        switch(name, model, scmoe)
        if id(model) not in trainers:
            trainers[id(model)] = Trainer(model)
        took = timed(partial(trainers[id(model)].iteration, batch, micro_batches))
        if counts:
            times.setdefault(name, []).append(took / micro_batches)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_operators(
    model: GPTModel, shape: Shape, scmoe: ScMoEConfig
) -> tuple[OperatorTimes, list[dict[str, float]], int]:
    """Operator times, of every slot the block time as predicted and measured, and the fastest slot.

    The first rank prints them.
    """
    pair = operator_timer.find_pair([model])
    times, measured = operator_timer.measure(pair, scmoe, shape.micro_batch, shape.sequence)
    predicted = slot_tuner.predict(scmoe, times)
    fastest = min(range(len(measured)), key=measured.__getitem__)
    if torch.distributed.get_rank() == 0:
        print(slot_tuner.describe(times, predicted, measured, fastest, None), flush=True)
    slots = [
        {"predicted_ms": by_times, "measured_ms": found}
        for by_times, found in zip(predicted, measured, strict=True)
    ]
    return times, slots, fastest


def evaluate(systems: dict[str, dict], shape: Shape) -> dict:
    """Rates of every system, and what is hidden."""
    for name, row in systems.items():
        row |= _rates(name, row, shape)
        if shape.cuda_graphs or ON_CPU:
            row["peak_memory_mb"] = None  # graphs took theirs before; a CPU tells none
    shares = {key.removesuffix("_ms"): hidden_share(systems, key) for key in measured_keys(systems)}
    return {"systems": systems, "hidden_share": shares}


def trace(path: Path, run: Callable[[], None]) -> None:
    """Write a profiler trace of one warm run of the first rank."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not ON_CPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    if torch.distributed.get_rank() == 0:
        profile.export_chrome_trace(str(path))


def turns(
    models: dict[str, GPTModel], rounds: int, warmup: int
) -> Iterator[tuple[str, GPTModel, bool]]:
    """Every system once a round; whether the round counts, or is one of the ``warmup`` before.

    In another order every round: a GPU's clock depends on what it has just done.
    """
    for turn in range(warmup + rounds):
        systems = list(models.items())
        random.Random(turn).shuffle(systems)
        for name, model in systems:
            yield name, model, turn >= warmup


def timed(function: Callable[[], None]) -> float:
    """Milliseconds of the slowest rank."""
    torch.cuda.synchronize()
    torch.distributed.barrier()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    took = torch.tensor([(time.perf_counter() - begin) * 1e3], device="cuda")
    torch.distributed.all_reduce(took, op=torch.distributed.ReduceOp.MAX)
    return took.item()


def summary(times: dict[str, list[float]]) -> dict:
    """The median of each list, and the quartiles, by key."""
    measured = {key: values for key, values in times.items() if values}
    return {key: statistics.median(values) for key, values in measured.items()} | {
        "quartiles": {
            key: statistics.quantiles(values, n=4, method="inclusive")[::2]
            for key, values in measured.items()
            if len(values) > 1
        }
    }


@dataclass
class Batch:
    """One micro-batch of random tokens, [b, s] each."""

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def random(cls, shape: Shape) -> "Batch":
        """Different on every rank."""
        generator = torch.Generator().manual_seed(torch.distributed.get_rank())
        size = (shape.micro_batch, shape.sequence + 1)
        tokens = torch.randint(shape.vocab, size, generator=generator).cuda()
        positions = torch.arange(shape.sequence, device=tokens.device)
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return cls(ids, positions.expand_as(ids), labels)

    def loss(self, model) -> torch.Tensor:
        """Mean loss of the micro-batch."""
        return model(self.ids, self.positions, None, labels=self.labels).float().mean()


def forward(model, batch: Batch) -> None:
    """One micro-batch without gradients."""
    with torch.no_grad():
        batch.loss(model)


def step(model, batch: Batch) -> None:
    """Forward and backward of one micro-batch."""
    batch.loss(model).backward()


def steps_1f1b(model, batch: Batch) -> None:
    """Forward and backward of ``MICRO_BATCHES_1F1B``, one's forward beside another's backward."""

    def forward_step(_, model, return_schedule_plan=False):
        run = model.build_schedule_plan if return_schedule_plan else model
        output = run(batch.ids, batch.positions, None, labels=batch.labels)
        return output, lambda losses: (losses.float().mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=model,
        num_microbatches=MICRO_BATCHES_1F1B,
        seq_length=batch.ids.shape[1],
        micro_batch_size=batch.ids.shape[0],
        forward_only=False,
    )


class Trainer:
    """Whole training iterations, with Megatron's data-parallel overlaps on."""

    def __init__(self, model: GPTModel):
        distributed = not ON_CPU  # Megatron's distributed optimizer wants a GPU's Adam
        self.model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=True,
                overlap_param_gather=distributed,
                use_distributed_optimizer=distributed,
            ),
            model,
        )
        settings = OptimizerConfig(
            optimizer="adam",
            lr=1e-5,
            bf16=distributed,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=distributed,
            overlap_param_gather=distributed,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model])

    def iteration(self, batch: Batch, micro_batches: int) -> None:
        """Forwards, backwards, gradient reduction, clipping, Adam, parameter gathering."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        with self.model.no_sync():
            for _ in range(micro_batches - 1):
                step(self.model, batch)
        step(self.model, batch)
        finalize_model_grads([self.model])
        self.optimizer.step()


def _rates(name: str, row: dict, shape: Shape) -> dict:
    """Tokens a second of all ranks and TFLOP/s of one, of training if measured, else of steps."""
    seconds = row.get("train_ms", row["step_ms"]) / 1e3
    tokens = shape.micro_batch * shape.sequence * torch.distributed.get_world_size()
    return {
        "tokens_per_s": tokens / seconds,
        "tflops_per_gpu": flops(name, shape) / seconds / 1e12,
    }
