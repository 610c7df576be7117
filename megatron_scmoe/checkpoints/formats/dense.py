"""Dense Hugging Face models as Megatron's GPT: settings as flags, weights by Megatron's names.

Families: Llama, Mistral, Qwen2 and Qwen3 (llama.py), GPT-2 (gpt2.py). What Megatron-Core 0.19.2 cannot
compute as transformers does is refused with the name of the field in config.json.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_scmoe.checkpoints.config_checks import (
    HEAD,
    check_dropouts,
    check_folder,
    note_on_dtype,
    notes_on_ids,
    settle_head,
)
from megatron_scmoe.checkpoints.formats.registry import DENSE_NAMES, find_dense_format
from megatron_scmoe.checkpoints.lazy_tensor import (
    LazyTensor,
    Tensors,
    check_weights,
    main_dtype,
    naming,
)
from megatron_scmoe.checkpoints.model_arguments import DTYPES
from megatron_scmoe.checkpoints.safetensors_folder import (
    read_config,
    read_generation_config,
    read_safetensors,
)
from megatron_scmoe.checkpoints.tokenizers import tokenizer_flags
from megatron_scmoe.checkpoints.vocabulary import OUTPUT_LAYER, Padding, set_rows
from megatron_scmoe.errors import ConversionError


@dataclass(frozen=True)
class DenseModel:
    """A dense GPT in Megatron's terms.

    ``flags`` are the model's flags of the pretraining script, but for ``dtype``; ``tensors`` its
    weights by the keys of a checkpoint, one key a layer; ``vocab_rows`` counts the embedding's rows,
    padding included; ``notes`` say, each in a line, where config.json and tensors differ.
    """

    flags: list[str]
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype
    vocab_rows: int
    notes: list[str] = field(default_factory=list)


def read_hugging_face(
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    padding: Padding | None = None,
) -> DenseModel:
    """A dense model from a Hugging Face folder with safetensors files.

    Args:
        dtype: of the weights; None for that of most bytes in the files.
        tokenizer: instead of the folder's: a SentencePiece model, a folder, or "none".
        padding: of the vocabulary; None for Megatron's default.

    Raises:
        ConversionError: for another architecture or a setting that Megatron does not have, and for
            tensors that are missing, left over or of another shape than config.json says.
    """
    folder = Path(folder)
    with naming(folder):
        return _read(folder, dtype, tokenizer, padding or Padding())


def _read(
    folder: Path, dtype: torch.dtype | None, tokenizer: str | None, padding: Padding
) -> DenseModel:
    fields = read_config(folder)
    check_folder(folder, fields)
    check_dropouts(fields)
    config = _read_config(folder, fields)
    form = find_dense_format(config.model_type)
    flags = form.flags(config)  # settings are judged before weights
    size = config.vocab_size
    rows = padding.rows(size)
    name_flags, _ = tokenizer_flags(folder, size, sentencepiece_first=False, given=tokenizer)
    found, notes = _read_weights(folder, form.prefix, config)
    target = dtype or main_dtype(found)
    if target not in DTYPES.values():
        raise ConversionError(f"{folder}: weights of {target}; accepted: with --dtype")
    if dtype is None:
        notes += _note_on_others(found, target)
    is_tied, found, notes_on_head = settle_head(
        config.tie_word_embeddings, found, form.prefix + form.embedding
    )
    mapping = form.mapping(config, is_tied)
    tensors = mapping.to_megatron({name: tensor.cast(target) for name, tensor in found.items()})
    if OUTPUT_LAYER in tensors:
        flags = [*flags, "--untie-embeddings-and-output-weights"]
    return DenseModel(
        [
            *flags,
            *name_flags,
            *padding.flags,
            *("--vocab-size", str(size), "--padded-vocab-size", str(rows)),
        ],
        set_rows(tensors, rows),
        target,
        rows,
        [
            *notes,
            *notes_on_head,
            *note_on_dtype(fields, target, dtype is not None),
            *notes_on_ids(fields, read_generation_config(folder), size),
        ],
    )


def _read_config(folder: Path, fields: dict):
    """config.json as transformers understands it, whatever version wrote it; runs no code of it."""
    file = folder / "config.json"
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in DENSE_NAMES:
        raise ConversionError(f"{file}: model_type is {kind}; accepted: {', '.join(DENSE_NAMES)}")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # its checks raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(f"{file}: transformers refuses it ({reason})") from error
    if config.model_type != kind:  # a Mistral model with layer_types is a Ministral one to it
        raise ConversionError(
            f"{file}: transformers takes it for {config.model_type}, whatever model_type {kind} says; "
            f"accepted: {', '.join(DENSE_NAMES)}"
        )
    return config


def _read_weights(folder: Path, prefix: str, config) -> tuple[Tensors, list[str]]:
    """The weights by the names of a model with its head, and notes on what else is in the files."""
    found: Tensors = {}
    for name, tensor in read_safetensors(folder).items():
        if name != HEAD and not name.startswith(prefix):
            name = prefix + name  # files of a model without its head
        if name in found:
            raise ConversionError(f"{folder}: the tensor {name} is there with and without prefix")
        found[name] = tensor
    notes = []
    for name in [name for name in found if name.endswith(_BUFFERS)]:
        tensor = found.pop(name)
        if name.endswith(_ROPE_BUFFER) and not _is_rope_of(config, tensor):
            notes.append(
                f"not used, as in transformers: {name}, which is another rope than that of "
                "rope_parameters in config.json"
            )
    if not found:
        raise ConversionError(f"{folder}: its files hold no weights")
    check_weights(found)
    return found, notes


_ROPE_BUFFER = ".rotary_emb.inv_freq"
_BUFFERS = (_ROPE_BUFFER, ".attn.bias", ".attn.masked_bias")
"""What older files hold beside weights."""


def _is_rope_of(config, inverse_frequencies: LazyTensor) -> bool:
    """Whether a buffer in the files is what transformers computes from config.json."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected = LlamaRotaryEmbedding(config).inv_freq
    found, limits = inverse_frequencies.load(), torch.finfo(inverse_frequencies.dtype)
    return expected.shape == found.shape and torch.allclose(
        found.float(), expected, rtol=max(1e-4, 2 * limits.eps), atol=limits.smallest_normal
    )


def _note_on_others(found: Tensors, target: torch.dtype) -> list[str]:
    """A line on weights of another dtype than most, which they get."""
    others = {tensor.dtype for tensor in found.values()} - {target}
    if not others:
        return []
    names = " and ".join(str(d).removeprefix("torch.") for d in sorted(others, key=str))
    return [f"cast to {str(target).removeprefix('torch.')}: tensors of {names}"]
