"""The console program ``scmoe``: each command of the package is a subcommand.

    scmoe convert megatron-to-hf --load checkpoints/ --output model/
    torchrun --nproc-per-node 8 -m megatron_scmoe.cli train ... Megatron's flags ...

A command's module is imported when the command is known, so that ``scmoe --help`` is quick. The scripts
of a checkout, ``pretrain_gpt_scmoe.py`` and those in ``tools/``, run the same commands by :func:`run`.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_scmoe import __version__
from megatron_scmoe.cli.process import leave_nothing_at_signals
from megatron_scmoe.platform.command_line import UsageError, run_command, run_tool

PROGRAM = "scmoe"


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the first of the words names, and end the process.

    Args:
        words: of the command line, behind the program's name; None for those of this process.
    """
    command, *flags = (sys.argv[1:] if words is None else words) or [""]
    sys.argv = [PROGRAM, *flags]  # what errors name from here on
    if command in COMMANDS:
        sys.argv[0] = f"{PROGRAM} {command}"
        run(command)
    run_command(lambda: _without_command(command))


def run(name: str) -> NoReturn:
    """Run a command on the flags in ``sys.argv``, by the name that stands there; end the process."""
    module = f"{__package__}.{name.replace('-', '_')}"

    def command() -> None:
        try:
            importlib.import_module(module).main()
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            raise UsageError(
                f"the Python package {error.name} is not installed; accepted: "
                f"pip install 'megatron-scmoe[{_EXTRAS[error.name]}]'"
            ) from error

    COMMANDS[name].start(command)


def _run_tool(command: Callable[[], None]) -> NoReturn:
    """In a process that writes files; of several ranks the first of each host does (exported.py).

    The others end at once: one that waits for another in the middle of a collective runs no handler,
    and has nothing to remove.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        leave_nothing_at_signals()
    run_tool(command)


@dataclass(frozen=True)
class Command:
    """A subcommand: its line in the help, and what its process is to do of signals and errors."""

    summary: str
    start: Callable[[Callable[[], None]], NoReturn] = _run_tool


COMMANDS = {
    "train": Command("train a GPT with ScMoE layers, by Megatron's own loop", run_command),
    "evaluate": Command("loss, perplexity and logits of a checkpoint"),
    "generate": Command("text that a checkpoint's model writes behind prompts"),
    "serve": Command("serve a checkpoint's model over HTTP, as OpenAI's API"),
    "convert": Command("checkpoints to Hugging Face and back; upcycle; inspect"),
    "train-tokenizer": Command("train a SentencePiece tokenizer for Megatron"),
    "preprocess-data": Command("tokenize text into a dataset for Megatron"),
    "plot-schedule": Command("draw what overlaps in a pair of blocks"),
}
"""By name; the module of each has the same name, with underscores, and a ``main``."""

_EXTRAS = {
    "matplotlib": "plot",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "safetensors": "convert",
    "starlette": "serve",
    "transformers": "convert",
    "uvicorn": "serve",
}
"""Packages that some commands need, and the extra of pyproject.toml that installs them."""


def _without_command(word: str) -> None:
    """Show the help or the version, or refuse the word."""
    if word in ("-h", "--help"):
        print(_help())
        return
    if word == "--version":
        print(f"megatron_scmoe {__version__} from {Path(__file__).parents[1]}")
        return
    accepted = f"accepted: {', '.join(COMMANDS)} (see {PROGRAM} --help)"
    if not word:
        raise UsageError(f"no command is named; {accepted}")
    if word.startswith("-"):
        raise UsageError(f"{word}: flags stand behind a command; {accepted}")
    nearest = difflib.get_close_matches(word, COMMANDS, n=1)
    suggestion = f"the nearest is {nearest[0]}; " if nearest else ""
    raise UsageError(f"{word}: there is no such command; {suggestion}{accepted}")


def _help() -> str:
    commands = "\n".join(f"  {name:<17}{command.summary}" for name, command in COMMANDS.items())
    return f"""usage: {PROGRAM} COMMAND FLAGS

Train, evaluate and convert ScMoE models on Megatron-Core.

commands:
{commands}

options:
  -h, --help       show this help; behind a command, its flags
  --version        show the version, and where it is installed

Several ranks: torchrun --nproc-per-node N -m {__package__} COMMAND FLAGS"""
