"""``--scmoe-expert-slot auto``: the slot that operator times measured on the built model suggest."""

from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import print_rank_0

from megatron_scmoe.analysis.operator_timer import find_pair, measure, schedule_of
from megatron_scmoe.analysis.simulator import OPERATORS, OperatorTimes, block_time
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.schedule import num_slots
from megatron_scmoe.platform.first_rank import ask_first_rank


def choose_slot(models: list, scmoe: ScMoEConfig, micro_batch: int, sequence: int) -> list:
    """Choose the expert slot that minimises the block time and set it on every routed path.

    Args:
        models: this rank's model chunks, before Megatron wraps them; all ranks call this together.
        scmoe: the configuration; with ``operator_times`` naming a file that exists, the times are
            read instead of measured; if it does not exist, they are written there.
        micro_batch: sequences of a micro-batch.
        sequence: tokens of a sequence on this context-parallel rank.

    Returns:
        ``models``, as hooks of Megatron's model builder do.
    """
    file = scmoe.operator_times
    times = ask_first_rank(lambda: OperatorTimes.read(file) if _exists(file) else None)
    measured = None
    if times is None:
        for model in models:
            model.cuda()
        pair = find_pair(models)
        times, measured = measure(pair, scmoe, micro_batch, sequence)
        sizes = sizes_of(models[0].config, micro_batch, sequence)
        times = replace(times, measured_on=sizes)
        if file and torch.distributed.get_rank() == 0:
            times.write(file)
    predicted = predict(scmoe, times)
    costs = measured or predicted
    slot = min(range(len(costs)), key=costs.__getitem__)
    for model in models:
        for module in model.modules():
            if isinstance(module, ScMoELayer):
                module.path.schedule = schedule_of(scmoe, slot)
    source = file if measured is None else None
    print_rank_0(describe(times, predicted, measured, slot, source))
    return models


def sizes_of(config: TransformerConfig, micro_batch: int, sequence: int) -> dict[str, int]:
    """What operator times depend on, beyond the machine: Megatron's settings by name."""
    names = (
        *("hidden_size", "num_attention_heads", "ffn_hidden_size", "num_moe_experts"),
        *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk"),
        *("tensor_model_parallel_size", "expert_model_parallel_size", "context_parallel_size"),
    )
    sizes = {name: getattr(config, name) for name in names}
    return sizes | {"micro_batch_size": micro_batch, "tokens_per_sequence": sequence}


def check_times(scmoe: ScMoEConfig, sizes: dict[str, int]) -> None:
    """Refuse operator times that were measured on something else.

    Raises:
        ScMoEConfigError: naming the file and the first size that differs.
    """
    path = scmoe.operator_times
    if not _exists(path):
        return
    for name, size in OperatorTimes.read(path).measured_on.items():
        if size != sizes.get(name):
            raise ScMoEConfigError(
                f"--scmoe-operator-times {path}",
                f"its times were measured with {name} {size}, and this is {sizes.get(name)}",
                "another file, which will be written if it does not exist",
            )


def predict(scmoe: ScMoEConfig, times: OperatorTimes) -> list[float]:
    """Block time of every slot of the tap in ms, by simulation."""
    return [block_time(schedule_of(scmoe, slot), times) for slot in range(num_slots(scmoe.tap))]


def describe(
    times: OperatorTimes,
    predicted: list[float],
    measured: list[float] | None,
    slot: int,
    source: str | None,
) -> str:
    """The table that is logged."""
    lines = [f"> operator times of a pair in ms, {f'from {source}' if source else 'measured'}:"]
    lines.append(f"  {'':<18}{'forward':>10}{'backward':>10}")
    lines += [f"  {n:<18}{times.forward[n]:>10.3f}{times.backward[n]:>10.3f}" for n in OPERATORS]
    lines.append("> block time by expert slot in ms, forward and backward:")
    lines.append(f"  {'slot':<18}{'predicted':>10}{'measured':>10}")
    for number, prediction in enumerate(predicted):
        found = "-" if measured is None else f"{measured[number]:.3f}"
        chosen = "  <- chosen" if number == slot else ""
        lines.append(f"  {number:<18}{prediction:>10.3f}{found:>10}{chosen}")
    return "\n".join(lines)


def _exists(path: str | None) -> TypeGuard[str]:
    return path is not None and Path(path).exists()
