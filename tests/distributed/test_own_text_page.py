"""docs/train_on_your_own_text.md: its commands, as they stand, from text files to generated text."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scmoe.checkpoints.torch_dist import find_iteration, read_megatron
from tests.harness import TIMEOUT_S
from tests.tools import REPOSITORY

PAGE = REPOSITORY / "docs" / "train_on_your_own_text.md"
FEWER = {"--train-iters 200": "--train-iters 4", "--eval-iters 10": "--eval-iters 1"}
"""What the test changes, to be quick."""
ENVIRONMENT_OF_ITS_OWN = "make install"
"""In the block of the page that the test leaves out: it has the packages already."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the page begins with: the repository's programs, a folder of texts, a held-out text."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("tools", "pretrain_gpt_scmoe.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "texts").mkdir()
    for page in sorted((REPOSITORY / "docs").glob("*.md"))[:2]:
        for number, part in enumerate(page.read_text().split("\n## ")):
            (folder / "texts" / f"{page.stem}-{number}.txt").write_text(part)
    (folder / "held-out.txt").write_text((REPOSITORY / "README.md").read_text()[:2000])
    return folder


def test_from_text_files_to_generated_text(folder):
    said = [run(kind, code, folder) for kind, code in code_blocks()]
    tokenizer, data, training, evaluation, export, generation = said
    assert "wrote my/tokenizer.model" in tokenizer
    assert "wrote my/data_text_document.bin" in data
    assert re.search(r"validation loss at iteration 4 .*lm loss value: [678]\.", training)
    assert re.search(r"loss [678]\.\d+ nats per token", evaluation)
    assert "my/model" in export
    assert "Once upon a time" in generation

    saved = read_megatron(find_iteration(folder / "my" / "checkpoints")).args
    assert saved.tokenizer_model == str(folder / "my" / "tokenizer.model")  # for any other folder


def code_blocks() -> list[tuple[str, str]]:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, code) for kind, code in blocks if ENVIRONMENT_OF_ITS_OWN not in code]


def run(kind: str, code: str, folder: Path) -> str:
    """Run a block as a user would who has activated .venv; what it printed on standard output."""
    for words, fewer in FEWER.items():
        code = code.replace(words, fewer)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = {"bash": ["bash", "-euc", code], "python": [sys.executable, "-c", code]}[kind]
    finished = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, f"{code}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout
