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

The slots are spread over the data-parallel ranks. Every rank knows of all texts; each computes its own.
As the experts of all ranks are needed by each, all take the same steps: whoever has nothing to read
reads one token in a spare row.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.inference.utils import InferenceMode
from torch import Tensor

from megatron_scmoe.config import AUTO, DecodeSchedule
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
    """

    def __init__(
        self, model, vocab_size: int, size: int, length: int, schedule: DecodeSchedule = AUTO
    ):
        self._group = parallel_state.get_data_parallel_group()
        self._own_rank = self._group.rank()
        self._per_rank = -(-size // self._group.size())
        self.size = self._per_rank * self._group.size()
        self.length = length
        self._vocab_size = vocab_size
        self._rows: list[list[_Row]] = [[] for _ in range(self._group.size())]
        self._column = 0
        """Where the next token goes."""
        self._decode = Decode(model, schedule)
        self._model = CachedModel(model, self._per_rank + 1, length, self._decode)
        self._may_move = not self._model.module.config.multi_latent_attention
        with torch.inference_mode(), InferenceMode.active():
            self._read_spare()  # Megatron allocates the cache, and does not fill it
            for memory in self._cache():
                memory.zero_()  # what a mask hides is multiplied by 0, and must be a number

    @property
    def cache_bytes(self) -> int:
        """What the cache takes on this rank."""
        return sum(memory.nbytes for memory in self._cache())

    @property
    def _running(self) -> int:
        """Texts in the batch, on all ranks."""
        return sum(map(len, self._rows))

    def decode_schedules(self) -> dict[str, str]:
        """What was measured to be faster, by the number of texts (:meth:`Decode.kept`)."""
        return self._decode.kept()

    def count_fitting(self, waiting: Sequence[tuple[int, int]], leaving: Collection[int]) -> int:
        """How many texts from the first on may join now, once others have left.

        Args:
            waiting: for each text the length of its prompt and the most tokens behind it.
            leaving: keys of those that leave.
        """
        staying = sum(row.text.key not in leaving for rows in self._rows for row in rows)
        free = self.size - staying
        if self._may_move:
            return min(free, len(waiting))
        column, count, most = self._column if staying else 0, 0, 0
        for prompt, behind in waiting[:free]:
            if staying and prompt > column:
                break
            column, most = max(column, prompt), max(most, behind)
            if column + most > self.length:
                break
            count += 1
        return count

    def step(self, leaving: Collection[int] = (), joining: Sequence[Text] = ()) -> list[Written]:
        """Let texts leave and join, and write one token: of those that join, or else of all.

        All ranks call it with the same arguments.

        Returns:
            The tokens, on every rank.
        """
        with torch.inference_mode(), InferenceMode.active():
            self._leave(leaving)
            self._align([len(text.prompt) for text in joining])
            written = self._join(joining) if joining else self._go_on()
        if self._group.size() == 1:
            return written
        parts: list = [None] * self._group.size()
        torch.distributed.all_gather_object(parts, written, group=self._group)
        return [item for part in parts for item in part]

    def clear(self) -> None:
        """Let all texts leave."""
        for rows in self._rows:
            rows.clear()

    def _leave(self, keys: Collection[int]) -> None:
        """The last row of a rank takes the place of one that leaves: rows are read in one piece."""
        for rank, rows in enumerate(self._rows):
            for row in [row for row in rows if row.text.key in keys]:
                hole, last = rows.index(row), len(rows) - 1
                rows[hole] = rows[last]
                rows.pop()
                if rank == self._own_rank and hole != last:
                    for memory in self._cache():
                        memory[:, hole] = memory[:, last]

    def _align(self, joining: list[int]) -> None:
        """Move the columns so that the longest text begins in the first."""
        longest = max((row.length for rows in self._rows for row in rows), default=0)
        column = max([longest, *joining])
        if longest and not self._may_move:
            return
        own = self._rows[self._own_rank]
        if own and column != self._column:
            for memory in self._cache():
                old = memory[self._column - longest : self._column, : len(own)].clone()
                memory[column - longest : column, : len(own)] = old
        self._column = column

    def _join(self, texts: Sequence[Text]) -> list[Written]:
        """Read the prompts, one after the other on each rank."""
        new: list[list[_Row]] = [[] for _ in self._rows]
        for text in texts:
            rank = min(range(len(self._rows)), key=lambda rank: len(self._rows[rank]))
            row = _Row(text, random_numbers(text.seed, text.index))
            self._rows[rank].append(row)
            new[rank].append(row)
        written = []
        for turn in range(max(map(len, new))):
            if turn >= len(new[self._own_rank]):
                self._read_spare()
                continue
            row = new[self._own_rank][turn]
            logits = self._read_prompt(row, last_only=not row.text.prompt_log_probs)
            prompt = self._places(row, logits) if row.text.prompt_log_probs else []
            written.append(Written(row.text.key, self._choose(row, logits[-1]), prompt))
        for rows in new:
            for row in rows:
                row.length = len(row.text.prompt)
        return written

    def _go_on(self) -> list[Written]:
        """Read the token that was chosen last for each text, and choose the next."""
        own = self._rows[self._own_rank]
        if not any(self._rows):
            return []
        written = []
        if own:
            logits = self._read_last(own)
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

    def _read_prompt(self, row: "_Row", last_only: bool) -> Tensor:
        """Logits [n or 1, v] behind the tokens of a prompt."""
        tokens = torch.tensor(row.text.prompt)[None]
        count = tokens.shape[1]
        first = self._column - count
        mask = torch.ones(count, self._column, dtype=torch.bool).triu(first + 1)
        mask[:, :first] = True
        logits = self._model.read(
            tokens,
            torch.arange(count)[None],
            row=self._rows[self._own_rank].index(row),
            column=first,
            mask=mask[None, None],
            last_only=last_only,
        )
        return logits[0, :, : self._vocab_size]

    def _read_last(self, rows: list["_Row"]) -> Tensor:
        """Logits [b, v] behind the last token of each row."""
        lengths = torch.tensor([row.length for row in rows])
        mask = torch.arange(self._column + 1) < self._column - lengths[:, None]
        logits = self._model.decode(
            self._running,
            torch.tensor([[row.last] for row in rows]),
            lengths[:, None],
            column=self._column,
            mask=mask[:, None, None],
        )
        return logits[:, -1, : self._vocab_size]

    def _read_spare(self, beside: int = 0) -> None:
        """Take part in a step of the other ranks: in a prefill, or a token of so many texts."""
        zero = torch.zeros(1, 1, dtype=torch.int64)
        if beside:
            self._model.decode(beside, zero, zero, row=self._per_rank)
        else:
            self._model.read(zero, zero, row=self._per_rank)

    def _choose(self, row: "_Row", logits: Tensor) -> Place:
        """The next token of a row, from logits [v]."""
        row.last = choose(logits, row.text, row.random)
        return self._place(row.text, row.last, logits)

    def _places(self, row: "_Row", logits: Tensor) -> list[Place]:
        """The places of a prompt from the second on, from logits [n, v]."""
        return [
            self._place(row.text, token, before)
            for token, before in zip(row.text.prompt[1:], logits)
        ]

    def _place(self, text: Text, token: int, logits: Tensor) -> Place:
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
    length: int = 0
    """Tokens in the cache."""
    last: int = 0
    """The token chosen last, which is not in the cache yet; on the text's own rank."""
