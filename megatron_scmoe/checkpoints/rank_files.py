"""Megatron's older format "torch": a file for each rank of a model, which loads where it was saved."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_scmoe.checkpoints.torch_dist import only_safe_types
from megatron_scmoe.errors import ConversionError, in_words


def read_common(folder: Path) -> dict[str, Any]:
    """What the first file holds beside tensors; nothing of it is executed. {} if there is none.

    Raises:
        ConversionError: if it cannot be read.
    """
    files = _files(folder)
    if not files:
        return {}
    try:
        with only_safe_types():
            state = torch.load(files[0], map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConversionError(f"{files[0]} is unreadable ({in_words(error)[:200]})") from error
    tensors = ("model", "optimizer", "rng_state")
    return {name: part for name, part in state.items() if not name.startswith(tensors)}


def find_missing(folder: Path) -> str | None:
    """Whether ranks have no file, by the layout in the first one; None if all have, or none says.

    Such a save was cut off: of this format no file is written last.
    """
    try:
        args = read_common(folder).get("args")
    except ConversionError:
        return None  # who reads it says why
    names = ("world_size", *(f"{part}_model_parallel_size" for part in ("tensor", "pipeline")))
    if args is None or not all(hasattr(args, name) for name in names):
        return None
    found, expected = len(_files(folder)), _number_of_files(args)
    return None if found >= expected else f"{folder} has files of {found} of {expected} ranks"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("mp_rank_*/model_optim_rng.pt"))


def _number_of_files(args: argparse.Namespace) -> int:
    """One for each set of tensor-, expert- and pipeline-parallel rank that there is."""
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    experts = getattr(args, "expert_model_parallel_size", 1)
    expert_tensor = getattr(args, "expert_tensor_parallel_size", None) or tensor
    ranks = range(args.world_size // stages)
    return stages * len({(rank % tensor, rank // expert_tensor % experts) for rank in ranks})
