"""Every command line's ``--help``: it ends well, without the imports that take longest."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scmoe.platform.command_line import HelpFormatter, UsageError
from megatron_scmoe.platform.megatron_flags import prepare_parser
from tests.tools import REPOSITORY

pytestmark = pytest.mark.slow

TIMEOUT_S = 240  # 10 s where nothing else runs

COMMANDS = {
    "pretrain_gpt_scmoe.py": (
        "--scmoe-tap {pos1,pos2,pos3}",
        "--micro-batch-size",
        "(default: adam)",
    ),
    "-m megatron_scmoe.cli.train_tokenizer": ("usage: scmoe train-tokenizer",),
    "-m megatron_scmoe.run": ("torchrun --nproc-per-node N -m megatron_scmoe.run SCRIPT",),
    "tools/convert.py": ("megatron-to-hf",),
    "tools/convert.py upcycle": ("--topk K", "(default: copy)"),
    "tools/demo.py": ("--output FOLDER",),
    "tools/evaluate.py": ("--micro-batch N", "(default: 1)"),
    "tools/generate.py": ("--top_k K", "(default: 30)"),
    "tools/plot_schedule.py": ("--times",),
    "tools/serve.py": ("--max-queue N", "(default: 256)"),
    "tools/prepare_demo_data.py": ("--output",),
    "tools/preprocess_data.py": ("--tokenizer-model",),
    "tools/train_tokenizer.py": ("--vocab-size",),
    "examples/pretrain_baseline.py": ("--micro-batch-size",),
    "examples/shape_flags.py": ("--system",),
    "examples/gpt2_moe_medium/count_parameters.py": ("show this help message",),
    "benchmarks/compare.py": ("--tolerance FRACTION", "(default: 0.1)"),
    "benchmarks/inference.py": ("--batch-sizes N [N ...]", "(default: 8)"),
    "benchmarks/extrapolate.py": ("--bandwidth RATIO",),
    "benchmarks/offloading.py": ("--shapes SHAPE", "(default: 512)"),
    "benchmarks/predict_iteration.py": ("--edge-reduction MS", "default: 0"),
    "benchmarks/results_page.py": ("--check",),
    "benchmarks/step_time.py": ("--rounds N", "(default: 15)"),
    "benchmarks/train_rank.py": ("train_processes.py",),
    "benchmarks/train_run.py": ("--flags RUN=FLAGS", "(default: 2)"),
    "-m studies.quality.data": ("--max-tokens N",),
    "-m studies.quality.parity": ("--tokens TOKENS",),
    "-m studies.quality.record": ("RECORD TOKENS {scmoe,stock}",),
    "-m studies.quality.report": ("--results RESULTS",),
    "-m studies.quality.run": ("--tokens TOKENS",),
    "-m studies.quality.train": ("FACTS TOKENS {scmoe,stock}",),
}

WITHOUT_SCMOE = {"examples/pretrain_baseline.py"}
"""Commands that take no flag of ScMoE, and show none."""


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    run = subprocess.run(
        [sys.executable, "-X", "importtime", *command.split(), "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("usage: ")
    for words in COMMANDS[command]:
        assert words in run.stdout
    if command in WITHOUT_SCMOE:
        assert "--scmoe-" not in run.stdout
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert not imported & {"torch._dynamo", "sympy"}
    said = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert not said


def test_every_entry_point_is_asked():
    scripts = [REPOSITORY / "pretrain_gpt_scmoe.py"]
    for folder in ("tools", "benchmarks", "examples", "studies"):
        scripts += (REPOSITORY / folder).rglob("*.py")
    commands = {
        typed(path.relative_to(REPOSITORY)) for path in scripts if "__main__" in path.read_text()
    }
    assert commands <= set(COMMANDS)


def typed(path: Path) -> str:
    """What is typed after ``python`` to run ``path``: of a package's modules, ``-m`` and the name."""
    if (REPOSITORY / path).with_name("__init__.py").exists():
        return f"-m {'.'.join(path.with_suffix('').parts)}"
    return str(path)


class TestMegatronsParser:
    def parser(self, **kwargs) -> argparse.ArgumentParser:
        def add(parser):
            parser.add_argument("--flag", **kwargs)
            return parser

        return prepare_parser(add, argparse.ArgumentParser(prog="run"))

    @pytest.mark.parametrize("text", ["50% (of it)", "100%", "a %s here", "%(nothing)s", "%"])
    def test_a_percent_sign_stands_for_itself(self, text):
        assert text in self.parser(help=text).format_help()

    @pytest.mark.parametrize("text", ["is %(default)s", "50%% or %(default)s"])
    def test_what_formats_still_does(self, text):
        shown = text.replace("%%", "%").replace("%(default)s", "3")
        assert shown in self.parser(help=text, default=3).format_help()

    def test_defaults_are_shown_once(self):
        assert "size (default: 3)" in self.parser(help="size", default=3).format_help()
        assert self.parser(help="Default: 3.", default=3).format_help().count("efault") == 1

    @pytest.mark.parametrize(
        ("kwargs", "value"),
        [
            (dict(type=int), "x"),
            (dict(choices=["a"]), "b"),
            (dict(type=lambda text: {"a": 1}[text]), "b"),
            (dict(type=lambda text: eval(text)), "[0,"),
            (dict(type=lambda text: 1 / 0), "b"),
        ],
    )
    def test_a_wrong_value_is_one_line(self, kwargs, value):
        with pytest.raises(UsageError) as refused:
            self.parser(**kwargs).parse_args(["--flag", value])
        assert "\n" not in str(refused.value)
        assert str(refused.value).startswith("argument --flag: invalid ")

    def test_an_unknown_flag_is_one_line(self):
        with pytest.raises(UsageError, match=r"^unrecognized arguments: --other \(see --help\)$"):
            self.parser().parse_args(["--other"])

    @pytest.mark.parametrize("word", ["--flagg", "--flg=3"])
    def test_an_unknown_flag_that_is_almost_a_flag(self, word):
        told = f"^unrecognized arguments: {word}; the nearest: --flag \\(see --help\\)$"
        with pytest.raises(UsageError, match=told):
            self.parser().parse_args([word])

    def test_a_file_of_settings_is_refused_before_it_is_read(self):
        def add(parser):
            parser.add_argument("--yaml-cfg")
            return parser

        with pytest.raises(UsageError, match=r"--yaml-cfg: none\.yaml: settings come from flags"):
            prepare_parser(add, argparse.ArgumentParser()).parse_args(["--yaml-cfg", "none.yaml"])

    def test_formatter(self):
        assert self.parser().formatter_class is HelpFormatter
