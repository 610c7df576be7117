"""Under which key a checkpoint has the norm before a MoE: Megatron's two implementations differ."""

import functools
import os

from megatron.core import dist_checkpointing
from megatron.training.checkpointing import (
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    read_metadata,
)


@functools.cache
def has_local_norm_keys(folder: str | None, iteration: int | None = None) -> bool:
    """Whether a checkpoint was written by Megatron's own local implementation of a MoE.

    That one saves the norm before a MoE as ``mlp.linear_fc1.layer_norm_weight``, where Transformer
    Engine and this package save ``pre_mlp_layernorm.weight``.

    Args:
        folder: what ``--load`` names; None and folders without a checkpoint have no such keys.
        iteration: the checkpoint in it; None for the last one.
    """
    if folder is None or not os.path.isfile(get_checkpoint_tracker_filename(folder)):
        return False
    if iteration is None:
        iteration, release = read_metadata(get_checkpoint_tracker_filename(folder))
    else:
        release = False
    path = get_checkpoint_name(folder, iteration, release, return_base_dir=True)
    return has_local_norm_keys_at(path)


def has_local_norm_keys_at(path: str) -> bool:
    """As :func:`has_local_norm_keys`, of the folder of one iteration."""
    if not dist_checkpointing.check_is_distributed_checkpoint(path):
        return False
    keys = dist_checkpointing.load_tensors_metadata(path).keys()
    blocks_with_router = {key.split(".mlp.")[0] for key in keys if ".mlp.router." in key}
    return any(f"{block}.mlp.linear_fc1.layer_norm_weight" in keys for block in blocks_with_router)
