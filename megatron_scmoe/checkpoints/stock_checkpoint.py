"""A stock Megatron GPT's checkpoint, held against its own arguments."""

import argparse
import contextlib
import os
from pathlib import Path

import torch

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, have_equal_values, naming
from megatron_scmoe.checkpoints.model_arguments import with_megatron_defaults
from megatron_scmoe.checkpoints.tokenizers import NONE, find_tokenizer, tokenizer_flags
from megatron_scmoe.checkpoints.torch_dist import LAYOUT, read_megatron
from megatron_scmoe.checkpoints.vocabulary import (
    EMBEDDING,
    OUTPUT_LAYER,
    Padding,
    count_tokens,
    set_rows,
)
from megatron_scmoe.errors import ConversionError


def read_stock(
    source: Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    padding: Padding | None = None,
) -> tuple[argparse.Namespace, dict[str, LazyTensor]]:
    """Arguments and tensors of a stock checkpoint, dense or MoE, as one rank would have saved them.

    Args:
        dtype: of the weights; None as they are.
        tokenizer: instead of the checkpoint's: a SentencePiece model, a folder, or "none".
        padding: of the vocabulary; None for the rows that it has.

    Raises:
        ConversionError: if it is none, or its arguments contradict its tensors.
    """
    checkpoint = read_megatron(source)
    if checkpoint.args is None:
        raise ConversionError(f"{checkpoint.path}: it holds no arguments")
    if hasattr(checkpoint.args, "scmoe_tap"):
        raise ConversionError(f"{checkpoint.path}: it is a ScMoE model already")
    if getattr(checkpoint.args, "spec", None):
        raise ConversionError(
            f"{checkpoint.path}: built by --spec {' '.join(checkpoint.args.spec)}; accepted: "
            "Megatron's own GPT"
        )
    if EMBEDDING not in checkpoint.tensors:
        raise ConversionError(f"{checkpoint.path}: tensor {EMBEDDING} is missing")
    args = with_megatron_defaults(checkpoint.args)
    vars(args).update(dict.fromkeys(LAYOUT, 1), sequence_parallel=False)
    with naming(checkpoint.path):
        tensors = _settle_head(args, checkpoint.tensors)
        if dtype is not None:
            tensors = {name: tensor.cast(dtype) for name, tensor in tensors.items()}
            args.params_dtype = dtype
            args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        tokens = _set_tokenizer(args, tensors[EMBEDDING].shape[0], tokenizer)
        if padding is not None:
            args.padded_vocab_size = padding.rows(tokens)
            args.make_vocab_size_divisible_by = padding.multiple
            tensors = set_rows(tensors, args.padded_vocab_size)
    return args, tensors


def _settle_head(args: argparse.Namespace, tensors: dict[str, LazyTensor]):
    """Megatron saves no output layer of a tied model; of another one, nobody knows which counts."""
    if args.untie_embeddings_and_output_weights or OUTPUT_LAYER not in tensors:
        return dict(tensors)  # a missing one is missed with the others
    if not have_equal_values(tensors[EMBEDDING], tensors[OUTPUT_LAYER]):
        raise ConversionError(
            f"tensor {OUTPUT_LAYER} differs from {EMBEDDING}, and the arguments lack "
            "--untie-embeddings-and-output-weights; accepted: a checkpoint whose arguments fit"
        )
    return {name: tensor for name, tensor in tensors.items() if name != OUTPUT_LAYER}


def _set_tokenizer(args: argparse.Namespace, rows: int, given: str | None) -> int:
    """Have the arguments name the tokenizer that was given, or the old one; count the tokens."""
    entries = None
    with contextlib.suppress(ConversionError):  # not there any more, or of another kind
        entries = find_tokenizer(args).tokens
    if given is None:
        _forget_missing_tokenizer(args)
        return count_tokens(rows, args.vocab_size, entries)
    flags, found = tokenizer_flags(Path(given), rows, given=given)
    entries = entries if given == NONE else found
    named = dict(zip(flags[::2], flags[1::2]))
    args.tokenizer_type = named["--tokenizer-type"]
    args.tokenizer_model = named.get("--tokenizer-model")
    args.vocab_size = count_tokens(rows, args.vocab_size, entries)
    return args.vocab_size


def _forget_missing_tokenizer(args: argparse.Namespace) -> None:
    """Name no tokenizer that is not there (any more); a name on Hugging Face's hub is no path."""
    model = args.tokenizer_model
    on_hub = args.tokenizer_type == "HuggingFaceTokenizer" and not os.path.isabs(model or "")
    if model is not None and not on_hub and not os.path.exists(model):
        args.tokenizer_model = None
