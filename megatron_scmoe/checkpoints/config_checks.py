"""What a ``config.json`` says of the folder's tensors, held against the tensors.

Where both differ, the import does what transformers does on loading, so that both have one loss, and
says so in a note; what transformers would fill with random numbers is refused.
"""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import type_validator

from megatron_scmoe.checkpoints.lazy_tensor import Tensors, have_equal_values
from megatron_scmoe.errors import ConversionError

HEAD = "lm_head.weight"


def check_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder whose weights are not those of its safetensors files alone.

    Raises:
        ConversionError: for quantised weights, an adapter beside them, or files of other names.
    """
    for field, accepted in (
        ("quantization_config", "plain weights (dequantise them first)"),
        ("transformers_weights", "model.safetensors, or its index"),
    ):
        if config.get(field):
            raise ConversionError(f"{folder / 'config.json'}: it has {field}; accepted: {accepted}")
    if (folder / "adapter_config.json").is_file():
        raise ConversionError(
            f"{folder / 'adapter_config.json'}: an adapter, which transformers adds to the weights; "
            "accepted: a folder with the adapter merged (merge_and_unload)"
        )


def check_dropouts(config: Mapping[str, Any]) -> None:
    """Refuse probabilities that are none, by field."""
    for name, value in config.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name.endswith(("_dropout", "_pdrop")) and is_number and not 0 <= value <= 1:
            raise ConversionError(f"config.json: {name} is {value}; accepted: 0 to 1")


def check_types(config: Mapping[str, Any], kind: type) -> None:
    """Refuse fields whose values are not of the type that a configuration class declares.

    Args:
        config: a ``config.json``.
        kind: the class; fields that it does not declare are not judged.

    Raises:
        ConversionError: it names the field, and what is accepted.
    """
    check_dropouts(config)
    is_own = kind.__module__.startswith("megatron_scmoe.")
    for name, expected in inspect.get_annotations(kind).items():
        value = config.get(name)
        is_size = name.endswith(_SIZES) and expected is int and is_own  # others' int may be null
        if is_size and name in config and value is None:
            raise ConversionError(f"config.json: {name} is null; accepted: 1 or more")
        if name.startswith("_") or value is None:  # None is the class's to judge
            continue
        if type(value) is int and expected in (float, float | None):
            value = float(value)  # JSON has one kind of number
        try:
            type_validator(name, value, expected)
        except TypeError as error:
            if str(error).startswith("Unsupported type"):
                continue
            shown = expected.__name__ if isinstance(expected, type) else expected
            raise ConversionError(
                f"config.json: {name} is {str(value)[:60]!r}; accepted: {shown}"
            ) from error
        if isinstance(value, float) and not math.isfinite(value):
            raise ConversionError(f"config.json: {name} is {value}; accepted: a finite number")
        if name.endswith(_SIZES) and type(value) is int and value < 1:
            raise ConversionError(f"config.json: {name} is {value}; accepted: 1 or more")


_SIZES = (
    "_size",
    "_layers",
    "_heads",
    "_dim",
    "_rank",
    "position_embeddings",
    "_experts",
    "_topk",
    "_per_tok",
)


def settle_head(is_tied: bool, tensors: Tensors, embedding: str) -> tuple[bool, Tensors, list[str]]:
    """Whether the output layer is the embedding, as transformers decides on loading.

    A model that is said to be tied is so only if the files have no output layer, or the same values
    in it; if they have no embedding, the output layer is both.

    Args:
        is_tied: ``tie_word_embeddings`` of ``config.json``.
        tensors: of the folder.
        embedding: the embedding's name among them.

    Returns:
        Whether it is tied, the tensors (without an output layer if so), and notes for the user.

    Raises:
        ConversionError: if it is not tied, and there is no output layer.
    """
    tensors = dict(tensors)
    if HEAD not in tensors:
        if not is_tied and embedding in tensors:
            raise ConversionError(
                f"there is no tensor {HEAD}, and tie_word_embeddings is false in config.json; "
                "accepted: the tensor, or tie_word_embeddings true"
            )
        return is_tied, tensors, []
    if not is_tied:
        return False, tensors, []
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(HEAD)
        return True, tensors, [f"tied: {HEAD} is the embedding as well, which the files have not"]
    if have_equal_values(tensors[embedding], tensors[HEAD]):
        del tensors[HEAD]
        return True, tensors, []
    return (
        False,
        tensors,
        [
            f"not tied, as transformers loads it: {HEAD} differs from {embedding}, whatever "
            "tie_word_embeddings in config.json says"
        ],
    )


def notes_on_ids(config: Mapping[str, Any], generation: Mapping[str, Any], rows: int) -> list[str]:
    """Special tokens that the vocabulary does not have, each in a line.

    Args:
        config, generation: ``config.json`` and ``generation_config.json``.
        rows: of the embedding.
    """
    notes = []
    for file, fields in (("config.json", config), ("generation_config.json", generation)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = fields.get(name)
            for i in ids if isinstance(ids, list) else [ids]:
                if isinstance(i, int) and not 0 <= i < rows:
                    notes.append(
                        f"not used: {name} {i} of {file} is outside the vocabulary of {rows}"
                    )
    return notes


def note_on_dtype(config: Mapping[str, Any], dtype: torch.dtype, is_given: bool) -> list[str]:
    """A line if config.json says another dtype than the weights are written in, unless asked for."""
    said = config.get("dtype") or config.get("torch_dtype")
    said = str(said).removeprefix("torch.") if said else None
    written = str(dtype).removeprefix("torch.")
    if said in (None, "auto", written) or is_given:
        return []
    return [f"{written}, as most of the tensors; config.json says {said} (--dtype casts)"]
