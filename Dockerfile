# megatron_scmoe on NVIDIA's PyTorch image, which brings torch, Transformer Engine and NCCL, built
# for one another. They stay as they are: nothing here installs or replaces one of them.
#
#     docker build -t megatron-scmoe .
#     docker build -t megatron-scmoe --build-arg NGC_PYTORCH=nvcr.io/nvidia/pytorch:25.12-py3 .
#
# Needs BuildKit (Docker 23 or newer), and an image with Python 3.12: any release of 2025 or later.

ARG NGC_PYTORCH=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${NGC_PYTORCH}

# The image's own constraints hold every Python package at one version and leave no room for what is
# needed beside torch. The next step writes narrower ones.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /workspace/megatron_scmoe
COPY pyproject.toml ./

# Sort what pyproject.toml asks for:
#   /opt/scmoe/kept.txt    what came with the image and must not change, as pip constraints
#   /opt/scmoe/needs.txt   small packages, which may bring others
#   /opt/scmoe/alone.txt   Megatron-Core, installed without what it asks for: torch is there
RUN mkdir -p /opt/scmoe && python3 - <<'END'
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

COMPILED = re.compile(
    r"(torch|torchvision|torchaudio|torchao|triton|pytorch[-_]triton|transformer[-_]engine.*|apex"
    r"|flash[-_]attn.*|deep[-_]ep|numpy|nvidia[-_].*|cuda[-_].*)",
    re.IGNORECASE,
)
kept = {d.name: d.version for d in distributions() if d.name and COMPILED.fullmatch(d.name)}
names = {re.sub("_", "-", name).lower() for name in kept}
missing = {"torch", "transformer-engine"} - names
if missing:
    raise SystemExit(f"NGC_PYTORCH: the image has no {' and no '.join(sorted(missing))}")
if "apex" not in names:
    print("no Apex in this image: Transformer Engine fuses the accumulation of weight gradients")

asked = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
by_name = {re.match(r"[\w.-]+", line).group(): line for line in asked}
del by_name["torch"]
alone = by_name.pop("megatron-core")
needs = [*by_name.values(), "packaging>=24.2", "transformers"]  # Megatron-Core's; its tokenizers'

folder = Path("/opt/scmoe")
(folder / "kept.txt").write_text("".join(f"{n}=={v}\n" for n, v in sorted(kept.items())))
(folder / "needs.txt").write_text("\n".join(needs) + "\n")
(folder / "alone.txt").write_text(alone + "\n")
END
RUN pip install --constraint /opt/scmoe/kept.txt --requirement /opt/scmoe/needs.txt \
    && pip install --no-deps --requirement /opt/scmoe/alone.txt

COPY . .
RUN pip install --no-deps .

# The image is of use only if this holds. A build has no driver, and some releases of Transformer
# Engine do not load without its library: CUDA's stub stands in for it in this step alone.
RUN stub=$(mktemp -d) && ln -s /usr/local/cuda/lib64/stubs/libcuda.so "$stub/libcuda.so.1" \
    && LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}:$stub" python3 - <<'END'
from importlib.metadata import version
from pathlib import Path

import megatron.core
import torch
import transformer_engine.pytorch

import megatron_scmoe.spec
import megatron_scmoe.training.pretrain

kept = dict(line.split("==") for line in Path("/opt/scmoe/kept.txt").read_text().splitlines())
changed = {name: version(name) for name in kept if version(name) != kept[name]}
if changed:
    raise SystemExit(f"these came with the image and were changed: {changed}")
if torch.version.cuda is None:
    raise SystemExit(f"torch {torch.__version__} is built without CUDA")
print(
    f"Megatron-Core {megatron.core.__version__}; as they came: torch {torch.__version__},"
    f" Transformer Engine {transformer_engine.__version__}"
)
END
