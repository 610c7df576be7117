"""Sort what the package needs, for an image that brings PyTorch: `sort_requirements.py FOLDER`.

Written into FOLDER, from pyproject.toml in this folder:
    kept.txt    what came with the image and must not change, as pip constraints
    needs.txt   small packages, which may bring others; those of demo and tests among them
    alone.txt   Megatron-Core, installed without what it asks for: torch is there
"""

import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

COMPILED = re.compile(
    r"(torch|torchvision|torchaudio|torchao|triton|pytorch[-_]triton|transformer[-_]engine.*|apex"
    r"|flash[-_]attn.*|deep[-_]ep|numpy|nvidia[-_].*|cuda[-_].*)",
    re.IGNORECASE,
)
"""Packages built for one another."""

EXTRAS = ("convert", "demo", "dev", "study")


def main() -> None:
    folder = Path(sys.argv[1])
    kept = {d.name: d.version for d in distributions() if d.name and COMPILED.fullmatch(d.name)}
    names = {name_of(name) for name in kept}
    missing = {"torch", "transformer-engine"} - names
    if missing:
        raise SystemExit(f"NGC_PYTORCH: the image has no {' and no '.join(sorted(missing))}")
    if "apex" not in names:
        print(
            "no Apex in this image: Transformer Engine fuses the accumulation of weight gradients"
        )

    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    asked = {name_of(line): line for line in project["dependencies"]}
    alone = asked.pop("megatron-core")
    for extra in EXTRAS:
        asked |= {name_of(line): line for line in project["optional-dependencies"][extra]}
    needs = [line for name, line in asked.items() if name not in names]
    needs.append("packaging>=24.2")  # Megatron-Core's

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kept.txt").write_text("".join(f"{n}=={v}\n" for n, v in sorted(kept.items())))
    (folder / "needs.txt").write_text("\n".join(needs) + "\n")
    (folder / "alone.txt").write_text(alone + "\n")


def name_of(requirement: str) -> str:
    """The package that a requirement names, as PyPI spells it."""
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None, requirement
    return re.sub("[-_.]+", "-", found.group()).lower()


if __name__ == "__main__":
    main()
