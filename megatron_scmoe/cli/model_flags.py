"""Flags of what computes with a checkpoint: which one, on which ranks; and how texts are written."""

from argparse import Namespace
from typing import get_args

from megatron_scmoe.config import AUTO, DecodeGraphsUse, DecodePadding, DecodeSchedule
from megatron_scmoe.platform.command_line import OneLineParser, UsageError

MAX_TOKENS = 16384
"""Tokens of a step in Megatron's dynamic engine, if not given."""

_CHUNK = "--inference-dynamic-batching-max-tokens"

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
    parser.add_argument(
        "--decode-padding", choices=get_args(DecodePadding), default=AUTO,
        help="send tokens behind the prompts to every expert, so that no rank waits for their numbers; "
        "auto does for a few texts at once (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--decode-cuda-graphs", choices=get_args(DecodeGraphsUse), default=AUTO,
        help="launch a token's kernels at once; auto does on GPUs, where experts can be padded "
        "(default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--enable-chunked-prefill", action="store_true",
        help="read prompts in parts of --inference-dynamic-batching-max-tokens",
    )  # fmt: skip
    parser.add_argument(
        "--inference-dynamic-batching-max-tokens", type=int, metavar="N",
        help="the most tokens of prompts that each data-parallel rank reads at once, with "
        f"--enable-chunked-prefill (default: {MAX_TOKENS})",
    )  # fmt: skip
    add_checkpoint_flags(parser)


def chunk_of_prompts(args: Namespace, texts: int, of_texts: str) -> int | None:
    """The most tokens of prompts that a data-parallel rank reads at once; None to read them whole.

    Args:
        texts: that such a rank writes at once: of each, a step reads a token.
        of_texts: the flag that says so.

    Raises:
        UsageError: if it cannot be.
    """
    given = args.inference_dynamic_batching_max_tokens
    if not args.enable_chunked_prefill:
        if given is not None:
            raise UsageError(f"{_CHUNK} {given}: accepted with --enable-chunked-prefill")
        return None
    if given is not None and given < texts:
        fewer = f", or a smaller {of_texts}" if given > 0 else ""
        raise UsageError(
            f"{_CHUNK} {given}: a step reads a token of each of {texts} texts at once; accepted is "
            f"{texts} or more{fewer}"
        )
    return MAX_TOKENS if given is None else given


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
