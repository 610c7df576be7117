"""A decode in CUDA graphs: one launch for the forward of a token.

A token's kernels are done sooner than the host can launch them one by one. A graph is of one number of
rows, so all else that changes from token to token has to be a tensor on the device: where the cache is
written, and which columns a row sees. Megatron's static cache takes both from the host. While a
:class:`DecodeGraphs` computes, attentions write the cache at a tensor's column and read all columns
under a mask, with PyTorch's scaled dot-product attention.

No size may have to be waited for, so experts are padded (expert_padding.py). Where ranks share the
model its collectives are in the graphs, so all ranks capture one, or none does.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.router import Router
from torch import Tensor, nn

from megatron_scmoe.overlap.cuda_graph import can_capture, capture, new_pool

Key = tuple[int, str]
"""Rows, and the schedule by its name."""

FEWEST_COLUMNS = 128
"""That a graph reads of the cache, if it has as many."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of tokens [b, 1], their positions [b, 1] and what they do not see [b, 1, 1, columns]: logits."""


class CaptureError(RuntimeError):
    """A decode could not be captured, on one of the ranks; the message says on which, and why."""


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot be in such a graph, if it cannot: experts aside (expert_padding.py)."""
    if not can_capture():
        return "it needs a GPU"
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if isinstance(module, Router) and (
            config.moe_router_force_load_balancing or config.moe_router_force_biased is not None
        ):
            return "its routing is forced by random numbers"
        if not isinstance(module, Attention):
            continue
        if type(module) is not SelfAttention:
            return f"the model's attention is {type(module).__name__}"
        if config.window_size is not None:
            return "the model's attention has a window"
        if config.softmax_type != "vanilla":
            return f"the model has --softmax-type {config.softmax_type}"
    return None


class DecodeGraphs:
    """The graphs of one cache.

    Args:
        model: this rank's part of it, for which :func:`why_not` knows nothing.
        context: the cache.
    """

    def __init__(self, model: nn.Module, context: StaticInferenceContext):
        self._context = context
        self._column = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._attentions = [
            _Attention(module, context, self._column)
            for module in model.modules()
            if isinstance(module, SelfAttention)
        ]
        self._graphs: dict[tuple[Key, int], _Graph] = {}
        self._pool = new_pool()

    @torch.inference_mode()
    def read(
        self,
        forward: Forward,
        key: Key,
        tokens: Tensor,
        positions: Tensor,
        column: int,
        mask: Tensor | None,
    ) -> tuple[Tensor, bool]:
        """Read one token of each row, from the first on, into the cache.

        The first time with a key, and as the texts come to columns that its graph does not read, takes
        several forwards. All ranks have to ask for the same keys and columns.

        Args:
            forward: computes one token of each row with the cache, from tensors on the device. It is
                not kept, so that graphs go when their owner does: NCCL's end waits for those that have
                collectives.
            tokens: int64 [b, 1].
            positions: of the tokens in their texts, int64 [b, 1].
            column: where they go.
            mask: bool [b or 1, 1, 1, column + 1], True where a token does not see a column; None if it
                sees all.

        Returns:
            Logits [b, 1, v], whose place the next token's take; and whether the graph is new.

        Raises:
            CaptureError: on all ranks, if one could not capture it.
        """
        columns = self._columns(column)
        hidden = torch.ones(len(tokens), 1, 1, columns, dtype=torch.bool)
        hidden[..., : column + 1] = False if mask is None else mask
        self._column.fill_(column)
        graph = self._graphs.get((key, columns))
        if is_new := graph is None:
            self._forget_what_is_behind(column, len(tokens))
            inputs = [_own(each) for each in (tokens, positions, hidden)]
            torch.cuda.empty_cache()  # what it keeps cannot become the graph's memory
            replay = _capture_on_all_ranks(lambda: self._compute(forward, inputs), self._pool)
            graph = self._graphs[key, columns] = _Graph(inputs, replay)
        else:
            for own, new in zip(graph.inputs, (tokens, positions, hidden), strict=True):
                own.copy_(new)
        return graph.replay(), is_new

    def _columns(self, column: int) -> int:
        """How many columns a graph reads that writes this one: a power of two, for few graphs."""
        power = max(FEWEST_COLUMNS, 1 << column.bit_length())
        return min(power, self._context.max_sequence_length)

    def _forget_what_is_behind(self, column: int, rows: int) -> None:
        """What memory holds by chance, where nobody has written yet, may be NaN: 0 * NaN."""
        for memories in self._context.key_value_memory_dict.values():
            for memory in memories:
                memory[column:, :rows] = 0

    def _compute(self, forward: Forward, inputs: list[Tensor]) -> Tensor:
        for attention in self._attentions:
            attention.set(inputs[-1].shape[-1])
        try:
            return forward(*inputs)
        finally:
            for attention in self._attentions:
                attention.set(None)


class _Graph:
    """A graph, and the tensors that it reads."""

    def __init__(self, inputs: list[Tensor], replay: Callable[[], Tensor]):
        self.inputs, self.replay = inputs, replay


def _capture_on_all_ranks(run: Callable[[], Tensor], pool) -> Callable[[], Tensor]:
    """:func:`capture`; no graph on any rank if one has none, whose collectives would wait for ever."""
    failure: RuntimeError | None = None
    try:
        replay = capture(run, pool)
    except RuntimeError as error:
        failure = error
    ranks = torch.distributed.get_world_size()
    reasons: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(reasons, None if failure is None else str(failure))
    for rank, reason in enumerate(reasons):
        if reason is not None:
            raise CaptureError(f"rank {rank}: {reason}" if ranks > 1 else reason) from failure
    return replay


def _own(tensor: Tensor) -> Tensor:
    """A copy on the device, with memory for each element."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda").copy_(tensor)


class _Attention:
    """An attention, two methods of which are replaced for as long as it is set."""

    def __init__(self, attention: SelfAttention, context: StaticInferenceContext, column: Tensor):
        self._attention, self._context, self._column = attention, context, column
        scale = attention.config.softmax_scale
        self._scale = scale or 1 / math.sqrt(attention.hidden_size_per_attention_head)
        self._columns = 0
        self._rotary: list[Any] = []  # graphs read them; Megatron keeps what was asked for lately

    def set(self, columns: int | None) -> None:
        """Replace them, to read so many columns; None gives them back."""
        self._columns = columns or 0
        for module, name, method in (
            (self._attention, "_adjust_key_value_for_inference", self._write),
            (self._attention.core_attention, "forward", self._attend),
        ):
            if columns:
                module.__dict__[name] = method
            else:
                module.__dict__.pop(name, None)

    def _write(self, context, query, key, value, rotary_pos_emb, *args, **kwargs):
        """Of Megatron's arguments and results, as for its static cache; [1, b, heads, d] each."""
        memories = self._context.key_value_memory_dict[self._attention.layer_number]
        keys, values = (memory[: self._columns, : key.shape[1]] for memory in memories)
        keys.index_copy_(0, self._column, key)
        values.index_copy_(0, self._column, value)
        if rotary_pos_emb is not None:
            self._rotary.append(rotary_pos_emb)
            of_queries, of_keys = rotary_pos_emb
            rotary_pos_emb = of_queries.index_select(0, self._column), of_keys[: len(keys)]
        return query, keys, values, rotary_pos_emb, AttnMaskType.arbitrary, None

    def _attend(self, query, key, value, attention_mask, *args, **kwargs) -> Tensor:
        """[1, b, heads * d] of a query [1, b, heads, d], keys and values [columns, b, groups, d].

        Heads that share keys are taken for queries of theirs, so no key is repeated.
        """
        _, rows, heads, size = query.shape
        groups = key.shape[2]
        output = nn.functional.scaled_dot_product_attention(
            query.reshape(rows, groups, heads // groups, size),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=attention_mask.logical_not(),
            scale=self._scale,
        )
        return output.reshape(1, rows, -1)
