"""Whole conversions: a folder in, a folder out, complete or not at all."""

import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_scmoe.checkpoints.config_checks import (
    check_folder,
    check_types,
    note_on_dtype,
    notes_on_ids,
    settle_head,
)
from megatron_scmoe.checkpoints.formats.registry import find_format
from megatron_scmoe.checkpoints.identify import ACCEPTED_FOLDER, what_is
from megatron_scmoe.checkpoints.lazy_tensor import (
    Tensors,
    check_weights,
    main_dtype,
    naming,
    total_bytes,
)
from megatron_scmoe.checkpoints.model_arguments import arguments_from_flags, check_dtype
from megatron_scmoe.checkpoints.model_card import model_card
from megatron_scmoe.checkpoints.output_folder import new_folder
from megatron_scmoe.checkpoints.safetensors_folder import (
    read_config,
    read_generation_config,
    read_safetensors,
    write_safetensors,
)
from megatron_scmoe.checkpoints.tokenizers import (
    NONE,
    TokenizerFiles,
    find_tokenizer,
    generation_config,
    has_tokenizer,
    tokenizer_flags,
)
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.torch_dist_writer import write_megatron
from megatron_scmoe.checkpoints.vocabulary import (
    EMBEDDING,
    Padding,
    count_tokens,
    note_on_rows,
    set_rows,
)
from megatron_scmoe.errors import ConversionError

KEPT_IN_FP32 = (".expert_bias", ".e_score_correction_bias")
"""Ends of the names of tensors that no dtype casts: choices of experts hang on their last bits."""


def megatron_to_hf(
    load: str | os.PathLike,
    output: str | os.PathLike,
    model_type: str = "scmoe",
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    tokenizer: str | None = None,
    keep_padding: bool = False,
    force: bool = False,
) -> list[str]:
    """Write a Megatron checkpoint as a folder that transformers loads.

    Args:
        load: what ``--save`` named, or an ``iter_...`` folder.
        output: the folder to make.
        model_type: the format, one of formats.NAMES.
        dtype: cast the weights; None leaves them as they are.
        max_shard_size: of a safetensors file, and of the memory used.
        tokenizer: instead of the checkpoint's: a SentencePiece model, a folder, or "none".
        keep_padding: write the rows that pad Megatron's vocabulary too; they are no tokens.
        force: replace ``output`` if it is a checkpoint.

    Returns:
        What was done, in lines for the user.

    Raises:
        ConversionError: if it cannot be done; nothing is written then.
    """
    form = find_format(model_type)
    checkpoint = read_megatron(load)
    args = checkpoint.args
    if args is None:
        raise ConversionError(f"{checkpoint.path}: no arguments were saved with it")
    if EMBEDDING not in checkpoint.tensors:
        raise ConversionError(f"{checkpoint.path}: tensor {EMBEDDING} is missing")
    rows = checkpoint.tensors[EMBEDDING].shape[0]
    files = find_tokenizer(args, tokenizer)
    tokens, is_known = _count_tokens(args, rows, files, tokenizer)
    kept = rows if keep_padding else tokens
    with naming(checkpoint.path):
        config = form.config(args, tokens, kept)
        tensors = cast(form.to_hf(config, set_rows(checkpoint.tensors, kept)), dtype)
    check_dtype(main_dtype(tensors))
    config["dtype"] = str(main_dtype(tensors)).removeprefix("torch.")
    for name in ("bos", "eos", "pad"):
        config[f"{name}_token_id"] = getattr(files, name)
    with new_folder(output, total_bytes(tensors), force, sources=[load]) as folder:
        files.save(folder)
        for file in form.code:
            shutil.copyfile(file, folder / file.name)
        _write_json(folder / "config.json", config)
        (folder / "generation_config.json").write_text(generation_config(files))
        name, readable = Path(output).name, has_tokenizer(folder)
        card = model_card(config, checkpoint, files.description, name, readable)
        (folder / "README.md").write_text(card)
        write_safetensors(folder, tensors, max_shard_size)
    return [
        f"{checkpoint.path} -> {output}",
        f"{len(tensors)} tensors, {total_bytes(tensors) / 1e9:.2f} GB, {config['dtype']}; "
        f"{files.description}",
        *_note_on_padding(tokens if is_known else None, rows, keep_padding),
    ]


def hf_to_megatron(
    source: str | os.PathLike,
    save: str | os.PathLike,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    padding: Padding | None = None,
    force: bool = False,
) -> list[str]:
    """Write a Hugging Face folder as a Megatron checkpoint, which loads on every layout.

    Args:
        source: the folder; its ``model_type`` says how to read it. No code in it is run.
        save: the folder to make, for ``--load``.
        dtype: cast the weights; None leaves them as they are.
        tokenizer: instead of the folder's: a SentencePiece model, a folder, or "none".
        padding: of the vocabulary, by rows of zeros; None for Megatron's default.
        force: replace ``save`` if it is a checkpoint.

    Returns:
        What was done, in lines for the user.

    Raises:
        ConversionError: if it cannot be done; nothing is written then.
    """
    source = Path(source).expanduser()
    if not (source / "config.json").is_file():
        raise ConversionError(f"--input {source}: {what_is(source)}; accepted: {ACCEPTED_FOLDER}")
    padding = padding or Padding()
    config = read_config(source)
    with naming(source):
        form = find_format(config.get("model_type"))
        check_folder(source, config)
        check_types(config, form.config_class)
        settings = form.flags(config)  # settings are judged before weights
        found = read_safetensors(source)
        check_weights(found)
        is_tied, found, notes = settle_head(
            bool(config.get("tie_word_embeddings")), found, form.embedding
        )
        if is_tied != bool(config.get("tie_word_embeddings")):
            config = config | {"tie_word_embeddings": is_tied}
            settings = form.flags(config)
        tensors = cast(form.to_megatron(config, found), dtype)
        left_out = form.left_out(config, found)
        size = tensors[EMBEDDING].shape[0]
        name_flags, entries = tokenizer_flags(source, size, given=tokenizer)
        tokens = count_tokens(size, config.get("unpadded_vocab_size"), entries)
        rows = padding.rows(size)
        tensors = set_rows(tensors, rows)
        flags = [*settings, *name_flags, *padding.flags, "--vocab-size", str(tokens)]
        args = arguments_from_flags(flags, main_dtype(tensors), rows)
    with new_folder(save, total_bytes(tensors), force, sources=[source]) as folder:
        write_megatron(folder, args, tensors)
    return [
        f"{source} -> {save}",
        f"{len(tensors)} tensors, {total_bytes(tensors) / 1e9:.2f} GB, {args.params_dtype}",
        f"vocabulary: {tokens} tokens, padded to {rows} rows",
        *note_on_rows(size, tokens, config.get("unpadded_vocab_size")),
        *notes,
        *note_on_dtype(config, args.params_dtype, dtype is not None),
        *notes_on_ids(config, read_generation_config(source), size),
        *(f"left out, the model does not use it: {name}" for name in left_out[:3]),
        *([f"... and {len(left_out) - 3} more such tensors"] if len(left_out) > 3 else []),
        f"train on: pretrain_gpt_scmoe.py --load {save} --use-checkpoint-args ...",
    ]


def cast(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The weights in ``dtype``; biases that choose experts stay in fp32."""
    if dtype is None:
        return tensors
    return {
        name: tensor if name.endswith(KEPT_IN_FP32) else tensor.cast(dtype)
        for name, tensor in tensors.items()
    }


def _count_tokens(
    args: argparse.Namespace, rows: int, files: TokenizerFiles, given: str | None
) -> tuple[int, bool]:
    """How many of a checkpoint's rows are tokens, and whether anything says so."""
    entries = files.tokens
    if given == NONE:  # the checkpoint's tokenizer still says it, if it is there
        with contextlib.suppress(ConversionError):
            entries = find_tokenizer(args).tokens
    if entries is not None and entries > rows:
        raise ConversionError(
            f"{files.description}: it has {entries} tokens, the checkpoint's embedding {rows} rows"
        )
    declared = getattr(args, "vocab_size", None)
    return count_tokens(rows, declared, entries), bool(declared or entries)


def _note_on_padding(tokens: int | None, rows: int, keep: bool) -> list[str]:
    if tokens is None:
        return [
            f"vocabulary: {rows} rows, with Megatron's padding if there is any: without a tokenizer "
            "nothing says how many are tokens"
        ]
    if tokens == rows:
        return []
    if keep:
        return [f"vocabulary: {tokens} tokens; ids from {tokens} to {rows - 1} pad it"]
    return [f"vocabulary: {tokens} tokens; {rows - tokens} rows that padded it are left out"]


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
