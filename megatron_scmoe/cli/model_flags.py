"""Flags of what computes with a checkpoint: which one, on which ranks; and how texts are written."""

from argparse import Namespace
from typing import get_args

from megatron_scmoe.config import AUTO, DecodeSchedule
from megatron_scmoe.platform.command_line import OneLineParser, UsageError

LAYOUT = [f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "expert")]


def add_text_flags(parser: OneLineParser) -> None:
    """Add those of generation and of serving."""
    parser.add_argument(
        "--load", required=True, metavar="CKPT",
        help="a Megatron checkpoint: what was --save, or an iter_ folder; or a model folder of Hugging "
        "Face, which is converted for the while",
    )  # fmt: skip
    parser.add_argument(
        "--decode-schedule", choices=get_args(DecodeSchedule), default=AUTO,
        help="of the tokens behind the prompts: all-to-alls under other work, or waited for; auto "
        "tries both on the first tokens and keeps the faster one (default: auto)",
    )  # fmt: skip
    add_checkpoint_flags(parser)


def add_checkpoint_flags(parser: OneLineParser) -> None:
    """Add those that go with ``--load``; :func:`check_layout` and :func:`layout` read the ranks'."""
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the last)")
    parser.add_argument(
        "--tokenizer-model", metavar="MODEL",
        help="the tokenizer of --load, where it is not (any more) where training had it",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: as stored)"
    )
    for name in LAYOUT:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=1, metavar="N", help="under torchrun"
        )


def check_layout(args: Namespace) -> None:
    """Refuse sizes that cannot be.

    Raises:
        UsageError: in one line.
    """
    for name in LAYOUT:
        if getattr(args, name) < 1:
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: accepted is 1 or more"
            )


def layout(args: Namespace):
    """The :class:`~megatron_scmoe.training.load_model.Layout` that was given."""
    from megatron_scmoe.training.load_model import Layout

    return Layout(*(getattr(args, name) for name in LAYOUT))
