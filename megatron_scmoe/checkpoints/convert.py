"""Whole conversions: a folder in, a folder out, complete or not at all."""

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_scmoe.checkpoints.arguments import DTYPES, arguments_from_flags, check_dtype
from megatron_scmoe.checkpoints.folder import new_folder
from megatron_scmoe.checkpoints.formats import Tensors, find_format
from megatron_scmoe.checkpoints.lazy import (
    ConversionError,
    check_weights,
    naming,
    total_bytes,
)
from megatron_scmoe.checkpoints.model_card import model_card
from megatron_scmoe.checkpoints.safetensors_folder import (
    read_config,
    read_safetensors,
    write_safetensors,
)
from megatron_scmoe.checkpoints.tokenizers import find_tokenizer, generation_config, tokenizer_flags
from megatron_scmoe.checkpoints.torch_dist import read_megatron, write_megatron

EMBEDDING = "embedding.word_embeddings.weight"
KEPT_IN_FP32 = (".expert_bias", ".e_score_correction_bias")
"""Ends of the names of tensors that no dtype casts: choices of experts hang on their last bits."""


def megatron_to_hf(
    load: str | os.PathLike,
    output: str | os.PathLike,
    model_type: str = "scmoe",
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
    tokenizer: str | None = None,
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
    tokens = rows if files.tokens is None else files.tokens
    if tokens > rows:
        raise ConversionError(
            f"{files.description}: it has {tokens} tokens, the checkpoint's embedding {rows} rows"
        )
    with naming(checkpoint.path):
        config = form.config(args, tokens, rows)
        tensors = cast(form.to_hf(config, checkpoint.tensors), dtype)
    config["dtype"] = _dtype_name(_main_dtype(tensors))
    for name in ("bos", "eos", "pad"):
        config[f"{name}_token_id"] = getattr(files, name)
    with new_folder(output, total_bytes(tensors), force, sources=[load]) as folder:
        files.save(folder)
        for file in form.code:
            shutil.copyfile(file, folder / file.name)
        _write_json(folder / "config.json", config)
        (folder / "generation_config.json").write_text(generation_config(files, tokens, rows))
        card = model_card(config, checkpoint, tensors, files.description, Path(output).name)
        (folder / "README.md").write_text(card)
        write_safetensors(folder, tensors, max_shard_size)
    return [
        f"{checkpoint.path} -> {output}",
        f"{len(tensors)} tensors, {total_bytes(tensors) / 1e9:.2f} GB, {config['dtype']}; "
        f"{files.description}",
    ]


def hf_to_megatron(
    source: str | os.PathLike,
    save: str | os.PathLike,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> list[str]:
    """Write a Hugging Face folder as a Megatron checkpoint, which loads on every layout.

    Args:
        source: the folder; its ``model_type`` says how to read it. No code in it is run.
        save: the folder to make, for ``--load``.
        dtype: cast the weights; None leaves them as they are.
        force: replace ``save`` if it is a checkpoint.

    Returns:
        What was done, in lines for the user.

    Raises:
        ConversionError: if it cannot be done; nothing is written then.
    """
    source = Path(source).expanduser()
    config = read_config(source)
    with naming(source), _naming_types(source):
        form = find_format(config.get("model_type"))
        found = read_safetensors(source)
        check_weights(found)
        tensors = cast(form.to_megatron(config, found), dtype)
        left_out = form.left_out(config, found)
        rows = tensors[EMBEDDING].shape[0]
        tokens = config.get("unpadded_vocab_size") or rows
        flags = [*form.flags(config), *tokenizer_flags(source, tokens, rows)]
        args = arguments_from_flags(flags, _main_dtype(tensors), rows)
    with new_folder(save, total_bytes(tensors), force, sources=[source]) as folder:
        write_megatron(folder, args, tensors)
    return [
        f"{source} -> {save}",
        f"{len(tensors)} tensors, {total_bytes(tensors) / 1e9:.2f} GB, {args.params_dtype}",
        *(f"left out, the model does not use it: {name}" for name in left_out[:3]),
        *([f"... and {len(left_out) - 3} more such tensors"] if len(left_out) > 3 else []),
        f"train on: pretrain_gpt_scmoe.py --load {save} --use-checkpoint-args ...",
    ]


@contextlib.contextmanager
def _naming_types(source: Path) -> Iterator[None]:
    """A field of config.json with a value of another type fails wherever it is computed with."""
    try:
        yield
    except ConversionError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise ConversionError(
            f"{source / 'config.json'}: a field has no value of its type ({reason})"
        ) from error


def cast(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The weights in ``dtype``; biases that choose experts stay in fp32."""
    if dtype is None:
        return tensors
    return {
        name: tensor if name.endswith(KEPT_IN_FP32) else tensor.cast(dtype)
        for name, tensor in tensors.items()
    }


def parse_dtype(name: str) -> torch.dtype:
    """``fp32``, ``bf16`` or ``fp16``; raises argparse.ArgumentTypeError for others."""
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{name}: accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def _main_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of most bytes."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    dtype = max(sizes, key=sizes.__getitem__)
    check_dtype(dtype)
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
