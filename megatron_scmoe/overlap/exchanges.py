"""What carries the all-to-alls of a group: one line for each value of ``--scmoe-exchange``."""

from collections.abc import Callable

from torch.distributed import ProcessGroup

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.overlap.async_all_to_all import AllToAll
from megatron_scmoe.overlap.copy_engine.exchange import by_copy_engines


def exchange_for(group: ProcessGroup, scmoe: ScMoEConfig) -> Callable[..., AllToAll]:
    """What makes a group's all-to-alls; at the first call of copy engines all its ranks make it.

    Args:
        group: the expert-parallel group; one of a single rank has nothing to exchange.
        scmoe: its ``exchange`` and ``copy_engine_all_to_alls`` count.

    Returns:
        What takes the arguments of :class:`~megatron_scmoe.overlap.async_all_to_all.AllToAll`.

    Raises:
        CopyEngineError: if copy engines cannot serve the group.
    """
    if group.size() == 1:
        return AllToAll
    chosen = scmoe.copy_engine_all_to_alls
    match scmoe.exchange:
        case "collective":
            return AllToAll
        case "copy-host":
            return by_copy_engines(group, "host", chosen)
        case "copy-peer":
            return by_copy_engines(group, "peer", chosen)
