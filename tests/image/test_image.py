"""The image, in containers of it: `tests/image/build.sh` has built it and runs this.

There is no GPU and no driver. A container is a folder with the machine's network (buildah's chroot).
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tools import REPOSITORY

STAND_IN, IMAGE = "localhost/stand-in", "localhost/megatron-scmoe"
USERS = ("root", "trainer", "1234:1234")
LIMIT_S = 900
TRAIN = """
    python3 pretrain_gpt_scmoe.py --num-layers 2 --moe-layer-freq '[0,1]*1' --hidden-size 64
    --num-attention-heads 4 --seq-length 64 --swiglu --disable-bias-linear --num-experts 4
    --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64 --micro-batch-size 2
    --train-iters 3 --log-interval 1 --lr 1e-3 --eval-iters 0 --split 100,0,0
    --tokenizer-type SentencePieceTokenizer
"""


class Failed(Exception):
    """A command ended with another status than 0; its output."""


def buildah(*words: str) -> str:
    """Standard output of buildah."""
    finished = subprocess.run(
        ("buildah", *words), cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S
    )
    if finished.returncode:
        raise Failed(finished.stdout[-3000:] + finished.stderr[-3000:])
    return finished.stdout.strip()


class Container:
    """Of an image, as one user, with a folder at /data perhaps."""

    def __init__(self, image: str, user: str = "root", data: Path | None = None):
        self.name = buildah("from", image)
        self._words = ["--user", user, *(["--volume", f"{data}:/data"] if data else [])]

    def run(self, command: str) -> str:
        return buildah(
            "run", *self._words, self.name, "--", "bash", "-euo", "pipefail", "-c", command
        )

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_) -> None:
        buildah("rm", self.name)


def settings_of(image: str) -> dict:
    return json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    """As somebody who has neither a name nor a home there."""
    with Container(IMAGE, "1234:1234") as made:
        yield made


@pytest.mark.parametrize("user", USERS)
def test_the_command_of_a_container_trains(user):
    [command] = settings_of(IMAGE)["Cmd"]
    with Container(IMAGE, user) as made:
        shown = made.run(command)
    assert shown.endswith("smoke test passed on 2 ranks")
    assert "transformer-engine 2." in shown


def test_what_came_with_the_base_is_as_it_was():
    """Files of PyTorch, CUDA and Transformer Engine: their names, sizes and times."""
    listed = "cd $(python3 -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')" + (
        " && find torch triton nvidia transformer_engine numpy -type f -not -name '*.pyc'"
        " -printf '%p %s %T@\\n' | sort"
    )
    with Container(STAND_IN) as base, Container(IMAGE) as made:
        before, after = base.run(listed), made.run(listed)
    assert before.count("\n") > 10_000
    assert after == before


def test_demo_and_tests_run_and_install_nothing(container):
    packages = container.run("pip list --format freeze")
    demo = container.run("make demo PYTHON=python3 ARGS=--smoke")
    tests = container.run("make test PYTHON=python3 ARGS='-k test_schedule.py'")
    assert "loss_curve.png" in demo
    assert " passed" in tests and "failed" not in tests
    assert container.run("pip list --format freeze") == packages
    assert "torch==" in packages
    assert container.run("ls -A | grep -xE '.venv|build' || true") == ""


def test_data_and_checkpoints_lie_in_a_mounted_folder(tmp_path):
    """Of the user who runs the container, who is nobody there."""
    words = (REPOSITORY / "README.md").read_text().split()
    documents = (" ".join(words[n : n + 100]) for n in range(0, len(words), 100))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    for path in (tmp_path, tmp_path / "text.jsonl"):
        os.chown(path, 1234, 1234)
    with Container(IMAGE, "1234:1234", tmp_path) as made:
        made.run(
            "scmoe train-tokenizer --input /data/text.jsonl --output-prefix /data/tok"
            " --vocab-size 400"
        )
        made.run(
            "scmoe preprocess-data --input /data/text.jsonl --tokenizer-model /data/tok.model"
            " --output-prefix /data/set"
        )
        flags = "--tokenizer-model /data/tok.model --data-path /data/set_text_document"
        log = made.run(f"{' '.join(TRAIN.split())} {flags} --save /data/run")
    assert "iteration        3/" in log
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert (tmp_path / "run").stat().st_uid == 1234


def test_nothing_of_a_checkouts_own_is_in_it(container):
    names = set(container.run("ls -A /workspace/megatron_scmoe").split())
    assert {"Makefile", "tests", "pretrain_gpt_scmoe.py"} <= names
    assert not names & {".git", ".ci", ".venv", "build", "dist"}
    assert not [name for name in names if name.endswith(".egg-info")]


def test_a_user_can_be_built_in(tmp_path):
    """The Dockerfile's last lines, on the image: buildah 1.28 takes a cached USER of another name."""
    _, end = (REPOSITORY / "Dockerfile").read_text().split("\nARG IMAGE_USER")
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nARG IMAGE_USER{end}")
    build(tmp_path / "Dockerfile", "IMAGE_USER=trainer")
    assert settings_of("localhost/another")["User"] == "trainer"


def test_without_a_compiler_of_cuda_deepep_is_refused():
    with pytest.raises(Failed, match="WITH_DEEP_EP=1: no nvcc; accepted: an NGC_PYTORCH with"):
        build(REPOSITORY / "Dockerfile", f"NGC_PYTORCH={STAND_IN}", "WITH_DEEP_EP=1")


def build(dockerfile: Path, *arguments: str) -> None:
    """As build.sh does; what has not changed is not built again."""
    words = [word for argument in arguments for word in ("--build-arg", argument)]
    base = ("--format", "docker", "--layers", "--tag", "another", "--file", str(dockerfile))
    buildah("bud", *base, *words, ".")
