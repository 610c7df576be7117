"""The operators of one pair of blocks, timed on the built model.

Each operator is run alone, forward and backward, on a micro-batch of random tokens; then the pair as a
whole in every slot. The slowest rank counts, so that all ranks agree. Nothing stays behind: gradients,
random states, router statistics and logged losses are as they were.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from megatron_scmoe.analysis.simulator import OPERATORS, OperatorTimes
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.layer_spec import resolve_schedule
from megatron_scmoe.model.transformer_layer import ScMoEDenseLayer, ScMoETransformerLayer
from megatron_scmoe.overlap.schedule import Schedule, idle_schedule, num_slots
from megatron_scmoe.platform import cpu_backend

WARMUP, REPEATS = 2, 5
"""Runs before, and runs measured; the median counts."""

_HEAD_START_CYCLES = 4_000_000
"""GPU cycles (about 2 ms) that a measured operator waits, so that its launches do not count."""


@dataclass
class Pair:
    """One ScMoE block, and the dense block before it if the routed path needs it."""

    model: MegatronModule
    dense: ScMoEDenseLayer | None
    block: ScMoETransformerLayer

    @property
    def first(self) -> torch.nn.Module:
        """The layer that the pair's input enters."""
        return self.dense or self.block


def find_pair(models: list) -> Pair | None:
    """The first pair of this rank's model chunks; None on a pipeline stage without blocks."""
    for model in models:
        before = None
        for layer in model.decoder.layers:
            if isinstance(layer, ScMoETransformerLayer):
                return Pair(model, before if isinstance(before, ScMoEDenseLayer) else None, layer)
            before = layer
    return None


def measure(
    pair: Pair | None, scmoe: ScMoEConfig, micro_batch: int, sequence: int
) -> tuple[OperatorTimes, list[float]]:
    """Operator times of a pair, and its block time in every slot of the tap, in ms.

    Collective over all ranks; the slowest counts.
    """
    operators = {name: (0.0, 0.0) for name in OPERATORS}
    blocks = [0.0] * num_slots(scmoe.tap)
    if pair is not None:
        with _leaving_no_trace(pair):
            hidden, inputs = _capture(pair, micro_batch, sequence)
            operators |= _measure_operators(pair, hidden, inputs)
            for slot in range(len(blocks)):
                blocks[slot] = _measure_block(pair, schedule_of(scmoe, slot), hidden, inputs)
    flat = [value for name in OPERATORS for value in operators[name]] + blocks
    agreed = torch.tensor(flat, dtype=torch.float64).cuda()
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
    slowest = agreed.tolist()
    directions = (slowest[0 : 2 * len(OPERATORS) : 2], slowest[1 : 2 * len(OPERATORS) : 2])
    forward, backward = (dict(zip(OPERATORS, values, strict=True)) for values in directions)
    return OperatorTimes(forward, backward), slowest[2 * len(OPERATORS) :]


def schedule_of(scmoe: ScMoEConfig, slot: int) -> Schedule:
    """The configuration's schedule with this expert slot."""
    return resolve_schedule(replace(scmoe, expert_slot=slot))


class _Captured(Exception):
    """Ends the model's forward when it has reached the pair: what lies behind would communicate, and
    its routers would count tokens."""


def _capture(pair: Pair, micro_batch: int, sequence: int) -> tuple[Tensor, dict]:
    """What the model's forward gives to the pair: hidden states [s, b, h] and keyword arguments."""

    def stop(module, args, kwargs):
        raise _Captured(args, kwargs)

    model, config = pair.model, pair.model.config
    tokens = torch.randint(model.vocab_size, (micro_batch, sequence)).cuda()
    if not model.pre_process:
        rows = sequence // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
        shape = (rows, micro_batch, config.hidden_size)
        model.set_input_tensor(torch.randn(shape, dtype=config.pipeline_dtype).cuda())
    handle = pair.first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(tokens, torch.arange(sequence).cuda().expand_as(tokens), None)
    except _Captured as captured:
        args, kwargs = captured.args
    finally:
        handle.remove()
        if not model.pre_process:
            model.set_input_tensor(None)
    inputs = dict(kwargs)
    hidden = args[0] if args else inputs.pop("hidden_states")
    return hidden.detach(), inputs


def _measure_operators(pair: Pair, hidden: Tensor, inputs: dict) -> dict:
    """Forward and backward of each operator in ms, each run alone on detached inputs."""
    path = pair.block.mlp.path
    path.schedule = idle_schedule(path.schedule)
    pair.block.mlp.token_dispatcher = pair.block.mlp.token_dispatchers[0]
    return _median(lambda: _backbone(pair, hidden, inputs) | _routed(pair, hidden, inputs))


def _backbone(pair: Pair, hidden: Tensor, inputs: dict) -> dict:
    """The backbone's operators once: (forward, backward) in ms by name."""
    dense, block = pair.dense, pair.block
    times = {}
    if dense is not None:
        mlp_inputs = {k: inputs.get(k) for k in ("padding_mask", "packed_seq_params")}
        context = inputs.get("inference_context")
        times["attention"], _ = _run(lambda x: dense._forward_attention(x, **inputs), hidden)
        times["mlp"], _ = _run(lambda x: dense._forward_mlp(x, context, **mlp_inputs), hidden)
    times["second attention"], _ = _run(lambda x: block._forward_attention(x, **inputs), hidden)
    if block.mlp.shared_experts is not None:
        times["shared expert"], _ = _run(block.mlp.shared_experts_compute, hidden)
    return times


def _routed(pair: Pair, hidden: Tensor, inputs: dict) -> dict:
    """The routed operators once, one after the other as the dispatcher keeps state between them."""
    moe = pair.block.mlp
    dispatcher = moe.token_dispatcher
    routing_map = None

    def route(x):
        nonlocal routing_map
        tap, mask = moe.path.prepare(x, inputs)
        probs, routing_map, _ = moe.route(tap, mask)
        return tap, probs

    def dispatch(tokens, probs):
        flight = dispatcher.prepare_dispatch(tokens, probs)
        dispatcher.launch_dispatch(flight)
        return flight.arrive()

    operators: dict[str, Callable] = {
        "route": route,
        "permute": lambda tap, probs: moe.preprocess(tap, probs, routing_map),
        "dispatch": dispatch,
        "experts": lambda tokens, probs: moe.routed_experts_compute(tokens, probs)[0],
        "combine": lambda tokens: dispatcher.launch_combine(tokens).arrive(),
        "unpermute": lambda tokens: moe.postprocess(tokens, None),
    }
    times, tensors = {}, [hidden]
    for name, operator in operators.items():
        times[name], tensors = _run(operator, *tensors)
    return times


def _measure_block(pair: Pair, schedule: Schedule, hidden: Tensor, inputs: dict) -> float:
    """Forward and backward of the pair in ms."""
    pair.block.mlp.path.schedule = schedule

    def block(x):
        for layer in (pair.dense, pair.block):
            if layer is not None:
                x, _ = layer(hidden_states=x, **inputs)
        return x

    forward, backward = _median(lambda: {"": _run(block, hidden)[0]})[""]
    return forward + backward


def _median(measure_once: Callable[[], dict]) -> dict:
    """Medians of what repeated calls return, name by name."""
    runs = [measure_once() for _ in range(WARMUP + REPEATS)][WARMUP:]
    return {
        name: tuple(statistics.median(run[name][i] for run in runs) for i in (0, 1))
        for name in runs[0]
    }


def _run(function: Callable, *tensors: Tensor) -> tuple[tuple[float, float], list[Tensor]]:
    """Forward and backward of ``function(*tensors)`` in ms, and its detached outputs."""
    results: list = []
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    forward = _timed(lambda: results.append(function(*leaves)))
    returned = results[0] if isinstance(results[0], tuple) else (results[0],)
    outputs = [output for output in returned if isinstance(output, Tensor)]
    roots = [output for output in outputs if output.requires_grad]
    grads = [torch.ones_like(root) for root in roots]
    backward = _timed(lambda: torch.autograd.backward(roots, grads))
    return (forward, backward), [output.detach() for output in outputs]


def _timed(function: Callable) -> float:
    # Together, or the first to arrive at a collective would count its waiting.
    torch.distributed.barrier(parallel_state.get_expert_model_parallel_group())
    if cpu_backend.is_enabled():
        before = time.perf_counter()
        function()
        return (time.perf_counter() - before) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@contextmanager
def _leaving_no_trace(pair: Pair) -> Iterator[None]:
    """Restore random states, gradients, router statistics, logged losses and the schedule."""
    path = pair.block.mlp.path
    schedule = path.schedule
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()
    buffers = {
        buffer: buffer.clone()
        for layer in (pair.dense, pair.block)
        if layer is not None
        for buffer in layer.buffers()
    }
    parameters: list[Any] = list(pair.model.parameters())  # Megatron hangs attributes on them
    accumulated = pair.model.config.gradient_accumulation_fusion
    for parameter in parameters if accumulated else ():
        parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None
            if accumulated:
                del parameter.main_grad
                parameter.grad_added_to_main_grad = False
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        get_moe_metrics_tracker().clear()
        path.schedule = schedule
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1])
        tracker.set_states(states[2])
