"""Megatron's parser of flags, and what a command line needs of it.

Its help and its errors are mended on the way: a stray ``%`` in a help text ends argparse in a
traceback, a wrong value is answered with the usage of 600 flags, or by a ``KeyError``.
"""

import argparse
import enum
import functools
import logging
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn
from unittest.mock import MagicMock

import torch

from megatron_scmoe.errors import with_nearest_flags
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.command_line import HelpFormatter, UsageError

TUNE_FLAG, TUNE_OFF, TUNE_AT_STARTUP = "--scmoe-tune", "off", "startup"

AddArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
"""An ``extra_args_provider`` of Megatron's."""


def prepare_parser(
    add_arguments: AddArguments, parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Add arguments to Megatron's parser, and make its help and its errors readable."""
    parser = add_arguments(parser)
    parser.error = functools.partial(_refuse, parser)  # type: ignore[method-assign]  # Megatron's
    parser.formatter_class = HelpFormatter
    for action in parser._actions:
        if action.dest == "yaml_cfg":
            action.type = _refuse_yaml
        action.help = _printable(action, parser)
        if action.choices is not None and any(isinstance(c, enum.Enum) for c in action.choices):
            names = ",".join(choice.name for choice in action.choices)
            action.metavar = f"{{{names}}}"
        if callable(action.type) and not isinstance(action.type, type):
            action.type = _with_argparse_errors(action.type, action.metavar)
    return parser


def add_flags_for_spec(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags that ``megatron_scmoe.run`` takes for another script: of the model, and the CPU."""
    from megatron_scmoe.arguments import add_scmoe_args

    parser = add_scmoe_args(parser)
    parser.add_argument_group("scmoe, the device").add_argument(
        cpu_backend.FLAG,
        action="store_true",
        help=f"train on the CPU, even where there is a GPU (${cpu_backend.VARIABLE}=1)",
    )
    return parser


def add_run_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of ``pretrain_gpt_scmoe.py``: ``--scmoe-*``, of the model and of the run."""
    parser = add_flags_for_spec(parser)
    group = parser.add_argument_group("scmoe, the run")
    group.add_argument(
        "--scmoe-log-overlap-interval",
        type=int,
        default=100,
        metavar="N",
        help="log whether the run overlaps, also to TensorBoard and W&B: before every Nth iteration, "
        "of the one before it; 0: never. docs/overlap.md says what the figures mean. Not under --spec, "
        "whose script has a loop of its own",
    )
    group.add_argument(
        "--no-scmoe-verify-checkpoint",
        dest="scmoe_verify_checkpoint",
        action="store_false",
        help="load a checkpoint without comparing its tensors with their checksums first, for which "
        "each rank reads a share of it",
    )
    group.add_argument(
        "--scmoe-damaged-checkpoint",
        choices=("refuse", "skip"),
        default="refuse",
        help="what happens where the last checkpoint is damaged or not complete. refuse: the run stops "
        "and names the one before it; skip: it goes on from that one by itself, and renames the other",
    )
    group.add_argument(
        "--no-dist-ckpt-optim-fully-reshardable",
        dest="dist_ckpt_optim_fully_reshardable",
        action="store_false",
        help="save the state of the distributed optimizer as it lies in memory: without gathering "
        "it, and for the same TP, PP and EP sizes only",
    )
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=True)
    group.add_argument(
        TUNE_FLAG,
        type=_off_startup_or_file,
        default=TUNE_AT_STARTUP,
        metavar="off|startup|FILE",
        help="what the run chooses for speed where no flag says it. startup: flags of speed, and by "
        "trial on its first iterations the expert slot and whether to overlap; FILE (.json): the same, "
        "but the trial is read from the file if it exists, and written to it if not; off: nothing",
    )
    return parser


def flags_of_the_run() -> set[str]:
    """Those that ``pretrain_gpt_scmoe.py`` has and :func:`add_flags_for_spec` has not."""
    with_them, without = (
        add(argparse.ArgumentParser())._option_string_actions
        for add in (add_run_args, add_flags_for_spec)
    )
    return set(with_them) - set(without)


def tune_file(args: argparse.Namespace) -> str | None:
    """The file that ``--scmoe-tune`` names; None if it names none."""
    given: str = args.scmoe_tune
    return None if given in (TUNE_OFF, TUNE_AT_STARTUP) else given


def show_help(prog: str, description: str, own: AddArguments | None = add_run_args) -> None:
    """Print every flag of a run, Megatron's last.

    Args:
        own: adds those that go before Megatron's; None for a run of Megatron's own model.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import_lightly()
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(
        prog=prog,
        description=description.replace("``", ""),
        usage=f"torchrun ... {prog} FLAGS",
        allow_abbrev=False,
    )
    if own is not None:
        own(parser)
    prepare_parser(add_megatron_arguments, parser).print_help()


def import_lightly() -> None:
    """Halve the time that importing Megatron takes, in a process that asks it for its flags alone.

    What compiles kernels is not imported: PyTorch's compiler, and the algebra of symbolic shapes.
    """
    torch.compile = _leave_alone
    sys.modules.setdefault("torch.fx.experimental.symbolic_shapes", MagicMock())


def _off_startup_or_file(text: str) -> str:
    """The ``type`` of ``--scmoe-tune``; a word that is misspelt would be the name of a file."""
    if text in (TUNE_OFF, TUNE_AT_STARTUP) or text.endswith(".json"):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r}: accepted are {TUNE_OFF}, {TUNE_AT_STARTUP} and a file named .json"
    )


def _leave_alone(model: Callable | None = None, **kwargs) -> Callable:
    return model or (lambda function: function)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    raise UsageError(f"{with_nearest_flags(parser, message)} (see --help)")


def _refuse_yaml(text: str) -> NoReturn:
    """The ``type`` of ``--yaml-cfg``: Megatron's parser reads the file, in place of all flags."""
    raise argparse.ArgumentTypeError(f"{text}: settings come from flags; accepted: none")


def _printable(action: argparse.Action, parser: argparse.ArgumentParser) -> str | None:
    """The help text as it was meant: a ``%`` that formats nothing stands for itself."""
    if action.help in (None, argparse.SUPPRESS):
        return action.help
    try:
        parser._get_formatter()._expand_help(action)
    except (ValueError, TypeError, KeyError):
        return action.help.replace("%", "%%")
    return action.help


def _with_argparse_errors(convert: Callable, metavar: str | tuple[str, ...] | None) -> Callable:
    """argparse gives one line for the errors it expects of a ``type``, and leaves a trace of others."""

    @functools.wraps(convert)
    def converted(text: str):
        try:
            return convert(text)
        except (argparse.ArgumentTypeError, TypeError, ValueError):
            raise
        except Exception as error:
            accepted = f"; accepted: {metavar}" if metavar else ""
            raise argparse.ArgumentTypeError(f"invalid value {text!r}{accepted}") from error

    return converted
