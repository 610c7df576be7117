"""Whether the image is of use: `check_image.py FOLDER` fails if what came with it was changed.

FOLDER is that of sort_requirements.py.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import megatron.core
import torch
import transformer_engine.pytorch

import megatron_scmoe.spec
import megatron_scmoe.training.pretrain  # noqa: F401  it has to load

kept = dict(line.split("==") for line in (Path(sys.argv[1]) / "kept.txt").read_text().splitlines())
changed = {name: version(name) for name in kept if version(name) != kept[name]}
if changed:
    raise SystemExit(f"these came with the image and were changed: {changed}")
if torch.version.cuda is None:
    raise SystemExit(f"torch {torch.__version__} is built without CUDA")
print(
    f"Megatron-Core {megatron.core.__version__}; as they came: torch {torch.__version__},"
    f" Transformer Engine {transformer_engine.__version__}"
)
