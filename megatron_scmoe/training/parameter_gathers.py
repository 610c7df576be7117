"""All-gathers of parameters (``--overlap-param-gather``), all of them started as an iteration begins.

Megatron starts one when the one before it is waited for. Each then has only the compute of one bucket
of parameters beside it, and where the link is slow every block of the first micro-batch waits. Started
together they follow each other without a gap, and the first blocks hide those of the later ones.
"""


class ParameterGathers:
    """Starts the all-gathers of this rank's model chunks, in the order in which forward needs them."""

    def __init__(self) -> None:
        self._chunks: list = []

    def attach(self, chunks: list) -> list:
        """Take the model's chunks, as Megatron has wrapped them.

        Returns:
            ``chunks``, as hooks of Megatron's model builder do.
        """
        self._chunks = [chunk for chunk in chunks if getattr(chunk, "use_forward_hook", False)]
        for chunk in self._chunks:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.next_param_gather_bucket_group = None  # it is under way already
        return chunks

    def iteration_begins(self, _done: int) -> None:
        """Start all that the optimizer's step has left to gather."""
        for chunk in self._chunks:
            if chunk.remove_forward_pre_hook_handles:  # something will wait for them
                for group in _in_order_of_forward(chunk):
                    if not group.param_gather_dispatched:
                        group.start_param_sync()


def _in_order_of_forward(chunk) -> list:
    """The chunk's bucket groups, by the first parameter of each; Megatron's own order is backward's."""
    found = {
        id(group): group
        for parameter in chunk.module.parameters()
        if (group := chunk.param_to_bucket_group.get(parameter)) is not None
    }
    return list(found.values())
