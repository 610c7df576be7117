"""A batch that never ends: texts join it and leave it at any token, on all ranks in step.

Megatron's static cache writes the tokens of all its rows into the same column. So the texts of a batch
end in the same column, whatever their lengths, and a mask hides what lies before their first:

    . . A A A A A        A has 5 tokens in the cache, B 7, C 3; the next token of each
    B B B B B B B        goes into the same column
    . . . . C C C

The longest text begins in the first column. When that changes, because a longer one joins or the
longest leaves, all columns are moved. Cached keys have no positions yet, so they may move: Megatron's
attention rotates them anew for each token, and only distances count. (Those of latent attention have.
There columns stay, and what does not fit in waits until the batch is empty.)

A prompt is read in a row of its own, from the first column on, and moved to the others once all of it
is read: whole, or in chunks, between which the others get a token each. (With latent attention it is
read where it will end, which is known: one column further with each chunk but the first.)

The slots are spread over the data-parallel ranks. Every rank knows of all texts; each computes its own.
As the experts of all ranks are needed by each, all take the same steps: whoever has nothing to read
reads one token in a spare row.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from megatron.core import parallel_state
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_scmoe.config import AUTO, DecodeGraphsUse, DecodePadding, DecodeSchedule
from megatron_scmoe.inference.cached_model import CachedModel
from megatron_scmoe.inference.decode_schedule import Decode
from megatron_scmoe.inference.sampling import choose, likeliest, random_numbers


@dataclass(frozen=True)
class Text:
    """What is to be written behind a prompt, and how; it travels to all ranks."""

    key: int
    """Names the text; no two in a batch have the same."""
    prompt: tuple[int, ...]
    """Ids, at least one."""
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 0.0
    seed: int = 0
    index: int = 0
    """Number of the text among those of the same seed: each has random numbers of its own."""
    log_probs: bool = False
    """Tell log-probabilities of the tokens chosen: natural, the model's own (before temperature, top-k
    and top-p, without the rows that pad the vocabulary)."""
    prompt_log_probs: bool = False
    """Tell those of the prompt's tokens, too."""
    top_n: int = 0
    """Tell this many of the likeliest tokens in each place, too."""


@dataclass(frozen=True)
class Place:
    """A token in its place, and what was asked to be told of it."""

    token: int
    log_prob: float | None = None
    likeliest: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """A token that was chosen for a text."""

    key: int
    place: Place
    prompt: list[Place] = field(default_factory=list)
    """With the first token: the places of the prompt from the second on, if asked for."""


class Slots:
    """The batch, on every rank.

    Args:
        model: what :func:`~megatron_scmoe.training.load_model.build_model` returned, with
            ``local_attention``.
        vocab_size: number of entries of the vocabulary, without the padding.
        size: texts at once; rounded up to a multiple of the data-parallel ranks.
        length: the most tokens of a text, its prompt included.
        schedule: of a token that each text gets.
        chunk: tokens of prompts that a data-parallel rank reads until those that run get their next
            one, at most; None to read the prompts whole, all that join at once.
    """

    def __init__(
        self,
        model,
        vocab_size: int,
        size: int,
        length: int,
        schedule: DecodeSchedule = AUTO,
        padding: DecodePadding = AUTO,
        chunk: int | None = None,
        graphs: DecodeGraphsUse = AUTO,
    ):
        self._group = parallel_state.get_data_parallel_group()
        self._own_rank = self._group.rank()
        self._per_rank = -(-size // self._group.size())
        self.size = self._per_rank * self._group.size()
        self.length = length
        self._vocab_size = vocab_size
        self._rows: list[list[_Row]] = [[] for _ in range(self._group.size())]
        """Of each rank, as they lie in its cache."""
        self._reading: list[list[_Row]] = [[] for _ in range(self._group.size())]
        """Those whose prompts are to be read, in this order; of each rank's first a part may be."""
        self._has_read = False
        """Whether the last step did, and those that run wait for their token."""
        self._column = 0
        """Where the next token of those that run goes."""
        self._chunk = chunk
        self._decode = Decode(model, schedule, padding, graphs)
        self._model = CachedModel(model, self._per_rank + 1, length, self._decode)
        self._may_move = not self._model.module.config.multi_latent_attention
        with torch.inference_mode(), InferenceMode.active():
            self._read_spare()  # Megatron allocates the cache, and does not fill it
            for memory in self._cache():
                memory.zero_()  # takes it now, not when the first texts come

    @property
    def cache_bytes(self) -> int:
        """What the cache takes on this rank."""
        return sum(memory.nbytes for memory in self._cache())

    @property
    def _running(self) -> int:
        """Texts whose prompts have been read, on all ranks."""
        return sum(map(len, self._rows))

    @property
    def _are_alike(self) -> bool:
        """Whether all ranks read as many rows for a token; one without texts reads the spare one."""
        return len({max(1, len(rows)) for rows in self._rows}) == 1

    def decode_schedules(self) -> dict[str, str]:
        """What was measured to be faster, by the number of texts (:meth:`Decode.kept`)."""
        return self._decode.kept()

    def count_fitting(self, waiting: Sequence[tuple[int, int]], leaving: Collection[int]) -> int:
        """How many texts from the first on may join now, once others have left.

        Args:
            waiting: for each text the length of its prompt and the most tokens behind it.
            leaving: keys of those that leave.
        """
        running, reading = (
            sum(row.text.key not in leaving for row in chain(*rows))
            for rows in (self._rows, self._reading)
        )
        if self._has_read and running:
            return 0
        free = self.size - running - reading
        if self._may_move:
            return min(free, len(waiting))
        if reading:
            return 0
        end, count, most = self._column if running else 0, 0, 0
        for prompt, behind in waiting[: free if self._chunk is None else 1]:
            if running:
                end += self._chunks(prompt) - 1
                if prompt > end:
                    break
            end, most = max(end, prompt), max(most, behind)
            if end + most > self.length:
                break
            count += 1
        return count

    def step(self, leaving: Collection[int] = (), joining: Sequence[Text] = ()) -> list[Written]:
        """Let texts leave and join, then read of the prompts, or else write a token of all that run.

        One takes turns with the other, as long as there are both. All ranks call it with the same
        arguments.

        Returns:
            The tokens, on every rank; of a prompt that is read the first one.
        """
        with torch.inference_mode(), InferenceMode.active():
            self._leave(leaving)
            self._join(joining)
            self._has_read = any(self._reading) and not (self._has_read and self._running)
            written = self._read_prompts() if self._has_read else self._go_on()
        if self._group.size() == 1:
            return written
        parts: list = [None] * self._group.size()
        torch.distributed.all_gather_object(parts, written, group=self._group)
        return [item for part in parts for item in part]

    def close(self) -> None:
        """Let go of graphs; to be called before the ranks part."""
        self._model.drop_graphs()

    def clear(self) -> None:
        """Let all texts leave."""
        for rows in (*self._rows, *self._reading):
            rows.clear()

    def _leave(self, keys: Collection[int]) -> None:
        """The last row of a rank takes the place of one that leaves: rows are read in one piece."""
        for reading in self._reading:
            reading[:] = [row for row in reading if row.text.key not in keys]
        for rank, rows in enumerate(self._rows):
            for row in [row for row in rows if row.text.key in keys]:
                hole, last = rows.index(row), len(rows) - 1
                rows[hole] = rows[last]
                rows.pop()
                if rank == self._own_rank and hole != last:
                    for memory in self._cache():
                        memory[:, hole] = memory[:, last]
        if self._may_move or not self._running:
            self._move(self._longest())

    def _longest(self) -> int:
        """Tokens in the cache of the longest text that runs, on all ranks."""
        return max((row.length for row in chain(*self._rows)), default=0)

    def _move(self, column: int) -> None:
        """Have the texts that run end before another column."""
        own, longest = self._rows[self._own_rank], self._longest()
        if own and column != self._column:
            for memory in self._cache():
                old = memory[self._column - longest : self._column, : len(own)].clone()
                memory[column - longest : column, : len(own)] = old
        self._column = column

    def _join(self, texts: Sequence[Text]) -> None:
        """Share the texts out to the ranks, to be read."""
        end = 0
        if not self._may_move and texts:
            chunks = max(self._chunks(len(text.prompt)) for text in texts)
            end = self._column + chunks - 1 if self._running else 0
            end = max(end, *(len(text.prompt) for text in texts))
        for text in texts:
            rank = min(
                range(len(self._rows)),
                key=lambda rank: len(self._rows[rank]) + len(self._reading[rank]),
            )
            row = _Row(text, random_numbers(text.seed, text.index))
            row.first = 0 if self._may_move else end - len(text.prompt)
            self._reading[rank].append(row)

    def _chunks(self, prompt: int) -> int:
        """In how many parts a prompt of that length is read."""
        return 1 if self._chunk is None else -(-prompt // self._chunk)

    def _read_prompts(self) -> list[Written]:
        """Read what one step may of the prompts, one after the other on each rank."""
        parts = [self._next_parts(reading) for reading in self._reading]
        written = []
        for turn in range(max(map(len, parts))):
            if turn < len(own := parts[self._own_rank]):
                written += self._read_part(*own[turn])
            else:
                self._read_spare()
            for rank, of_rank in enumerate(parts):
                if turn < len(of_rank):
                    row, stop = of_rank[turn]
                    row.length = stop
                    if row.length == len(row.text.prompt):
                        self._begin(rank, row)
        return written

    def _next_parts(self, reading: list["_Row"]) -> list[tuple["_Row", int]]:
        """Which texts a rank reads in a step, and up to which token."""
        left = sum(len(row.text.prompt) for row in reading)
        if self._chunk is not None:
            left = min(left, self._chunk)
        parts = []
        for row in reading:
            stop = min(len(row.text.prompt), row.length + left)
            if stop == row.length:
                break
            parts.append((row, stop))
            left -= stop - row.length
        return parts

    def _begin(self, rank: int, row: "_Row") -> None:
        """Have a text that was read take its place among those that run."""
        begin, end = row.first, row.first + row.length
        self._move(max(self._column, end))
        rows = self._rows[rank]
        if rank == self._own_rank:
            for memory in self._cache():
                read = memory[begin:end, self._reading_row].clone()
                memory[:, len(rows)] = 0  # a mask multiplies by 0 what others have left here
                memory[self._column - row.length : self._column, len(rows)] = read
        self._reading[rank].remove(row)
        rows.append(row)

    @property
    def _reading_row(self) -> int:
        """The last one of the slots: it is free as long as there is a text to be read."""
        return self._per_rank - 1

    def _go_on(self) -> list[Written]:
        """Read the token that was chosen last for each text, and choose the next."""
        own = self._rows[self._own_rank]
        if not any(self._rows):
            return []
        written = []
        count = self._rows_of_graph()
        if own or count:
            logits = self._read_last(own, count)
            written = [
                Written(r.text.key, self._choose(r, behind)) for r, behind in zip(own, logits)
            ]
        else:
            self._read_spare(beside=self._running)
        for rows in self._rows:
            for row in rows:
                row.length += 1
        self._column += 1
        return written

    def _read_part(self, row: "_Row", stop: int) -> list[Written]:
        """Read a prompt up to a token; what is written, if that is its last one."""
        start, text = row.length, row.text
        if start == 0:
            for memory in self._cache():
                memory[: row.first, self._reading_row] = 0
        first, end = row.first + start, row.first + stop
        mask = torch.ones(stop - start, end, dtype=torch.bool).triu(first + 1)
        mask[:, : row.first] = True
        logits = self._model.read(
            torch.tensor(text.prompt[start:stop])[None],
            torch.arange(start, stop)[None],
            row=self._reading_row,
            column=first,
            mask=mask[None, None],
            last_only=not text.prompt_log_probs,
        )[0, :, : self._vocab_size]
        if text.prompt_log_probs:
            tokens = text.prompt[start + 1 : stop + 1]
            row.prompt += [self._place(text, *item) for item in zip(tokens, logits)]
        if stop < len(text.prompt):
            return []
        return [Written(text.key, self._choose(row, logits[-1]), row.prompt)]

    def _rows_of_graph(self) -> int:
        """How many rows each rank reads for a token in a graph; 0 for those that it has, without one.

        A rank reads rows without a text up to the next power of two: graphs are few then, and all ranks
        have the same one. Not the row of a prompt that is on its way.
        """
        most = max(map(len, self._rows))
        free = self._per_rank - any(self._reading)
        count = min(1 << (most - 1).bit_length(), free)
        return count if most <= free and self._decode.fits_graph(count) else 0

    def _read_last(self, rows: list["_Row"], count: int = 0) -> Tensor:
        """Logits [b, v] behind the last token of each row; read are ``count`` rows, if more."""
        lengths = torch.zeros(max(len(rows), count), dtype=torch.int64)
        tokens = torch.zeros_like(lengths)
        lengths[: len(rows)] = torch.tensor([row.length for row in rows])
        tokens[: len(rows)] = torch.tensor([row.last for row in rows])
        mask = torch.arange(self._column + 1) < self._column - lengths[:, None]
        logits = self._model.decode(
            self._running,
            tokens[:, None],
            lengths[:, None],
            alike=count > 0 or self._are_alike,
            from_first=count > 0,
            column=self._column,
            mask=mask[:, None, None],
        )
        return logits[: len(rows), -1, : self._vocab_size]

    def _read_spare(self, beside: int = 0) -> None:
        """Take part in a step of the other ranks: in a prefill, or a token of so many texts."""
        zero = torch.zeros(1, 1, dtype=torch.int64)
        if beside:
            self._model.decode(beside, zero, zero, alike=self._are_alike, row=self._per_rank)
        else:
            self._model.read(zero, zero, row=self._per_rank)

    def _choose(self, row: "_Row", logits: Tensor) -> Place:
        """The next token of a row, from logits [v]."""
        row.last = choose(logits, row.text, row.random)
        return self._place(row.text, row.last, logits)

    def _place(self, text: Text, token: int, logits: Tensor) -> Place:
        """What is told of a token, from logits [v] before it."""
        if not (text.log_probs or text.top_n):
            return Place(token)
        log_probs = logits.log_softmax(-1)
        best = likeliest(log_probs, text.top_n) if text.top_n else []
        return Place(token, log_probs[token].item(), best)

    def _cache(self) -> list[Tensor]:
        """Keys and values of this rank's blocks, each [columns, rows, ...]."""
        pairs = self._model.context.key_value_memory_dict.values()
        return [memory for pair in pairs for memory in pair]


@dataclass(eq=False)
class _Row:
    """A text in the batch."""

    text: Text
    random: torch.Generator
    first: int = 0
    """In which column its prompt begins while it is read."""
    prompt: list[Place] = field(default_factory=list)
    """Places of the prompt so far, if they are asked for; on the text's own rank."""
    length: int = 0
    """Tokens in the cache."""
    last: int = 0
    """The token chosen last, which is not in the cache yet; on the text's own rank."""
