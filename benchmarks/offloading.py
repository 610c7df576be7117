"""Generation with experts on the host: memory, and the time of a token, resident and offloaded.

    python benchmarks/offloading.py --shapes gpt2-medium gpt3-xl --json offloading.json   # one GPU
    python benchmarks/offloading.py --shapes cpu                                           # no GPU

One process, random weights; on a GPU bf16, the shape's whole number of blocks, and experts in pinned
memory. On the CPU they are in files, which the system's page cache holds after the first reading. The
router decides. Tokens are sampled with the same seed. After the timed runs one more is compared between
the modes, with an attention that gives the same bits each time.

    resident      all experts on the device
    blocking      experts are fetched when they are to compute
    overlapped    experts are fetched when the gate has chosen them
    cached        the same, with a cache of a quarter of all experts
"""

import gc
import statistics
import tempfile
import time
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

from offloading_page import BENCHMARK, memory_of, printed
from shapes import SHAPES, Shape

from megatron_scmoe.platform.command_line import (
    OneLineParser,
    UsageError,
    asks_for_help,
    check_output,
    positive,
    run_tool,
)

OFFLOADED = ("blocking", "overlapped", "cached")


def parse() -> Namespace:
    """The options.

    Raises:
        UsageError: if they cannot be followed.
    """
    parser = OneLineParser(description="Memory and time of generation with experts on the host.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, required=True, metavar="SHAPE",
        help=f"of {', '.join(SHAPES)}")  # fmt: skip
    parser.add_argument("--blocks", type=positive, metavar="N", help="instead of the shape's")
    parser.add_argument("--prompt-length", type=positive, metavar="N",
        help="tokens; fewer where a shape has no room for as many (default: 512)")  # fmt: skip
    parser.add_argument(
        "--tokens", type=positive, default=48, metavar="N", help="written; 3 or more"
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="prompts at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    options = parser.parse_args()
    if options.tokens < 3:
        raise UsageError(
            f"--tokens {options.tokens}: those behind the second are timed; accepted: 3 or more"
        )
    shape = min(options.shapes, key=lambda name: SHAPES[name].sequence)
    room = SHAPES[shape].sequence - options.tokens
    if room < 1:
        raise UsageError(
            f"--tokens {options.tokens}: {shape} is for {SHAPES[shape].sequence} tokens, the prompt "
            f"included; accepted: up to {SHAPES[shape].sequence - 1}"
        )
    options.prompt_length = options.prompt_length or min(512, room)
    if options.prompt_length > room:
        raise UsageError(
            f"--prompt-length {options.prompt_length}: with --tokens {options.tokens} {shape} has "
            f"room for {room}; accepted: up to {room}"
        )
    if options.json:
        check_output("--json", options.json, [".json"])
    return options


if __name__ == "__main__" and asks_for_help():
    parse()  # shows it and ends, before the seconds that the imports below take

import machine  # maps CUDA to the CPU where there is no GPU: before Megatron
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.models.gpt import GPTModel
from report import write
from systems import transformer_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_scmoe.cli.process import initialise_ranks
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.inference import generation
from megatron_scmoe.inference.decode_schedule import Decode
from megatron_scmoe.inference.expert_cache import ExpertCache
from megatron_scmoe.inference.expert_store import (
    HostExperts,
    MappedExperts,
    Packing,
    PinnedExperts,
    pinned_memory,
)
from megatron_scmoe.inference.offloaded_experts import named_weights
from megatron_scmoe.inference.offloading import (
    ExpertOffload,
    OffloadSettings,
    connect,
    offloaded_layers,
)
from megatron_scmoe.model.layer_spec import build_block_spec


def main() -> None:
    """Measure every shape and report."""
    options = parse()
    initialise_ranks()
    parallel_state.initialize_model_parallel()
    found = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name in options.shapes:
            shape = SHAPES[name]
            blocks = options.blocks or shape.of_blocks or shape.blocks
            found[name] = measure_shape(replace(shape, blocks=blocks), options, Path(folder))
            print(printed(name, found[name]), flush=True)
    run = {name: getattr(options, name) for name in ("prompt_length", "tokens", "batch")}
    marked = {"benchmark": BENCHMARK, **machine.describe(), **run, "shapes": found}
    write(marked, options.json, None)
    torch.distributed.destroy_process_group()


def measure_shape(shape: Shape, options: Namespace, folder: Path) -> dict:
    """Every mode of a model with random weights."""
    model = build(shape, None)
    modes, expected = {}, None
    modes["resident"], expected = measure(model, shape, options)
    rest, experts = taken_apart(model)
    del model
    offload = ExpertOffload(OffloadSettings())
    model = build(shape, offload)
    model.load_state_dict(rest, strict=False)
    layers = offloaded_layers(model)
    packing = layers[0][1].packing
    host = on_the_host(experts, packing, folder)
    del rest, experts
    total = len(layers) * shape.experts
    needed = min(shape.experts, max(2, options.batch * shape.topk))
    for mode, slots in (
        ("blocking", needed),
        ("overlapped", needed),
        ("cached", max(needed, total // 4)),
    ):
        cache = ExpertCache(packing, slots, host)
        connect(model, cache, at_the_gate=mode != "blocking")
        modes[mode], found = measure(model, shape, options, cache)
        modes[mode]["same_output"] = found == expected
        del cache
    return {
        "sizes": asdict(shape),
        "expert_mb": packing.nbytes / 1e6,
        "experts": total,
        "modes": modes,
        "memory_saved": {
            mode: 1 - memory_of(modes[mode]) / memory_of(modes["resident"]) for mode in OFFLOADED
        },
    }


def build(shape: Shape, offload: ExpertOffload | None) -> GPTModel:
    """A model with random weights; without its experts if there is an offload."""
    free_memory()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config("scmoe", shape)
    config.moe_router_force_load_balancing = False
    spec = build_block_spec(config, ScMoEConfig(combine="add"))
    if offload is not None:
        spec = offload.replace_experts(spec, config, None)
    length = shape.sequence
    model = GPTModel(config, spec, shape.vocab, length, position_embedding_type="rope").cuda()
    return (model if machine.ON_CPU else model.bfloat16()).eval()


def measure(
    model: GPTModel, shape: Shape, options: Namespace, cache: ExpertCache | None = None
) -> tuple[dict, list]:
    """Times and memory of a mode, and what was written; the first of three runs warms up."""
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(
        shape.vocab, (options.batch, options.prompt_length), generator=generator
    )
    sampling = SamplingParams(
        num_tokens_to_generate=options.tokens, top_k=0, temperature=1.0, termination_id=None
    )
    decoding = Decoding(cache)
    decode = Decode(model)
    generate = partial(
        generation.generate, model, prompts.tolist(), sampling, shape.vocab,
        micro_batch=options.batch, decode=decode,
    )  # fmt: skip
    for is_warm in (False, True, True):
        decoding.begins()
        generate(on_token=decoding.on_token)
        decoding.ends(counts=is_warm)
    row = {
        "prefill_ms": statistics.median(decoding.prefill_ms),
        "token_ms": statistics.median(decoding.token_ms),
        "in_graphs": decode.in_graphs,
        "memory_mb": on_the_device(model, cache) / 1e6,
        "peak_memory_mb": None if machine.ON_CPU else torch.cuda.max_memory_allocated() / 1e6,
    }
    row |= decoding.of_cache()
    with sums_in_one_order():
        written = generate()
    return row, [completion.tokens for completion in written]


def sums_in_one_order() -> AbstractContextManager:
    """In which two decodes can be compared to the bit: cuDNN's attention, which is usual on a GPU,
    adds in an order that changes from call to call, and another rounding may be another expert.
    """
    return nullcontext() if machine.ON_CPU else sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION)


class Decoding:
    """Times of the first token and of those behind the second, and what the cache did for the latter.

    The second may be that of a capture, which computes it several times.
    """

    def __init__(self, cache: ExpertCache | None):
        self.prefill_ms: list[float] = []
        self.token_ms: list[float] = []
        self._cache = cache
        self._done = [0.0] * 4

    def begins(self) -> None:
        self._moments = [time.perf_counter()]

    def on_token(self, prompt: int, tokens: list[int]) -> None:
        if prompt == 0:
            self._moments.append(time.perf_counter())
            if len(tokens) == 2:
                self._before = self._state()

    def ends(self, counts: bool) -> None:
        if not counts:
            return
        took = [(later - sooner) * 1e3 for sooner, later in pairwise(self._moments)]
        self.prefill_ms.append(took[0])
        self.token_ms += took[2:]
        self._done = [d + now - b for d, now, b in zip(self._done, self._state(), self._before)]

    def of_cache(self) -> dict:
        """A token's share of it."""
        if self._cache is None:
            return {}
        uses, hits, copied, waited = self._done
        tokens = len(self.token_ms)
        return {
            "hit_rate": hits / uses,
            "copied_mb": copied / tokens / 1e6,
            "waited_ms": waited / tokens,
        }

    def _state(self) -> list[float]:
        if self._cache is None:
            return [0.0] * 4
        counts = self._cache.counts
        return [counts.uses, counts.hits, counts.copied_bytes, self._cache.waited_ms()]


def on_the_device(model: GPTModel, cache: ExpertCache | None) -> int:
    """Bytes of the weights there."""
    named = model.named_parameters()
    if cache is None:
        return sum(weight.nbytes for _, weight in named)
    return cache.nbytes + sum(w.nbytes for name, w in named if ".mlp.experts." not in name)


def taken_apart(model: GPTModel) -> tuple[dict, dict]:
    """Weights on the host: those of all but the routed experts by name, and theirs by layer."""
    experts = {
        layer.layer_number: [
            {name: weight.detach().cpu() for name, weight in named.items()}
            for named in named_weights(layer.mlp.experts)
        ]
        for layer in model.decoder.layers
        if hasattr(layer.mlp, "experts")
    }
    rest = {
        name: value.cpu()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and ".mlp.experts." not in name
    }
    return rest, experts


def on_the_host(experts: dict, packing: Packing, folder: Path) -> HostExperts:
    """Experts in pinned memory, or in files where there is no GPU."""
    memory, files = {}, {}
    for layer, own in experts.items():
        size = (len(own), packing.nbytes)
        rows = torch.zeros(size, dtype=torch.uint8) if machine.ON_CPU else pinned_memory(*size)
        for row, weights in zip(rows, own):
            for name, view in packing.views(row).items():
                view.copy_(weights[name])
        if machine.ON_CPU:
            files[layer] = folder / f"{layer}.experts"
            files[layer].write_bytes(rows.numpy())
        else:
            memory[layer] = rows
    return MappedExperts(files, packing.nbytes, 0) if machine.ON_CPU else PinnedExperts(memory)


def free_memory() -> None:
    """Let go of what nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    run_tool(main)
