"""What a path holds, told from names of files alone, for errors that say what was given."""

import contextlib
import json
from pathlib import Path

from megatron_scmoe.checkpoints.output_folder import TRACKER
from megatron_scmoe.errors import NOT_JSON

ACCEPTED_FOLDER = "a Hugging Face folder with config.json and safetensors files"
ACCEPTED = (
    f"a torch_dist checkpoint (a folder with {TRACKER}, or an iter_ folder), or {ACCEPTED_FOLDER}"
)


MEGATRON = "a Megatron checkpoint"
HUGGING_FACE = "a Hugging Face folder"


def what_is(path: Path) -> str:
    """A few words on a file or folder: "an empty folder", "a checkpoint of --ckpt-format torch"."""
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    if not path.exists():
        return "no such file or folder"
    if not path.is_dir():
        return _FILES.get(path.suffix, "a file")
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError as error:
        return error.strerror or "unreadable"
    if not names:
        return "an empty folder"
    if (path / TRACKER).is_file():
        return _what_tracker_names(path)
    backend = _backend(path)
    if backend == "torch_dist":
        return MEGATRON
    is_model = "config.json" in names and "adapter_config.json" not in names
    if is_model and any(name.endswith(".safetensors") for name in names):
        return HUGGING_FACE
    for kind, patterns in _FOLDERS.items():
        if any(next(path.glob(pattern), None) is not None for pattern in patterns):
            return kind
    return f"a distributed checkpoint of the backend {backend}" if backend else "another folder"


_FILES = {
    ".safetensors": "one file of a Hugging Face folder, which is to be given whole",
    ".json": "one file of a folder, which is to be given whole",
    ".distcp": "one file of a torch_dist checkpoint, whose iter_ folder is to be given",
    ".bin": "a file of pickled weights, which is never loaded",
    ".pt": "a file of pickled weights, which is never loaded",
    ".pth": "a file of pickled weights, which is never loaded",
    ".ckpt": "a file of pickled weights, which is never loaded",
    ".gguf": "a GGUF file",
    ".nemo": "a NeMo archive",
}

_FOLDERS = {
    "a checkpoint of Megatron's --ckpt-format torch (re-save it: --ckpt-convert-format torch_dist)": (
        "mp_rank_*",
    ),
    "a folder of tensors in GGUF": ("*.gguf",),
    "an adapter without its model": ("adapter_config.json",),
    "a Hugging Face folder with pickled weights, which are never loaded (save it with safetensors)": (
        "pytorch_model*.bin",
    ),
    "safetensors files without config.json": ("*.safetensors",),
    "a folder of checkpoints without " + TRACKER: ("iter_[0-9]*", "release"),
    "a checkpoint of --ckpt-format torch_dcp or fsdp_dtensor, or of PyTorch alone": (".metadata",),
    "an optimizer's or a scheduler's state without a model": (
        "optimizer*.pt",
        "optimizer*.bin",
        "scheduler.pt",
        "*optim_states.pt",
    ),
    "a SentencePiece or Hugging Face tokenizer without a model": ("tokenizer*",),
}
"""Kinds of folders in the order they are tried, each by names of which one is there."""


def _what_tracker_names(path: Path) -> str:
    word = (path / TRACKER).read_text(errors="replace").strip()
    folder = path / (word if word == "release" else f"iter_{word[:40]:0>7}")
    if not folder.is_dir():
        return "without its iteration"
    kind = what_is(folder)
    return kind if kind == MEGATRON else f"{folder.name} in it is {kind}"


def _backend(path: Path) -> str | None:
    """Of a distributed checkpoint, by Megatron's metadata.json."""
    with contextlib.suppress(OSError, *NOT_JSON, AttributeError):
        return json.loads((path / "metadata.json").read_text()).get("sharded_backend")
    return None
