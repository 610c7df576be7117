"""Step time of ScMoE and of stock Megatron-Core, side by side in one process group.

    torchrun --nproc-per-node 4 benchmarks/step_time.py --shape wide --json wide.json --plot wide.png
    NCCL_P2P_DISABLE=1 torchrun ...      # host-staged communication, the PCIe-like case
    benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/step_time.py --shape cpu   # no GPU

Every system is a whole GPTModel of the same shape, with experts spread over all ranks and routing
forced to be balanced. The systems take turns, step by step, so that drift of the machine hits all
alike; medians over the rounds are reported.
"""

import argparse
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
from pathlib import Path
from typing import ClassVar, get_args

from megatron_scmoe import cpu

ON_CPU = cpu.enable_if_no_gpu()
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

from megatron_scmoe import tuning
from megatron_scmoe.config import Exchange, ScMoEConfig
from megatron_scmoe.copy_engine import exchange_for
from megatron_scmoe.exchange import AllToAll
from megatron_scmoe.moe_layer import ScMoELayer
from megatron_scmoe.spec import build_block_spec, resolve_schedule
from megatron_scmoe.timeline import OperatorTimes


@dataclass(frozen=True)
class Shape:
    """A model and a micro-batch. Sizes in elements, ``sequence`` and ``micro_batch`` per rank.

    ``topk`` experts are routed to beside a shared expert of ``topk`` times their size, against
    2 x ``topk`` experts without one: the same active parameters.
    """

    blocks: int
    hidden: int
    heads: int
    ffn: int
    expert_ffn: int
    experts: int
    topk: int
    sequence: int
    micro_batch: int
    vocab: int = 32000
    every_block: bool = False
    query_groups: int | None = None
    router_fusion: bool = False
    cuda_graphs: tuple[str, ...] = ()


SHAPES = {
    "gpt2-small": Shape(12, 768, 12, 3072, 3072, 8, 1, 1024, 64),
    "gpt2-medium": Shape(12, 1024, 16, 4096, 4096, 8, 1, 2048, 32),  # of 24 blocks
    "gpt3-xl": Shape(8, 2048, 32, 8192, 8192, 8, 1, 2048, 16),  # of 24 blocks
    "llama2": Shape(8, 2048, 16, 5632, 5632, 8, 1, 2048, 16, every_block=True, query_groups=4),
    "fine": Shape(8, 2048, 16, 5632, 1408, 64, 4, 4096, 8),
    "wide": Shape(12, 2048, 16, 5632, 5632, 8, 1, 4096, 4),
    "cpu": Shape(4, 256, 4, 512, 512, 8, 1, 128, 8, vocab=512),
}
"""By name. The paper's models have their blocks cut, so that all systems fit on one GPU beside each
other, and micro-batches large enough that kernels, not their launches, take the time."""

STOCK = ("top2", "top1", "shared", "shared-overlap", "top2-1f1b")
SCMOE = ("scmoe-serial", "scmoe", "floor")
SYSTEMS = (*STOCK, *SCMOE)

MICRO_BATCHES_1F1B = 8
"""Micro-batches in which top2-1f1b is timed: it overlaps one's forward with another's backward."""


class NoExchange(AllToAll):
    """An exchange of nothing: what arrives is a buffer of the right length, filled once for all.

    Its values are random, as the power that a GPU draws, and so its clock, depends on them.
    """

    _buffers: ClassVar[dict[tuple, torch.Tensor]] = {}

    def _start(self, tensors, output_splits, input_splits):
        return [
            self._buffer(tensor, tensor.shape[0] if output_splits is None else sum(output_splits))
            for tensor in tensors
        ]

    def _buffer(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        key = (like.dtype, like.shape[1:])
        if key not in self._buffers or self._buffers[key].shape[0] < rows:
            shape = (rows + rows // 8, *like.shape[1:])
            self._buffers[key] = 0.5 + 0.1 * torch.randn(shape).to(like.dtype).cuda()
        return self._buffers[key][:rows]

    def _finish(self, outputs):
        return tuple(outputs)


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
        modules = ["attn"] + ["mlp"] * (not shape.every_block)
        modules += ["moe_router"]
        if (
            system != "shared-overlap"
        ):  # Megatron's shared expert refuses to begin twice, in warm-up
            modules += ["moe_preprocess"]
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
                own = exchange_for(dispatcher.ep_group, scmoe.exchange)
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
    """A whole training iteration of one micro-batch, with Megatron's data-parallel overlaps on."""

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

    def iteration(self, batch: Batch) -> None:
        """Forward, backward, gradient reduction, clipping, Adam, parameter gathering."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        batch.loss(self.model).backward()
        finalize_model_grads([self.model])
        self.optimizer.step()


def shuffled(models: dict, turn: int) -> list[tuple[str, GPTModel]]:
    """The systems in another order every turn: a GPU's clock depends on what it has just done."""
    systems = list(models.items())
    random.Random(turn).shuffle(systems)
    return systems


def measure(models: dict, shape: Shape, scmoe: ScMoEConfig, options) -> dict:
    """Medians in ms and peak memory in MiB by system; the systems take turns."""
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
    return {
        name: {key: statistics.median(values) for key, values in found.items() if values}
        | {"peak_memory_mb": peaks[name]}
        for name, found in times.items()
    }


def measure_training(models: dict, shape: Shape, scmoe: ScMoEConfig, options) -> dict:
    """Median ms of a whole training iteration by system. The models are wrapped for good."""
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
            took = timed(partial(trainers[id(model)].iteration, batch))
            if turn >= options.warmup:
                times.setdefault(name, []).append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def trace(path: str, run: Callable[[], None]) -> None:
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
        profile.export_chrome_trace(path)


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


def hidden_share(systems: dict, key: str) -> float | None:
    """(serial - overlapped) / (serial - floor): 1 if all of the communication is hidden."""
    if not {"scmoe", "scmoe-serial", "floor"} <= systems.keys():
        return None
    serial, overlapped, floor = (systems[n][key] for n in ("scmoe-serial", "scmoe", "floor"))
    return (serial - overlapped) / (serial - floor)


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
    keys = [
        k for k in ("step_ms", "forward_ms", "train_ms") if any(k in r for r in systems.values())
    ]
    titles = "".join(f"{key.replace('_', ' '):>12}{'over':>8}" for key in keys)
    lines = [
        f"{result['shape']} on {result['world_size']} ranks, {result['link']}",
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


def plot(result: dict, path: str) -> None:
    """Step and forward time of each system as bars."""
    from matplotlib.figure import Figure

    systems = result["systems"]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    places = range(len(systems))
    for offset, key in ((-0.2, "step_ms"), (0.2, "forward_ms")):
        bars = axes.bar(
            [place + offset for place in places],
            [row.get(key, 0) for row in systems.values()],
            width=0.38,
            label=key.removesuffix("_ms"),
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(list(places), list(systems))
    axes.set_ylabel("ms a micro-batch")
    axes.set_title(f"{result['shape']}, {result['world_size']} ranks, {result['link']}")
    axes.legend()
    figure.savefig(path, dpi=130)


def link_name() -> str:
    """How the ranks are joined, by the environment."""
    if ON_CPU:
        return os.environ.get("SCMOE_LINK", "gloo on one host")
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "socket" if os.environ.get("NCCL_SHM_DISABLE") == "1" else "host-staged"
    return "native"


def parse_options() -> Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM",
        help=f"of {', '.join(SYSTEMS)}; default: all (on the CPU all but top2-1f1b)")  # fmt: skip
    parser.add_argument("--tap", choices=("pos1", "pos2", "pos3"), default="pos2")
    parser.add_argument("--exchange", choices=get_args(Exchange), default="collective",
        help="what carries the all-to-alls of ScMoE (default collective)")  # fmt: skip
    parser.add_argument("--slot", help="expert slot, or auto: measured (default: the tap's)")
    parser.add_argument(
        "--chunks", type=int, default=1, metavar="N", help="token chunks (default 1)"
    )
    parser.add_argument(
        "--ep-channels",
        type=int,
        metavar="N",
        help="NCCL channels of the expert group at most (Megatron's communicator configuration)",
    )
    parser.add_argument(
        "--ep-high-priority", action="store_true", help="stream of the expert group"
    )
    parser.add_argument(
        "--router-fusion", action="store_true", help="--moe-router-fusion, all systems"
    )
    parser.add_argument("--cuda-graphs", nargs="*", metavar="MODULE",
        help="capture MODULEs of scmoe, as --cuda-graph-modules names them (default: all it can), and "
        "of stock all it can")  # fmt: skip
    parser.add_argument("--micro-batch", type=int, metavar="N", help="instead of the shape's")
    parser.add_argument("--blocks", type=int, metavar="N", help="instead of the shape's")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    parser.add_argument("--warmup", type=int, default=4, help="rounds before (default 4)")
    parser.add_argument("--train-rounds", type=int, default=0, metavar="N",
        help="measured whole training iterations, train_ms (default 0: left out)")  # fmt: skip
    parser.add_argument("--operators", action="store_true", help="measure operator times and slots")
    parser.add_argument("--trace", metavar="FILE", help="write a profiler trace of a scmoe step")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart (PNG)")
    options = parser.parse_args()
    if options.systems is None:
        options.systems = [name for name in SYSTEMS if not (ON_CPU and name == "top2-1f1b")]
    elif ON_CPU and "top2-1f1b" in options.systems:
        parser.error("--systems top2-1f1b: Megatron's 1F1B overlap wants a GPU; leave it out")
    if options.trace and "scmoe" not in options.systems:
        parser.error("--trace: it traces a step of scmoe; accepted: --systems with scmoe")
    if options.cuda_graphs is not None and ON_CPU:
        parser.error("--cuda-graphs: there is no GPU; leave it out")
    if options.cuda_graphs is not None and options.train_rounds:
        parser.error("--train-rounds with --cuda-graphs: the optimizer moves captured weights")
    if options.exchange == "copy-peer" and os.environ.get("NCCL_P2P_DISABLE") == "1":
        parser.error("--exchange copy-peer under NCCL_P2P_DISABLE=1: it copies from GPU to GPU all "
            "the same; accepted: copy-host")  # fmt: skip
    if options.slot not in (None, "auto"):
        options.slot = int(options.slot)
    return options


def graph_modules(options: Namespace) -> tuple[str, ...]:
    """What is captured of ScMoE; by default all it can be (see validation.py)."""
    if options.cuda_graphs is None:
        return ()
    if options.cuda_graphs:
        return tuple(options.cuda_graphs)
    if options.tap == "pos1" or options.chunks > 1 or SHAPES[options.shape].every_block:
        return ("attn",)
    return ("attn", "mlp", "moe_router", "moe_preprocess")


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


def tune(model: GPTModel, shape: Shape, scmoe: ScMoEConfig) -> tuple[OperatorTimes, int]:
    """Operator times, printed with the block time of every slot, and the fastest slot."""
    pair = tuning.find_pair([model])
    times, measured = tuning.measure(pair, scmoe, shape.micro_batch, shape.sequence)
    slot = min(range(len(measured)), key=measured.__getitem__)
    if torch.distributed.get_rank() == 0:
        predicted = tuning.predict(scmoe, times)
        print(tuning.describe(times, predicted, measured, slot, None), flush=True)
    return times, slot


def main() -> None:
    """Build the systems, measure them in turn, report."""
    options = parse_options()
    shape = SHAPES[options.shape]
    shape = replace(
        shape,
        micro_batch=options.micro_batch or shape.micro_batch,
        blocks=options.blocks or shape.blocks,
        router_fusion=options.router_fusion,
        cuda_graphs=graph_modules(options),
    )
    scmoe = ScMoEConfig(
        tap="pos1" if shape.every_block else options.tap,
        combine="add",
        expert_slot=options.slot,
        chunks=options.chunks,
        exchange=options.exchange,
    )
    initialise(options.ep_channels, options.ep_high_priority, bool(shape.cuda_graphs))
    models = build_all(options.systems, shape, scmoe)
    times = None
    if "scmoe" in models:
        switch("scmoe", models["scmoe"], scmoe)
        if options.operators or options.slot == "auto":
            times, slot = tune(models["scmoe"], shape, scmoe)
            if options.slot == "auto":
                scmoe = replace(scmoe, expert_slot=slot)
    captures = capture(models, shape)  # after tuning, which runs operators one by one
    if options.trace:
        switch("scmoe", models["scmoe"], scmoe)
        trace(options.trace, partial(step, models["scmoe"], Batch.random(shape)))
    gc.collect()
    gc.freeze()
    gc.disable()  # as --manual-gc does: a collection on one rank keeps all waiting
    systems = measure(models, shape, scmoe, options)
    if options.train_rounds:
        for name, took in measure_training(models, shape, scmoe, options).items():
            systems[name]["train_ms"] = took
    for name, row in systems.items():
        row |= rates(name, row, shape)
        if shape.cuda_graphs:
            row["peak_memory_mb"] = None  # the graphs' memory was taken before
    result = {
        "shape": options.shape,
        "sizes": asdict(shape),
        "tap": scmoe.tap,
        "slot": scmoe.expert_slot,
        "chunks": scmoe.chunks,
        "ep_channels": options.ep_channels,
        "ep_high_priority": options.ep_high_priority,
        "exchange": options.exchange,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("NCCL_", "NVTE_", "CUDA_DEVICE_MAX"))
        },
        "link": link_name(),
        "device": "cpu" if ON_CPU else torch.cuda.get_device_name(),
        "world_size": torch.distributed.get_world_size(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.rounds,
        "systems": systems,
        "operators": times and asdict(times),
        "hidden_share": {
            "step": hidden_share(systems, "step_ms"),
            "forward": hidden_share(systems, "forward_ms"),
        },
    }
    if torch.distributed.get_rank() == 0:
        print(report(result), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
        if options.plot:
            plot(result, options.plot)
    for helper in captures:  # NCCL waits for graphs that hold its collectives
        helper.delete_cuda_graphs()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
