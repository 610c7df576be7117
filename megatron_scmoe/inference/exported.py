"""A model folder of Hugging Face where a Megatron checkpoint is asked for: converted for the while."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megatron_scmoe.checkpoints.convert import hf_to_megatron
from megatron_scmoe.errors import ConversionError, InputError


def is_model_folder(path: str) -> bool:
    """Whether transformers would load it."""
    return Path(path, "config.json").is_file()


@contextmanager
def as_megatron(load: str, step: int | None = None) -> Iterator[str]:
    """What ``--load`` names as a Megatron checkpoint; all ranks call it.

    One process of each host converts a model folder into a temporary one, which is gone at the end. It
    has to fit on the disk of ``$TMPDIR``. No code in the folder is run.

    Args:
        step: ``--ckpt-step``, which a model folder does not have.

    Raises:
        InputError, ConversionError: on every rank, if it cannot be converted.
    """
    if not is_model_folder(load):
        yield load
        return
    if step is not None:
        raise InputError(
            f"--ckpt-step {step}", f"{load} is a model folder, not iterations", "--load alone"
        )
    host = int(os.environ.get("GROUP_RANK", "0"))
    with ExitStack() as stack:
        folder = flaw = None
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="scmoe-"))
            folder = os.path.join(folder, Path(load).resolve().name or "model")
            try:
                hf_to_megatron(load, folder)
            except ConversionError as error:
                flaw = str(error)
        known: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(known, (host, folder, flaw))
        for _, _, flaw in known:
            if flaw is not None:
                raise ConversionError(flaw)
        yield next(path for its_host, path, _ in known if its_host == host and path is not None)
