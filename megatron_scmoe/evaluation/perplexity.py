"""Loss, perplexity and logits of a checkpoint's model, or of a Hugging Face model."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from tqdm import tqdm

from megatron_scmoe.checkpoints.vocabulary import count_tokens
from megatron_scmoe.errors import InputError, in_words
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.atomic_write import atomic_write, lack_of_space

NO_LABEL = -1
"""In labels: this position predicts nothing."""


@dataclass(frozen=True)
class Sequences:
    """What is evaluated: tokens and the label of each, int64 [n, s]; NO_LABEL where there is none."""

    tokens: np.ndarray
    labels: np.ndarray

    @staticmethod
    def from_stream(ids: np.ndarray, length: int) -> "Sequences":
        """Cut one stream of ids into rows of ``length``; the label of a token is the one after it.

        The last row is filled up with id 0, behind all that counts.
        """
        rows = max(1, math.ceil((len(ids) - 1) / length))
        tokens = np.zeros(rows * length, dtype=np.int64)
        labels = np.full(rows * length, NO_LABEL, dtype=np.int64)
        tokens[: len(ids)] = ids[: rows * length]
        labels[: len(ids) - 1] = ids[1 : rows * length + 1]
        return Sequences(tokens.reshape(rows, length), labels.reshape(rows, length))

    @staticmethod
    def from_rows(rows: np.ndarray) -> "Sequences":
        """Rows that stand for themselves, [n, s]: the last token of each has no label."""
        labels = np.full(rows.shape, NO_LABEL, dtype=np.int64)
        labels[:, :-1] = rows[:, 1:]
        return Sequences(rows.astype(np.int64), labels)

    def first(self, count: int) -> "Sequences":
        """The first ``count`` rows."""
        return Sequences(self.tokens[:count], self.labels[:count])

    def check(self, given: str, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary, with a :class:`InputError` that names ``given``."""
        low, high = int(self.tokens.min()), int(max(self.tokens.max(), self.labels.max()))
        if low < 0 or high >= vocab_size:
            raise InputError(
                given,
                f"it has the id {low if low < 0 else high}",
                f"ids from 0 to {vocab_size - 1}, the vocabulary of the model",
            )


@dataclass(frozen=True)
class Report:
    """The outcome.

    ``loss`` is the mean cross entropy in nats of ``tokens`` labels, over the tokens of the vocabulary.
    ``padded_loss`` has the rows that pad Megatron's vocabulary in the softmax as well, as the loss that
    training logs; None if there are none.
    """

    loss: float
    tokens: int
    sequences: int
    padded_loss: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


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
    own = _batches(sequences, micro_batch, ranks)[rank::ranks]
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    writes = is_last and rank == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
    totals = torch.zeros(3, dtype=torch.float64).cuda()  # loss, loss with padding, labels
    shape = (*sequences.tokens.shape, vocab_size)
    if logits_out:
        _check_space(logits_out, shape)  # on every rank: the first is the one that says so
    target = _logits_file(logits_out, shape) if writes and logits_out else nullcontext()
    with (
        target as file,
        tqdm(total=len(sequences.tokens), unit=" seq", disable=_quiet(writes)) as bar,
    ):

        def score(batch, output, non_loss_data=True):
            """Of one micro-batch: output is [b, s, v / TP]."""
            labels = torch.from_numpy(batch.labels).cuda()
            counts = labels != NO_LABEL
            for index, size in enumerate((vocab_size, None)):
                losses = _cross_entropy(output, labels.clamp(min=0), size)
                totals[index] += (losses * counts)[: batch.count].double().sum()
            totals[2] += counts[: batch.count].sum()
            if logits_out is not None:
                logits = tensor_parallel.gather_from_tensor_model_parallel_region(output.float())
                for start, count, rows in _gather_rows(batch, logits[..., :vocab_size]):
                    if file is not None:
                        file[start : start + count] = rows[:count].cpu().numpy()
            bar.update(batch.count * ranks)

        def step(iterator, model):
            batch = next(iterator)
            tokens = torch.from_numpy(batch.tokens).cuda()
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            return model(tokens, positions, None), partial(score, batch)

        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(own),
                model=model,
                num_microbatches=len(own),
                seq_length=sequences.tokens.shape[1],
                micro_batch_size=micro_batch,
                forward_only=True,
                collect_non_loss_data=True,
            )
    if not is_last or parallel_state.get_tensor_model_parallel_rank() != 0:
        totals.zero_()
    torch.distributed.all_reduce(totals)
    loss, padded, count = totals.tolist()
    padding = _padded_vocab_size(model) != vocab_size
    return Report(
        loss / count, int(count), len(sequences.tokens), padded / count if padding else None
    )


class HuggingFaceModel:
    """A Hugging Face folder, evaluated by transformers in this process.

    Args:
        folder: with config.json, weights and, for a text, tokenizer.
        trust_remote_code: whether code in the folder may run.

    Raises:
        InputError: here and in the methods, if transformers cannot load it.
    """

    def __init__(self, folder: str, trust_remote_code: bool = False):
        from transformers import AutoConfig  # takes seconds, which --load need not wait for

        self.folder = folder
        self.trust = dict(trust_remote_code=trust_remote_code)
        if not os.path.isdir(folder):
            raise InputError(f"--hf {folder}", "there is no such folder", "a model folder")
        with self._errors():
            self.config = AutoConfig.from_pretrained(folder, **self.trust).get_text_config()

    @cached_property
    def vocab_size(self) -> int:
        """How many of a token's logits are those of tokens; an export may hold padding as well."""
        from transformers import AutoTokenizer

        from megatron_scmoe.checkpoints.tokenizers import has_tokenizer  # it imports transformers

        rows, declared = self.config.vocab_size, getattr(self.config, "unpadded_vocab_size", None)
        entries = None
        if declared and has_tokenizer(Path(self.folder)):  # to which tokens may have been added
            with self._errors():
                entries = len(AutoTokenizer.from_pretrained(self.folder, **self.trust))
        return count_tokens(rows, declared, entries)

    @property
    def max_length(self) -> int:
        """Tokens that a sequence can have by the configuration."""
        return getattr(self.config, "max_position_embeddings", 1 << 30)

    def check_length(self, length: int) -> None:
        """Refuse a sequence that is longer than the model has positions, unless it rotates."""
        rotates = getattr(self.config, "rope_parameters", None)
        if length > self.max_length and not rotates:
            raise InputError(
                f"a sequence length of {length}",
                f"the model in {self.folder} has {self.max_length} positions",
                f"--sequence-length {self.max_length} or less",
            )

    def tokenize(self, text: str) -> np.ndarray:
        """The ids of a text, int64 [n]; no special tokens are added."""
        from transformers import AutoTokenizer

        if not any(any(Path(self.folder).glob(name)) for name in _OF_TOKENIZERS):
            raise InputError(
                f"--hf {self.folder}",
                "it has no tokenizer to read a text with",
                "a folder with its tokenizer's files, or --tokens FILE",
            )
        with self._errors():
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **self.trust)
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

    @torch.no_grad()
    def evaluate(
        self,
        sequences: Sequences,
        micro_batch: int = 1,
        logits_out: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> Report:
        """As :func:`evaluate`; ``dtype`` None is that of the files."""
        from transformers import AutoModelForCausalLM

        shape = (*sequences.tokens.shape, self.vocab_size)
        if logits_out:
            _check_space(logits_out, shape)
        with self._errors():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused by name
                **self.trust,
            )
        self._check_tensors(loaded)
        device = "cpu" if cpu_backend.is_enabled() else "cuda"
        model = model.to(device).eval()
        losses, count = [0.0, 0.0], 0  # over the tokens, and over the padding rows too
        target = _logits_file(logits_out, shape) if logits_out else nullcontext()
        with target as file, tqdm(total=shape[0], unit=" seq", disable=None) as bar:
            for batch in _batches(sequences, micro_batch, 1):
                tokens = torch.from_numpy(batch.tokens[: batch.count]).to(device)
                labels = torch.from_numpy(batch.labels[: batch.count]).to(device)
                logits = model(tokens).logits.float()
                for index, size in enumerate((self.vocab_size, None)):
                    losses[index] += torch.nn.functional.cross_entropy(
                        logits[..., :size].flatten(0, 1),
                        labels.flatten(),
                        ignore_index=NO_LABEL,
                        reduction="sum",
                    ).item()
                count += int((labels != NO_LABEL).sum())
                if file is not None:
                    file[batch.start : batch.start + batch.count] = (
                        logits[..., : self.vocab_size].cpu().numpy()
                    )
                bar.update(batch.count)
        padded = losses[1] / count if self.vocab_size != self.config.vocab_size else None
        return Report(losses[0] / count, count, shape[0], padded)

    def _check_tensors(self, loaded: dict) -> None:
        """Refuse weights that transformers would leave at random, or leave out, with a warning.

        ``loaded`` is its report, without tied weights and what the model declares dispensable.
        """
        flaws = {
            "is missing": sorted(loaded["missing_keys"]),
            "is left over, the model has none": sorted(loaded["unexpected_keys"]),
        }
        for name, found, expected in sorted(loaded["mismatched_keys"]):
            flaws[f"has the shape {list(found)} instead of {list(expected)}"] = [name]
        for flaw, names in flaws.items():
            if names:
                others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise InputError(
                    f"--hf {self.folder}",
                    f"tensor {names[0]} {flaw}{others}",
                    "a folder whose tensors are those that its config.json describes",
                )

    @contextmanager
    def _errors(self):
        try:
            yield
        except Exception as error:  # transformers raises what it likes
            reason = in_words(error, lines=1)
            if "`CONVERSION`" in reason:  # it refers to a report in the log
                reason = "tensors that it stacks, as those of experts, do not fit together"
            raise InputError(
                f"--hf {self.folder}",
                f"transformers cannot load it ({reason})",
                "a folder with config.json, weights and tokenizer; with code: --trust-remote-code",
            ) from error


_OF_TOKENIZERS = ("tokenizer*", "tokenization_*.py", "vocab*", "*.model", "merges.txt")
"""Files of which a Hugging Face folder with a tokenizer has one."""


@dataclass(frozen=True)
class _Batch:
    """``count`` rows from row ``start`` on, filled up to the size of a micro-batch."""

    start: int
    count: int
    tokens: np.ndarray
    labels: np.ndarray


def _batches(sequences: Sequences, size: int, ranks: int) -> list[_Batch]:
    """Micro-batches of equal size, as many for each rank; those that only fill up count no row."""
    total = len(sequences.tokens)
    batches = []
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        batches.append(
            _Batch(start, min(size, total - start), sequences.tokens[rows], sequences.labels[rows])
        )
    while len(batches) % ranks:
        batches.append(replace(batches[-1], count=0))
    return batches


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


def _gather_rows(batch: _Batch, logits: Tensor) -> Iterator[tuple[int, int, Tensor]]:
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


def _check_space(path: Path, shape: tuple[int, int, int]) -> None:
    lack = lack_of_space(path.absolute().parent, math.prod(shape) * 4)
    if lack:
        accepted = "a file on another disk, or fewer sequences (--limit)"
        raise InputError(f"--logits-out {path}", lack, accepted)


@contextmanager
def _logits_file(path: Path, shape: tuple[int, int, int]):
    """A float32 .npy file to fill in place, at ``path`` when it is whole."""
    with atomic_write(path) as (part,):
        file = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        try:
            with open(part, "r+b") as stream:  # a mapping of a file with holes dies on a full disk
                os.posix_fallocate(stream.fileno(), 0, part.stat().st_size)
        except OSError as error:
            raise InputError(
                f"--logits-out {path}", error.strerror or str(error), "a file on another disk"
            ) from error
        yield file
        file.flush()


def _padded_vocab_size(model) -> int:
    return getattr(model, "module", model).vocab_size


def _quiet(shows: bool) -> bool | None:
    """What tqdm's ``disable`` takes: None shows the bar on a terminal."""
    return None if shows else True
