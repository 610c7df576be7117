"""Step time of ScMoE and of stock Megatron-Core, side by side in one process group.

    torchrun --nproc-per-node 4 benchmarks/step_time.py --shape wide --json wide.json --plot wide.png
    NCCL_P2P_DISABLE=1 torchrun ...      # host-staged communication, the PCIe-like case
    benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/step_time.py --shape cpu   # no GPU

Every system is a whole GPTModel of the same shape, with experts spread over all ranks and routing
forced to be balanced. The systems take turns, step by step, so that drift of the machine hits all
alike; medians over the rounds are reported.
"""

import gc
import json
import logging
import os
import random
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from options import parse

from megatron_scmoe.platform.command_line import asks_for_help

if __name__ == "__main__" and asks_for_help():
    parse(on_cpu=False)  # shows it and ends, before the seconds that the imports below take

from megatron_scmoe.platform import cpu_backend

ON_CPU = cpu_backend.enable_if_no_gpu()
logging.getLogger("megatron").setLevel(logging.ERROR)  # lists of parameters, before every table

import torch
import yaml
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler
from megatron.training.training import num_floating_point_operations
from shapes import SCMOE, STOCK, Shape

from megatron_scmoe.analysis import slot_tuner
from megatron_scmoe.analysis.simulator import OperatorTimes
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.layer_spec import build_block_spec, resolve_schedule
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.async_all_to_all import AllToAll
from megatron_scmoe.overlap.copy_engine import exchange_for
from megatron_scmoe.platform.command_line import run_tool, staged_outputs

MICRO_BATCHES_1F1B = 8
"""Micro-batches in which top2-1f1b is timed: it overlaps one's forward with another's backward."""


class NoExchange(AllToAll):
    """An exchange of nothing: what arrives is a buffer of the right length, filled once for all.

    Filled with rows of what was to be sent, as the time of a GEMM depends on its values: on the power
    that it draws, and so on the GPU's clock.
    """

    _buffers: ClassVar[dict[tuple, torch.Tensor]] = {}

    def _start(self, name, tensors, output_splits, input_splits):
        return [
            self._buffer(
                name, tensor, tensor.shape[0] if output_splits is None else sum(output_splits)
            )
            for tensor in tensors
        ]

    def _finish(self):
        return tuple(self._outputs)

    def _buffer(self, name: str, like: torch.Tensor, rows: int) -> torch.Tensor:
        key = (name, like.dtype, like.shape[1:])
        if key not in self._buffers or self._buffers[key].shape[0] < rows:
            picked = torch.randint(like.shape[0], (rows + rows // 8,), device=like.device)
            self._buffers[key] = like.detach()[picked]
            torch.cuda.synchronize()  # no wait follows
        return self._buffers[key][:rows]


def transformer_config(system: str, shape: Shape) -> TransformerConfig:
    """The settings of one system's model; those of speed are the same for all."""
    te = not ON_CPU
    dtype = torch.bfloat16 if te else torch.float32
    shared = system not in ("top2", "top1", "top2-1f1b")
    return TransformerConfig(
        num_layers=shape.blocks,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.query_groups or shape.heads,
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=te,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=shape.experts,
        moe_ffn_hidden_size=shape.expert_ffn,
        moe_layer_freq=1 if shape.every_block else [0, 1] * (shape.blocks // 2),
        moe_shared_expert_intermediate_size=shape.topk * shape.expert_ffn if shared else None,
        moe_shared_expert_overlap=system == "shared-overlap",
        overlap_moe_expert_parallel_comm=system == "top2-1f1b",
        moe_router_topk=2 * shape.topk if system.startswith("top2") else shape.topk,
        moe_router_pre_softmax=True,
        moe_router_fusion=shape.router_fusion,
        moe_router_force_load_balancing=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=te,
        moe_permute_fusion=te,
        apply_rope_fusion=te,
        bias_dropout_fusion=te,
        cross_entropy_loss_fusion=te,
        cross_entropy_fusion_impl="native",
        transformer_impl="transformer_engine" if te else "local",
        bf16=te,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        expert_model_parallel_size=torch.distributed.get_world_size(),
        **graph_settings(system, shape),
    )


def graph_settings(system: str, shape: Shape) -> dict:
    """What of the blocks each system captures: of stock all it can."""
    if not shape.cuda_graphs or system == "top2-1f1b":
        return {}
    modules = list(shape.cuda_graphs)
    if system in STOCK:
        modules = ["attn", *(["mlp"] if not shape.every_block else []), "moe_router"]
        # In capture's warm-up Megatron's overlapped shared expert refuses to begin twice.
        if system != "shared-overlap":
            modules.append("moe_preprocess")
    return {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": modules}


class GraphCapture(TECudaGraphHelper):
    """Megatron's capture for a model that no optimizer or data-parallel wrapper holds."""

    def _reset_after_capture(self):
        for parameter in self.model[0].parameters():
            parameter.grad = None


def capture(models: dict[str, GPTModel], shape: Shape) -> list[GraphCapture]:
    """Capture the CUDA graphs of every model that has some."""
    captures = [
        GraphCapture([model], model.config, shape.sequence, shape.micro_batch)
        for model in {id(model): model for model in models.values()}.values()
        if model.config.cuda_graph_impl == "transformer_engine"
    ]
    for helper in captures:
        helper.create_cudagraphs()
    return captures


def build(system: str, shape: Shape, scmoe: ScMoEConfig) -> GPTModel:
    """One system's model on this rank; those of ``SCMOE`` are one model (see :func:`switch`)."""
    config = transformer_config(system, shape)
    if system in SCMOE:
        spec = build_block_spec(config, scmoe)
    else:
        spec = get_gpt_decoder_block_spec(config, not ON_CPU, normalization="RMSNorm")
    model = GPTModel(
        config, spec, shape.vocab, shape.sequence, position_embedding_type="rope"
    ).cuda()
    return model if ON_CPU else model.bfloat16()


def build_all(systems: list[str], shape: Shape, scmoe: ScMoEConfig) -> dict[str, GPTModel]:
    """Models by system."""
    models = {}
    for system in systems:
        built = next((models[other] for other in SCMOE if other in models), None)
        models[system] = built if built and system in SCMOE else build(system, shape, scmoe)
    return models


def switch(system: str, model: GPTModel, scmoe: ScMoEConfig) -> None:
    """Make the ScMoE model serial, overlapped, or overlapped without collectives (floor)."""
    if system not in SCMOE:
        return
    schedule = resolve_schedule(replace(scmoe, overlap=system != "scmoe-serial"))
    for module in model.modules():
        if isinstance(module, ScMoELayer):
            module.path.schedule = schedule
            for dispatcher in module.token_dispatchers:
                own = exchange_for(dispatcher.ep_group, scmoe)
                dispatcher.exchange = NoExchange if system == "floor" else own


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


def shuffled(models: dict, turn: int) -> list[tuple[str, GPTModel]]:
    """The systems in another order every turn: a GPU's clock depends on what it has just done."""
    systems = list(models.items())
    random.Random(turn).shuffle(systems)
    return systems


def measure(models: dict, shape: Shape, scmoe: ScMoEConfig, options) -> dict:
    """Medians and quartiles in ms and peak memory in MiB by system; the systems take turns."""
    batch = Batch.random(shape)
    times = {name: {"step_ms": [], "forward_ms": []} for name in models}
    peaks = {}
    for turn in range(options.warmup + options.rounds):
        for name, model in shuffled(models, turn):
            switch(name, model, scmoe)
            found = {}
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            if name == "top2-1f1b":  # it has no forward of its own
                found["step_ms"] = timed(lambda m=model: steps_1f1b(m, batch)) / MICRO_BATCHES_1F1B
            else:
                found["forward_ms"] = timed(lambda m=model: forward(m, batch))
                found["step_ms"] = timed(lambda m=model: step(m, batch))
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            for parameter in model.parameters():
                parameter.grad = None
            gc.collect()
            if turn >= options.warmup:
                for key, value in found.items():
                    times[name][key].append(value)
    return {name: summary(found) | {"peak_memory_mb": peaks[name]} for name, found in times.items()}


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


def measure_training(models: dict, shape: Shape, scmoe: ScMoEConfig, options) -> dict:
    """Median ms of whole training iterations, a micro-batch, by system; models are wrapped for good.

    None of top2-1f1b: it overlaps several micro-batches.
    """
    batch = Batch.random(shape)
    trainers: dict[int, Trainer] = {}
    times: dict[str, list[float]] = {}
    for turn in range(options.warmup + options.train_rounds):
        for name, model in shuffled(models, turn):
            if name == "top2-1f1b":
                continue
            switch(name, model, scmoe)
            if id(model) not in trainers:
                trainers[id(model)] = Trainer(model)
            iteration = partial(trainers[id(model)].iteration, batch, options.train_micro_batches)
            took = timed(iteration)
            if turn >= options.warmup:
                times.setdefault(name, []).append(took / options.train_micro_batches)
    return {name: statistics.median(values) for name, values in times.items()}


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


class _Settings(Namespace):
    """Megatron's FLOP count reads many arguments; those of other models are None."""

    def __getattr__(self, name):
        return None


def flops(system: str, shape: Shape) -> float:
    """Floating-point operations of one micro-batch, forward and backward, as Megatron counts."""
    config = transformer_config(system, shape)
    settings = _Settings(
        **{name: getattr(config, name) for name in ("num_layers", "hidden_size", "kv_channels")},
        num_attention_heads=shape.heads,
        num_query_groups=config.num_query_groups,
        group_query_attention=True,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.expert_ffn,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        moe_router_topk=config.moe_router_topk,
        moe_layer_freq=config.moe_layer_freq,
        num_experts=shape.experts,
        seq_length=shape.sequence,
        padded_vocab_size=shape.vocab,
        swiglu=True,
    )
    return num_floating_point_operations(settings, shape.micro_batch)


def measured_keys(systems: dict) -> list[str]:
    """What was measured of any system."""
    keys = ("step_ms", "forward_ms", "train_ms")
    return [key for key in keys if any(key in row for row in systems.values())]


def hidden_share(systems: dict, key: str) -> float | None:
    """(serial - overlapped) / (serial - floor): 1 if all of the communication is hidden.

    None if one of the three is missing, or if there is nothing to hide.
    """
    if not set(SCMOE) <= systems.keys():
        return None
    serial, overlapped, floor = (systems[n][key] for n in ("scmoe-serial", "scmoe", "floor"))
    return (serial - overlapped) / (serial - floor) if serial > floor else None


def rates(name: str, row: dict, shape: Shape) -> dict:
    """Tokens a second of all ranks and TFLOP/s of one, of training if measured, else of steps."""
    seconds = row.get("train_ms", row["step_ms"]) / 1e3
    tokens = shape.micro_batch * shape.sequence * torch.distributed.get_world_size()
    return {
        "tokens_per_s": tokens / seconds,
        "tflops_per_gpu": flops(name, shape) / seconds / 1e12,
    }


def report(result: dict) -> str:
    """The table that is printed."""
    systems = result["systems"]
    base = systems.get("top2") or next(iter(systems.values()))
    keys = measured_keys(systems)
    titles = "".join(f"{key.replace('_', ' '):>12}{'over':>8}" for key in keys)
    lines = [
        title(result),
        f"{'system':<16}{titles}{'peak MiB':>10}{'tokens/s':>11}{'TFLOP/s':>9}",
    ]
    for name, row in systems.items():
        cells = "".join(
            f"{row[key]:>12.2f}{base[key] / row[key]:>7.3f}x"
            if key in row
            else f"{'-':>12}{'-':>8}"
            for key in keys
        )
        peak = row["peak_memory_mb"]
        rest = f"{'-' if peak is None else f'{peak:.0f}':>10}{row['tokens_per_s']:>11.0f}"
        rest += f"{row['tflops_per_gpu']:>9.1f}"
        lines.append(f"{name:<16}{cells}{rest}")
    for key, share in result["hidden_share"].items():
        if share is not None:
            lines.append(f"hidden share, {key}: {share:.3f}")
    return "\n".join(lines)


def title(result: dict) -> str:
    """The shape, if it is cut also how much of the model it is, the ranks and the link."""
    blocks, of_blocks = (result["sizes"].get(key) for key in ("blocks", "of_blocks"))
    cut = f" ({blocks} of {of_blocks} blocks)" if of_blocks not in (None, blocks) else ""
    return f"{result['shape']}{cut} on {result['world_size']} ranks, {result['link']}"


def plot(result: dict, path: Path) -> None:
    """Each system's times as bars."""
    from matplotlib.figure import Figure

    systems, keys = result["systems"], measured_keys(result["systems"])
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(keys)
    for number, key in enumerate(keys):
        rows = [(place, row[key]) for place, row in enumerate(systems.values()) if key in row]
        places, heights = zip(*rows, strict=True)
        bars = axes.bar(
            [place + (number - (len(keys) - 1) / 2) * width for place in places],
            heights,
            width=0.95 * width,
            label=key.removesuffix("_ms"),
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    names = [name.replace("-", "\n", 1) for name in systems]
    axes.set_xticks(range(len(systems)), names, fontsize=8)
    axes.set_ylabel("ms a micro-batch")
    axes.set_title(title(result))
    axes.legend()
    figure.savefig(path, dpi=130)


def link_name() -> str:
    """How the ranks are joined, by the environment."""
    if ON_CPU:
        return os.environ.get("SCMOE_LINK", "gloo on one host")
    ranks, of_host = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if ranks != of_host:
        return f"{int(ranks) // int(of_host)} hosts"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "socket" if os.environ.get("NCCL_SHM_DISABLE") == "1" else "host-staged"
    return "native"


def initialise(ep_channels: int | None, ep_high_priority: bool, graphs: bool = False) -> None:
    """Process groups, with all ranks in the expert group, and random states."""
    settings: dict = {}
    if ep_channels:
        settings |= {"min_ctas": 1, "max_ctas": ep_channels}
    if ep_high_priority:
        settings["is_high_priority_stream"] = True
    if ON_CPU:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("gloo" if ON_CPU else "nccl")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as channels:
        if settings:
            yaml.safe_dump({"ep": settings}, channels)
            channels.flush()
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=torch.distributed.get_world_size(),
            nccl_communicator_config_path=channels.name if settings else None,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(1, te_rng_tracker=graphs)
    if graphs:  # as Megatron's entry point does
        init_num_microbatches_calculator(0, None, 1, 1, 1)
        torch.cuda.set_stream(torch.cuda.Stream())
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1).cuda())


def tune(
    model: GPTModel, shape: Shape, scmoe: ScMoEConfig
) -> tuple[OperatorTimes, list[dict[str, float]], int]:
    """Operator times, of every slot the block time as predicted and measured, and the fastest slot.

    The first rank prints them.
    """
    pair = slot_tuner.find_pair([model])
    times, measured = slot_tuner.measure(pair, scmoe, shape.micro_batch, shape.sequence)
    predicted = slot_tuner.predict(scmoe, times)
    fastest = min(range(len(measured)), key=measured.__getitem__)
    if torch.distributed.get_rank() == 0:
        print(slot_tuner.describe(times, predicted, measured, fastest, None), flush=True)
    slots = [
        {"predicted_ms": by_times, "measured_ms": found}
        for by_times, found in zip(predicted, measured, strict=True)
    ]
    return times, slots, fastest


def keep(result: dict, options: Namespace) -> None:
    """Write the files that were asked for, on the first rank."""
    if torch.distributed.get_rank() != 0:
        return
    if options.json:
        with staged_outputs("--json", [options.json]) as (staged,):
            staged.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        with staged_outputs("--plot", [options.plot]) as (staged,):
            plot(result, staged)


def evaluate(systems: dict, shape: Shape) -> dict:
    """Rates of every system, and what is hidden."""
    for name, row in systems.items():
        row |= rates(name, row, shape)
        if shape.cuda_graphs or ON_CPU:
            row["peak_memory_mb"] = None  # graphs took theirs before; a CPU tells none
    shares = {key.removesuffix("_ms"): hidden_share(systems, key) for key in measured_keys(systems)}
    return {"systems": systems, "hidden_share": shares}


def describe_run(options: Namespace, scmoe: ScMoEConfig) -> dict:
    """What was measured, on what, how: everything a rerun needs."""
    versions = ("torch", "megatron-core", "transformer-engine")
    return {
        "shape": options.shape,
        "sizes": asdict(options.sizes),
        "tap": scmoe.tap,
        "slot": scmoe.expert_slot,
        "chunks": scmoe.chunks,
        "exchange": scmoe.exchange,
        "copied": scmoe.copied,
        "ep_channels": options.ep_channels,
        "ep_high_priority": options.ep_high_priority,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "train_rounds": options.train_rounds,
        "train_micro_batches": options.train_micro_batches,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("NCCL_", "NVTE_", "CUDA_DEVICE_MAX"))
        },
        "versions": {name: installed_version(name) for name in versions},
        "link": link_name(),
        "device": "cpu" if ON_CPU else torch.cuda.get_device_name(),
        "world_size": torch.distributed.get_world_size(),
        "date": time.strftime("%Y-%m-%d"),
    }


def installed_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Build the systems, measure them in turn, report."""
    options = parse(ON_CPU)
    shape = options.sizes
    scmoe = ScMoEConfig(
        tap=options.tap,
        combine="add",
        expert_slot=options.slot,
        chunks=options.chunks,
        exchange=options.exchange,
        copied=options.copied,
    )
    initialise(options.ep_channels, options.ep_high_priority, bool(shape.cuda_graphs))
    models = build_all(options.systems, shape, scmoe)
    times = slots = None
    if "scmoe" in models:
        switch("scmoe", models["scmoe"], scmoe)
        if options.operators or options.slot == "auto":
            times, slots, fastest = tune(models["scmoe"], shape, scmoe)
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
    systems = measure(models, shape, scmoe, options)
    result = run | evaluate(systems, shape)
    keep(result, options)  # optimizers may not fit into memory
    if options.train_rounds:
        for name, took in measure_training(models, shape, scmoe, options).items():
            systems[name]["train_ms"] = took
        result = run | evaluate(systems, shape)
        keep(result, options)
    if torch.distributed.get_rank() == 0:
        print(report(result), flush=True)
    for helper in captures:  # NCCL waits for graphs that hold its collectives
        helper.delete_cuda_graphs()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_tool(main)
