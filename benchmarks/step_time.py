"""Step time of ScMoE and of stock Megatron-Core, side by side in one process group.

    torchrun --nproc-per-node 4 benchmarks/step_time.py --shape wide --json wide.json --plot wide.png
    NCCL_P2P_DISABLE=1 torchrun ...      # host-staged communication, the PCIe-like case
    benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/step_time.py --shape cpu   # no GPU

Every system is a whole GPTModel of the same shape, with experts spread over all ranks and routing
forced to be balanced. The systems take turns, step by step, so that drift of the machine hits all
alike; medians over the rounds are reported.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_scmoe import cpu

ON_CPU = cpu.enable_if_no_gpu()

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.exchange import AllToAll
from megatron_scmoe.moe_layer import ScMoELayer
from megatron_scmoe.spec import build_block_spec


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


SHAPES = {
    "gpt2-small": Shape(12, 768, 12, 3072, 3072, 8, 1, 1024, 8),
    "gpt2-medium": Shape(12, 1024, 16, 4096, 4096, 8, 1, 2048, 8),  # of 24 blocks
    "gpt3-xl": Shape(8, 2048, 32, 8192, 8192, 8, 1, 2048, 4),  # of 24 blocks
    "llama2": Shape(8, 2048, 16, 5632, 5632, 8, 1, 2048, 4, every_block=True, query_groups=4),
    "fine": Shape(8, 2048, 16, 5632, 1408, 64, 4, 4096, 2),
    "wide": Shape(12, 2048, 16, 5632, 5632, 8, 1, 4096, 4),
    "cpu": Shape(4, 512, 8, 1024, 1024, 8, 1, 256, 2, vocab=512),
}
"""By name; the paper's models have their blocks cut to fit beside each other on one GPU."""

SYSTEMS = ("top2", "top1", "shared", "shared-overlap", "scmoe-serial", "scmoe", "floor")


class NoExchange(AllToAll):
    """An exchange of nothing: what arrives is what was sent, cut or padded to the right length."""

    def _start(self, tensors, output_splits, input_splits):
        outputs = []
        for tensor in tensors:
            rows = tensor.shape[0] if output_splits is None else sum(output_splits)
            if rows > tensor.shape[0]:
                padding = tensor.new_zeros((rows - tensor.shape[0], *tensor.shape[1:]))
                tensor = torch.cat([tensor, padding])
            outputs.append(tensor[:rows])
        return outputs


def build(system: str, shape: Shape, options) -> GPTModel:
    """One system's model on this rank."""
    shared = system not in ("top2", "top1")
    topk = 2 * shape.topk if system == "top2" else shape.topk
    dtype = torch.float32 if ON_CPU else torch.bfloat16
    te = not ON_CPU
    config = TransformerConfig(
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
        moe_router_topk=topk,
        moe_router_pre_softmax=True,
        moe_router_force_load_balancing=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=te,
        moe_permute_fusion=te,
        apply_rope_fusion=te,
        bias_dropout_fusion=te,
        transformer_impl="transformer_engine" if te else "local",
        bf16=te,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        expert_model_parallel_size=torch.distributed.get_world_size(),
    )
    if system in ("scmoe", "scmoe-serial", "floor"):
        tap = "pos1" if shape.every_block else options.tap
        scmoe = ScMoEConfig(
            tap=tap,
            combine="add",
            expert_slot=options.slot,
            overlap=system != "scmoe-serial",
        )
        spec = build_block_spec(config, scmoe)
    else:
        spec = get_gpt_decoder_block_spec(config, te, normalization="RMSNorm")
    model = GPTModel(
        config, spec, shape.vocab, shape.sequence, position_embedding_type="rope"
    ).cuda()
    if system == "floor":  # what perfect hiding would give
        for module in model.modules():
            if isinstance(module, ScMoELayer):
                for dispatcher in module.token_dispatchers:
                    dispatcher.exchange = NoExchange
    return model if ON_CPU else model.bfloat16()


def measure(models: dict, shape: Shape, rounds: int, warmup: int, trace: str | None) -> dict:
    """Medians in ms of forward, and of forward with backward, by system; interleaved."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    tokens = torch.randint(
        shape.vocab, (shape.micro_batch, shape.sequence + 1), generator=generator
    ).cuda()
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(shape.sequence, device=ids.device).expand_as(ids)
    if trace:
        _trace(trace, models["scmoe"], lambda m: _forward(m, ids, positions, labels).backward())
    times = {name: {"step_ms": [], "forward_ms": []} for name in models}
    peaks = {}
    for turn in range(warmup + rounds):
        for name, model in models.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            forward = _timed(lambda m=model: _forward(m, ids, positions, labels, grad=False))
            step = _timed(lambda m=model: _forward(m, ids, positions, labels).backward())
            if turn >= warmup:
                times[name]["forward_ms"].append(forward)
                times[name]["step_ms"].append(step)
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            for parameter in model.parameters():
                parameter.grad = None
    return {
        name: {key: statistics.median(values) for key, values in found.items()}
        | {"peak_memory_mb": peaks[name]}
        for name, found in times.items()
    }


def _forward(model, ids, positions, labels, grad=True):
    with torch.set_grad_enabled(grad):
        return model(ids, positions, None, labels=labels).float().mean()


def _trace(path: str, model, step) -> None:
    """Write a profiler trace of one warm step of the first rank, forward and backward."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not ON_CPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for _ in range(3):
        step(model)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step(model)
        torch.cuda.synchronize()
    if torch.distributed.get_rank() == 0:
        profile.export_chrome_trace(path)


def _timed(function) -> float:
    """Milliseconds of the slowest rank."""
    torch.cuda.synchronize()
    torch.distributed.barrier()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    took = torch.tensor([(time.perf_counter() - begin) * 1e3], device="cuda")
    torch.distributed.all_reduce(took, op=torch.distributed.ReduceOp.MAX)
    return took.item()


def hidden_share(systems: dict, key: str) -> float | None:
    """(serial - overlapped) / (serial - floor): 1 if all of the communication is hidden."""
    if not {"scmoe", "scmoe-serial", "floor"} <= systems.keys():
        return None
    serial, overlapped, floor = (systems[n][key] for n in ("scmoe-serial", "scmoe", "floor"))
    return (serial - overlapped) / (serial - floor)


def report(result: dict) -> str:
    """The table that is printed."""
    systems = result["systems"]
    base = systems.get("top2") or next(iter(systems.values()))
    lines = [
        f"{result['shape']} on {result['world_size']} ranks, {result['link']}",
        f"{'system':<16}{'step ms':>10}{'forward ms':>12}"
        f"{'step x':>9}{'forward x':>11}{'peak MiB':>10}",
    ]
    for name, row in systems.items():
        lines.append(
            f"{name:<16}{row['step_ms']:>10.2f}{row['forward_ms']:>12.2f}"
            f"{base['step_ms'] / row['step_ms']:>9.3f}{base['forward_ms'] / row['forward_ms']:>11.3f}"
            f"{row['peak_memory_mb']:>10.0f}"
        )
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
            [row[key] for row in systems.values()],
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


def main() -> None:
    """Build the systems, measure them in turn, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, metavar="SYSTEM")
    parser.add_argument("--tap", choices=("pos1", "pos2", "pos3"), default="pos2")
    parser.add_argument("--slot", type=int, help="expert slot (default: the tap's)")
    parser.add_argument(
        "--ep-channels",
        type=int,
        metavar="N",
        help="NCCL channels of the expert group at most (Megatron's communicator configuration)",
    )
    parser.add_argument("--micro-batch", type=int, metavar="N", help="instead of the shape's")
    parser.add_argument("--trace", metavar="FILE", help="write a profiler trace of a scmoe step")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default 15)")
    parser.add_argument("--warmup", type=int, default=4, help="rounds before (default 4)")
    parser.add_argument("--json", metavar="FILE", help="write the result")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart (PNG)")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.micro_batch:
        shape = replace(shape, micro_batch=options.micro_batch)

    if ON_CPU:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("gloo" if ON_CPU else "nccl")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as channels:
        if options.ep_channels:
            channels.write(f"ep: {{min_ctas: 1, max_ctas: {options.ep_channels}}}\n")
            channels.flush()
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=torch.distributed.get_world_size(),
            nccl_communicator_config_path=channels.name if options.ep_channels else None,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1).cuda())

    models = {name: build(name, shape, options) for name in options.systems}
    systems = measure(models, shape, options.rounds, options.warmup, options.trace)
    result = {
        "shape": options.shape,
        "sizes": asdict(shape),
        "tap": options.tap,
        "slot": options.slot,
        "ep_channels": options.ep_channels,
        "link": link_name(),
        "device": "cpu" if ON_CPU else torch.cuda.get_device_name(),
        "world_size": torch.distributed.get_world_size(),
        "date": time.strftime("%Y-%m-%d"),
        "systems": systems,
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
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
