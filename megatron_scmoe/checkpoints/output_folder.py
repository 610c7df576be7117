"""The folder that a conversion writes: what it may replace, and that there is space for it."""

import contextlib
import errno
import fnmatch
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron.core.dist_checkpointing.core import maybe_load_config

from megatron_scmoe.errors import NOT_JSON, ConversionError
from megatron_scmoe.platform.atomic_write import atomic_write, lack_of_space

TRACKER = "latest_checkpointed_iteration.txt"
"""What Megatron keeps in a folder of checkpoints."""

_MODEL_FOLDER = (
    *("config.json", "generation_config.json", "configuration_*.py", "modeling_*.py"),
    *("model*.safetensors", "model.safetensors.index.json", "README.md", "LICENSE*"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "sentencepiece*.model", "vocab.txt", "vocab.json", "merges.txt"),
    *("chat_template.*", ".gitattributes", "__pycache__"),
)
_CHECKPOINTS = (TRACKER, "iter_[0-9]*", "release", "progress.txt", "non_persistent")
_CHECKPOINT = (".metadata", "metadata.json", "common.pt", "*.distcp")
"""Names in a model folder, in what ``--save`` names, and in one checkpoint of it."""

_SPARE_BYTES = 8 * 2**20  # index, tokenizer, metadata


@contextlib.contextmanager
def new_folder(
    path: str | os.PathLike,
    needed_bytes: int,
    force: bool = False,
    sources: Iterable[str | os.PathLike] = (),
) -> Iterator[Path]:
    """A folder to fill, which takes the name ``path`` when the block ends well (atomic_write.py).

    Args:
        path: the folder to make; its parent must exist.
        needed_bytes: what will be written; free space is checked for it.
        force: replace a model folder or checkpoint that holds nothing else; no other folder is
            ever replaced.
        sources: folders that are read meanwhile, which ``path`` must not replace.

    Raises:
        ConversionError: if ``path`` exists and may not be replaced, or there is not enough space.
    """
    path = Path(path).expanduser().resolve()
    _check_place(path, force, sources)
    lack = lack_of_space(path.parent, needed_bytes + _SPARE_BYTES)
    if lack:
        raise ConversionError(f"{path}: {lack}; accepted: a folder on another disk")
    try:
        with contextlib.ExitStack() as stack:
            try:
                (folder,) = stack.enter_context(atomic_write(path))
            except OSError as error:
                raise ConversionError(
                    f"{path}: cannot be made ({error.strerror}); accepted: in a folder that can be "
                    "written to"
                ) from error
            folder.mkdir()
            yield folder
            _check_place(path, force, sources)
    except BaseException as error:
        for cause in _causes(error):
            if isinstance(cause, KeyboardInterrupt | SystemExit) and cause is not error:
                raise cause from None  # a file that it left open failed to close, and hid it
        if _is_disk_full(error, path.parent):
            raise ConversionError(
                f"{path}: the disk is full; accepted: a folder on another disk"
            ) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that were being handled when it was raised."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_disk_full(error: BaseException, parent: Path) -> bool:
    """Each library says it in its own way; PyTorch only of a file's length."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return True
        if "No space left on device" in str(cause):
            return True
    return isinstance(error, RuntimeError) and shutil.disk_usage(parent).free < 2**20


def _check_place(path: Path, force: bool, sources: Iterable[str | os.PathLike]) -> None:
    if not path.parent.is_dir():
        raise ConversionError(
            f"{path}: there is no folder {path.parent}; accepted: in one that exists"
        )
    for source in sources:
        source = Path(source).expanduser().resolve()
        if path == source or path in source.parents:
            raise ConversionError(f"{path}: it holds what is read ({source})")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise ConversionError(f"{path}: exists; --force replaces it")
    names = _names_of_its_kind(path)
    if names is None:
        raise ConversionError(
            f"{path}: exists and is no checkpoint; --force replaces no other files"
        )
    for entry in sorted(os.listdir(path)):
        if not any(fnmatch.fnmatchcase(entry, name) for name in names):
            raise ConversionError(
                f"{path / entry}: no part of a checkpoint; --force replaces no other files"
            )


def _names_of_its_kind(path: Path) -> tuple[str, ...] | None:
    """What may lie in a folder with a model or checkpoints; None if it is neither."""
    if (path / "config.json").is_file() and any(
        (path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        return _MODEL_FOLDER
    if (path / TRACKER).is_file():
        return _CHECKPOINTS
    if (path / ".metadata").is_file():
        with contextlib.suppress(*NOT_JSON, TypeError, AttributeError):  # another metadata.json
            config = maybe_load_config(str(path))
            if config is not None and config.sharded_backend == "torch_dist":
                return _CHECKPOINT
    return None
