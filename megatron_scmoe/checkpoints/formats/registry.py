"""The Hugging Face formats by ``model_type``: of ScMoE models both ways, of dense models in."""

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scmoe.checkpoints.lazy_tensor import Tensors
from megatron_scmoe.checkpoints.parameter_mapping import ParamMapping
from megatron_scmoe.errors import ConversionError

_MODULES = {"scmoe": "scmoe", "longcat_flash": "longcat_flash"}
"""The module in this folder of each ``model_type``; it holds a :class:`Format` named ``FORMAT``."""

_DENSE_MODULES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "llama",
    "gpt2": "gpt2",
}
"""The same of dense models, whose ``FORMAT`` is a :class:`DenseFormat`."""

NAMES = tuple(_MODULES)
DENSE_NAMES = tuple(sorted(_DENSE_MODULES))


@dataclass(frozen=True)
class Format:
    """A ``model_type`` of transformers and the Megatron model it is.

    Tensors are named as in :class:`~megatron_scmoe.checkpoints.torch_dist.MegatronCheckpoint`. All
    functions raise ConversionError: naming flag or field for what the other side cannot express,
    and naming the tensor for one that is missing, left over or of the wrong shape.

    Args:
        model_type: as in ``config.json``.
        config_class: that of transformers, which declares the fields' types.
        config: gives ``config.json`` from Megatron's arguments, the number of tokens that exist and
            the rows of the embedding that are written.
        to_hf: gives the tensors of the folder from ``config.json`` and Megatron's tensors.
        flags: gives the flags of ``pretrain_gpt_scmoe.py`` from ``config.json``.
        to_megatron: gives Megatron's tensors from ``config.json`` and those of the folder.
        embedding: the name of the embedding's tensor in the folder.
        code: files that are copied beside the weights.
        left_out: gives the names of those tensors of the folder that the model does not use and
            ``to_megatron`` leaves out.
    """

    model_type: str
    config_class: type
    config: Callable[[argparse.Namespace, int, int], dict[str, Any]]
    to_hf: Callable[[Mapping[str, Any], Tensors], Tensors]
    flags: Callable[[Mapping[str, Any]], list[str]]
    to_megatron: Callable[[Mapping[str, Any], Tensors], Tensors]
    embedding: str = "model.embed_tokens.weight"
    code: tuple[Path, ...] = ()
    left_out: Callable[[Mapping[str, Any], Tensors], list[str]] = lambda config, tensors: []


@dataclass(frozen=True)
class DenseFormat:
    """A ``model_type`` of transformers, or several alike, and the dense GPT of Megatron it is.

    Args:
        prefix: what the names of all tensors but the output layer's begin with.
        embedding: the name of the embedding's tensor behind the prefix.
        flags: gives the model's flags of the pretraining script from transformers' configuration, or
            raises ConversionError naming the field.
        mapping: gives the tensors of both sides from transformers' configuration, and whether the
            output layer is the embedding.
    """

    prefix: str
    embedding: str
    flags: Callable[[Any], list[str]]
    mapping: Callable[[Any, bool], ParamMapping]


def find_format(model_type: str | None) -> Format:
    """The format of a ``model_type``.

    Raises:
        ConversionError: if there is none.
    """
    if not isinstance(model_type, str) or model_type not in _MODULES:
        raise ConversionError(
            f"model_type {model_type}; accepted: {', '.join(NAMES)} (dense models: upcycle)"
        )
    return _import(_MODULES[model_type])


def find_dense_format(model_type: str) -> DenseFormat:
    """The format of one of :data:`DENSE_NAMES`."""
    return _import(_DENSE_MODULES[model_type])


def _import(module: str):
    return importlib.import_module(f"megatron_scmoe.checkpoints.formats.{module}").FORMAT
