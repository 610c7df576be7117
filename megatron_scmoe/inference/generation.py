"""Tokens that a checkpoint's model writes behind prompts, on all ranks together.

Model, key-value cache (``StaticInferenceContext``), pipeline and sampling are Megatron's. The loop is
not: neither of Megatron's engines starts without a GPU, and the static one has no stop words, ends at
the tokenizer's own token alone and refuses tensor parallelism with experts.

The prompts of a round stand one under the other, each from the first column on. All columns that every
prompt fills are computed at once, then one column after the other: a prompt that goes on keeps its own
token there, one that has ended gets the token chosen. So no padding is ever computed before a token
that counts, and the causal mask needs no help. All ranks take the same columns of the same round, which
the all-to-alls of expert parallelism need: whoever is done waits by computing along.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.utils import InferenceMode
from torch import Tensor
from tqdm import tqdm

from megatron_scmoe.inference.cached_model import CachedModel
from megatron_scmoe.inference.decode_schedule import Decode
from megatron_scmoe.inference.sampling import choose, likeliest, random_numbers

LENGTH, STOP = "length", "stop"
"""Why a completion ended: it has --num-tokens-to-generate, or it came to a stop."""


@dataclass
class Completion:
    """What was written behind one prompt.

    Log-probabilities are natural, of the model's own distribution over its tokens: before temperature,
    top-k and top-p, and without the rows that pad the vocabulary.
    """

    tokens: list[int] = field(default_factory=list)
    """Without the one that terminates."""
    finish_reason: str | None = None
    """LENGTH or STOP."""
    log_probs: list[float] = field(default_factory=list)
    """Of ``tokens``; empty if not asked for."""
    prompt_log_probs: list[float] = field(default_factory=list)
    """Of the prompt's tokens from the second on; empty if not asked for."""
    top_n: list[list[tuple[int, float]]] = field(default_factory=list)
    """For each of ``tokens`` the likeliest ids in its place, best first."""


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    vocab_size: int,
    *,
    seed: int = 0,
    micro_batch: int = 1,
    is_stop: Callable[[int, list[int]], bool] = lambda prompt, tokens: False,
    on_token: Callable[[int, list[int]], None] = lambda prompt, tokens: None,
    shows_progress: bool = False,
    decode: Decode | None = None,
    chunk: int | None = None,
) -> list[Completion]:
    """Generate on this rank's part of a model, together with all other ranks.

    Each prompt draws from random numbers of its own, so that its completion depends neither on the
    other prompts nor on the layout of ranks, but for rounding.

    Args:
        model: what :func:`~megatron_scmoe.training.load_model.build_model` returned. Its sequence
            parallelism is switched off for good: one token has no parts to share out.
        prompts: ids, at least one in each.
        sampling: read are ``num_tokens_to_generate``, ``temperature``, ``top_k`` (1 is greedy, 0 all
            tokens), ``top_p``, ``termination_id`` (None: no token ends), ``return_log_probs`` and
            ``top_n_logprobs``.
        vocab_size: number of entries of the vocabulary, without the padding.
        seed: of the random numbers.
        micro_batch: prompts that a data-parallel rank computes at once.
        is_stop: whether prompt number i ends after these tokens, its last one included.
        on_token: is told of each token, on the rank that has chosen it for prompt i.
        shows_progress: whether a terminal shows a bar.
        decode: what schedule the tokens behind the prompts have; None: the faster one, once measured.
        chunk: tokens of prompts that a data-parallel rank computes at once, at most, but one of each
            prompt; None to compute them whole. The model needs ``local_attention``.

    Returns:
        The completions in the order of the prompts, on every rank.
    """
    group = parallel_state.get_data_parallel_group()
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = micro_batch * group.size()
    most = min(micro_batch, -(-len(prompts) // group.size()))
    longest = max(map(len, prompts), default=0) + sampling.num_tokens_to_generate
    cached = CachedModel(model, most, longest, decode or Decode(model))
    found: dict[int, Completion] = {}
    with (
        torch.no_grad(),
        InferenceMode.active(),
        tqdm(
            total=len(prompts), unit=" prompt", disable=None if shows_progress else True
        ) as progress,
    ):
        for start in range(0, len(prompts), size):
            indices = by_length[start : start + size]
            mine = indices[group.rank() :: group.size()]
            if len(mine) * group.size() < len(indices) or not mine:
                mine = [*mine, indices[0]]  # all ranks have as many rows
            own = [_Row(index, list(prompts[index]), random_numbers(seed, index)) for index in mine]
            lengths = [len(prompts[index]) for index in indices]
            end = max(lengths) + sampling.num_tokens_to_generate
            columns = _Columns(cached, own, end, min(lengths), len(indices))
            width = min(lengths)
            if chunk is not None:
                width = max(1, chunk // -(-len(indices) // group.size()))
            _fill(columns, own, width, sampling, vocab_size, is_stop, on_token)
            found |= {row.index: row.completion for row in own}
            progress.update(len(indices))
    parts: list = [None] * group.size()
    torch.distributed.all_gather_object(parts, found, group=group)
    for part in parts:
        found |= part
    return [found[index] for index in range(len(prompts))]


@dataclass
class _Row:
    """A prompt and its completion."""

    index: int
    prompt: list[int]
    random: torch.Generator
    completion: Completion = field(default_factory=Completion)


class _Columns:
    """The tokens of a round, int64 [b, end], and the model that reads them from left to right."""

    def __init__(self, model: CachedModel, rows: list[_Row], end: int, shortest: int, texts: int):
        self.shortest = shortest  # prompt of the round
        self.tokens = torch.zeros(len(rows), end, dtype=torch.int64)
        for own, row in zip(self.tokens, rows):
            own[: len(row.prompt)] = torch.tensor(row.prompt)
        self._model = model
        self._texts = texts  # of all ranks

    def read(self, start: int, stop: int, last_only: bool) -> Tensor:
        """Logits behind the columns from ``start`` to ``stop``, or behind the last: fp32 [b, n, v].

        What stands before was read already. On every rank, and on the host.
        """
        tokens = self.tokens[:, start:stop]
        positions = torch.arange(start, stop).expand(len(self.tokens), -1)
        if start == 0:
            return self._model.read(tokens, positions, last_only=last_only)
        if stop <= self.shortest:
            mask = torch.ones(1, 1, stop - start, stop, dtype=torch.bool).triu(start + 1)
            return self._model.read(tokens, positions, column=start, mask=mask, last_only=last_only)
        return self._model.decode(
            self._texts, tokens, positions, column=start, last_only=last_only, from_first=True
        )


def _fill(
    columns: _Columns,
    rows: list[_Row],
    width: int,
    sampling: SamplingParams,
    vocab_size: int,
    is_stop: Callable[[int, list[int]], bool],
    on_token: Callable[[int, list[int]], None],
) -> None:
    """Complete the rows of this rank; of the prompts ``width`` columns are read at once."""
    with_log_probs = sampling.return_log_probs or sampling.top_n_logprobs > 0
    start, stop = 0, min(width, columns.shortest)
    while True:
        logits = columns.read(start, stop, not sampling.return_log_probs)[..., :vocab_size]
        log_probs = logits.log_softmax(-1) if with_log_probs else logits
        for row, own_logits, own_log_probs in zip(range(len(rows)), logits, log_probs):
            this = rows[row]
            if sampling.return_log_probs:
                known = torch.tensor(this.prompt[start + 1 : stop + 1], dtype=torch.int64)
                of_prompt = own_log_probs[: len(known)].gather(-1, known[:, None]).flatten()
                this.completion.prompt_log_probs += of_prompt.tolist()
            if len(this.prompt) <= stop and this.completion.finish_reason is None:
                token = choose(own_logits[-1], sampling, this.random)
                columns.tokens[row, stop] = token
                _append(this.completion, token, own_log_probs[-1], sampling)
                if this.completion.finish_reason is None:
                    _judge(this, sampling, is_stop)
                    on_token(this.index, this.completion.tokens)
        if _everywhere(all(row.completion.finish_reason for row in rows)):
            return
        start, stop = stop, max(stop + 1, min(stop + width, columns.shortest))


def _append(
    completion: Completion, token: int, log_probs: Tensor, sampling: SamplingParams
) -> None:
    """Add a token, or end at the one that terminates; ``log_probs`` are [v]."""
    if token == sampling.termination_id:
        completion.finish_reason = STOP
        return
    completion.tokens.append(token)
    if sampling.return_log_probs:
        completion.log_probs.append(log_probs[token].item())
    if sampling.top_n_logprobs:
        completion.top_n.append(likeliest(log_probs, sampling.top_n_logprobs))


def _judge(row: _Row, sampling: SamplingParams, is_stop: Callable[[int, list[int]], bool]) -> None:
    """End a row that has come to a stop, or is long enough."""
    completion = row.completion
    if is_stop(row.index, completion.tokens):
        completion.finish_reason = STOP
    elif len(completion.tokens) == sampling.num_tokens_to_generate:
        completion.finish_reason = LENGTH


def _everywhere(done: bool) -> bool:
    """Whether it is so on all ranks."""
    flag = torch.tensor(int(done)).cuda()
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
    return bool(flag)
