"""The rows of the vocabulary: tokens, and the rows that Megatron adds so that ranks can share them.

Padding rows stand behind the tokens. They are no tokens: exports leave them out, imports add them.
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, concatenate
from megatron_scmoe.errors import ConversionError, InputError

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
"""Megatron's two tensors of the vocabulary, [rows, hidden]; a tied model has the first alone."""

_RANKS_OF_AN_IMPORT = 8
"""For which an imported vocabulary may have been padded: its arguments do not say so."""


@dataclass(frozen=True)
class Padding:
    """How many rows a checkpoint gets: a multiple of ``multiple * tensor_parallel``.

    These are Megatron's ``--make-vocab-size-divisible-by``, with its default, and the largest
    ``--tensor-model-parallel-size`` that is to load the checkpoint.
    """

    multiple: int = 128
    tensor_parallel: int = 1

    def rows(self, tokens: int) -> int:
        """Rows for so many tokens, as Megatron counts them.

        Raises:
            ConversionError: if one of the three is below 1.
        """
        for flag, value in (
            ("--make-vocab-size-divisible-by", self.multiple),
            ("--target-tensor-parallel", self.tensor_parallel),
            ("the vocabulary: tokens", tokens),
        ):
            if value < 1:
                raise ConversionError(f"{flag} {value}: accepted: 1 or more")
        return calculate_padded_vocab_size(
            tokens, self.multiple, self.tensor_parallel, logging_enabled=False
        )

    @property
    def flags(self) -> list[str]:
        """The flag that says so to Megatron."""
        return ["--make-vocab-size-divisible-by", str(self.multiple)]


def count_tokens(rows: int, declared: int | None, entries: int | None = None) -> int:
    """How many of the rows are tokens; all if nobody says.

    Args:
        rows: of the embedding.
        declared: what config.json or Megatron's arguments say; left out if it is more than there are.
        entries: of the tokenizer, None without one. Tokens added to it later count.
    """
    known = [n for n in (declared, entries) if n and n <= rows]
    return max(known, default=rows)


def check_tokenizer(given: str, entries: int, args: Namespace) -> None:
    """Refuse a tokenizer with more entries than a checkpoint has rows, or fewer than padding explains.

    Args:
        given: the flag, with its value.
        entries: of the tokenizer.
        args: the checkpoint's.

    Raises:
        InputError: if it is another model's.
    """
    rows = args.padded_vocab_size
    ranks = max(args.tensor_model_parallel_size, _RANKS_OF_AN_IMPORT)
    most = args.make_vocab_size_divisible_by * ranks - 1
    if not 0 <= rows - entries <= most:
        padding = f", of which {most} may be padding" if entries < rows else ""
        raise InputError(
            given,
            f"it has {entries} entries, and the model {rows} rows{padding}",
            "the tokenizer that the model was trained with",
        )


def note_on_rows(rows: int, tokens: int, declared: int | None) -> list[str]:
    """A line on rows that nobody but the tokenizer calls padding: another tokenizer may use them."""
    if declared or tokens == rows:
        return []
    return [
        f"the tokenizer has no entry for the last {rows - tokens} of {rows} rows: they count as padding"
    ]


def set_rows(tensors: Mapping[str, LazyTensor], rows: int) -> dict[str, LazyTensor]:
    """Megatron's tensors with so many rows of the vocabulary: cut, or padded with zeros."""
    result = dict(tensors)
    for name in (EMBEDDING, OUTPUT_LAYER):
        if name in result:
            result[name] = _set_rows(result[name], rows)
    return result


def _set_rows(tensor: LazyTensor, rows: int) -> LazyTensor:
    missing = rows - tensor.shape[0]
    if missing <= 0:
        return tensor.narrow(0, 0, rows) if missing else tensor
    return concatenate([tensor, LazyTensor.full((missing, tensor.shape[1]), 0.0, tensor.dtype)])
