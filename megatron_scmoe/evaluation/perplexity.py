"""Loss, perplexity and logits of a checkpoint's model, on the ranks at hand."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from tqdm import tqdm

from megatron_scmoe.evaluation.sequences import (
    NO_LABEL,
    Batch,
    Report,
    Sequences,
    batches,
    check_space,
    logits_file,
)


def evaluate(
    model,
    sequences: Sequences,
    vocab_size: int,
    micro_batch: int = 1,
    logits_out: Path | None = None,
) -> Report:
    """Evaluate this rank's part of a model together with all other ranks.

    Args:
        model: what :func:`~megatron_scmoe.training.load_model.build_model` returned.
        vocab_size: number of entries of the vocabulary, without the padding.
        micro_batch: rows computed at once; the data-parallel ranks take turns.
        logits_out: where the logits go, float32 [n, s, vocab_size]; written whole or not at all.

    Raises:
        InputError: if there is no space for them.
    """
    rank = parallel_state.get_data_parallel_rank()
    ranks = parallel_state.get_data_parallel_world_size()
    own = batches(sequences, micro_batch, ranks)[rank::ranks]
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    has_losses = is_last and parallel_state.get_tensor_model_parallel_rank() == 0
    writes = has_losses and rank == 0
    shape = (*sequences.tokens.shape, vocab_size)
    if logits_out:
        check_space(logits_out, shape)  # on every rank: the first is the one that says so
    target = logits_file(logits_out, shape) if writes and logits_out else nullcontext()
    with (
        target as file,
        tqdm(total=len(sequences.tokens), unit=" seq", disable=_quiet(writes)) as bar,
        torch.no_grad(),
    ):
        scores = _Scores(vocab_size, logits_out is not None, file, bar)
        get_forward_backward_func()(
            forward_step_func=partial(_step, scores),
            data_iterator=iter(own),
            model=model,
            num_microbatches=len(own),
            seq_length=sequences.tokens.shape[1],
            micro_batch_size=micro_batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    totals = scores.totals if has_losses else torch.zeros_like(scores.totals)
    torch.distributed.all_reduce(totals)
    loss, padded, count = totals.tolist()
    padding = _padded_vocab_size(model) != vocab_size
    return Report(
        loss / count, int(count), len(sequences.tokens), padded / count if padding else None
    )


class _Scores:
    """The sums of all micro-batches of this rank, and their logits in a file.

    Args:
        vocab_size: as for :func:`evaluate`.
        gathers: whether logits are gathered, on all ranks that have some.
        file: where this rank writes them, [n, s, vocab_size]; None on ranks that do not.
        bar: hears of rows that are done.
    """

    def __init__(self, vocab_size: int, gathers: bool, file: np.ndarray | None, bar: tqdm):
        self.totals = torch.zeros(3, dtype=torch.float64).cuda()
        """Sums: of the losses, of the losses with padding in the softmax, of the labels."""
        self._vocab_size, self._gathers, self._file, self._bar = vocab_size, gathers, file, bar

    def add(self, batch: Batch, output: Tensor, non_loss_data: bool = True) -> None:
        """Add one micro-batch, as Megatron calls for its loss; output is [b, s, v / TP]."""
        labels = torch.from_numpy(batch.labels).cuda()
        counts = labels != NO_LABEL
        for index, size in enumerate((self._vocab_size, None)):
            losses = _cross_entropy(output, labels.clamp(min=0), size)
            self.totals[index] += (losses * counts)[: batch.count].double().sum()
        self.totals[2] += counts[: batch.count].sum()
        if self._gathers:
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(output.float())
            for start, count, rows in _gather_rows(batch, logits[..., : self._vocab_size]):
                if self._file is not None:
                    self._file[start : start + count] = rows[:count].cpu().numpy()
        self._bar.update(batch.count * parallel_state.get_data_parallel_world_size())


def _step(scores: _Scores, iterator: Iterator[Batch], model):
    """The forward of one micro-batch, as Megatron's schedules call it."""
    batch = next(iterator)
    tokens = torch.from_numpy(batch.tokens).cuda()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None), partial(scores.add, batch)


def _cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    """Cross entropy [b, s] from logits [b, s, v / TP]; entries from ``vocab_size`` on left out."""
    # Megatron's order of dimensions; a copy, as its cross entropy works in place.
    logits = logits.float().transpose(0, 1).clone(memory_format=torch.contiguous_format)
    if vocab_size is not None:
        local = logits.shape[-1]
        first = parallel_state.get_tensor_model_parallel_rank() * local
        logits[..., max(0, vocab_size - first) :] = -torch.inf
    labels = labels.transpose(0, 1).contiguous()
    return tensor_parallel.vocab_parallel_cross_entropy(logits, labels).transpose(0, 1)


def _gather_rows(batch: Batch, logits: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """First row, number of rows and logits of the micro-batches of all data-parallel ranks."""
    group = parallel_state.get_data_parallel_group()
    logits = logits.contiguous()
    place = torch.tensor([batch.start, batch.count]).to(logits.device)
    places = [torch.empty_like(place) for _ in range(group.size())]
    rows = [torch.empty_like(logits) for _ in range(group.size())]
    torch.distributed.all_gather(places, place, group=group)
    torch.distributed.all_gather(rows, logits, group=group)
    for where, what in zip(places, rows):
        yield *where.tolist(), what


def _padded_vocab_size(model) -> int:
    return getattr(model, "module", model).vocab_size


def _quiet(shows: bool) -> bool | None:
    """What tqdm's ``disable`` takes: None shows the bar on a terminal."""
    return None if shows else True
