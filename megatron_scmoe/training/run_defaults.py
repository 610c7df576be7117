"""Flags that a run chooses itself where they were not given, and says so in one line.

Megatron's own defaults stand wherever they can work.
"""

import argparse
import importlib.util

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_scmoe.arguments import in_flags
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.training.indexed_dataset import parse_split

INTERVAL = 1000
"""Iterations between evaluations, and between checkpoints."""

OPEN = (
    "distributed_backend",
    "transformer_impl",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "moe_token_dispatcher_type",
    "eval_interval",
    "eval_iters",
    "save_interval",
    "train_iters",
    "max_position_embeddings",
    "use_persistent_ckpt_worker",
    "async_strategy",
)
"""Names of the flags that a run may choose."""


def leave_open(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Mark the flags that are not given, for :func:`choose`."""
    parser.set_defaults(**{name: _Unset(parser.get_default(name)) for name in OPEN})
    return parser


def leave_out_one_logger(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Do not ask for NVIDIA's own tracker where it is not installed: Megatron warns of it."""
    if importlib.util.find_spec("one_logger") is None:
        parser.set_defaults(enable_one_logger=False)
    return parser


def choose(given: argparse.Namespace) -> dict:
    """What a run takes for the flags that were left open, where it is not Megatron's default.

    Args:
        given: as parsed by a parser that :func:`leave_open` has marked.

    Returns:
        Values by name, the defaults of the next parser.
    """
    wanted = {"moe_token_dispatcher_type": "alltoall", "eval_interval": INTERVAL}
    if not HAVE_TE:
        wanted |= {"transformer_impl": "local", "apply_rope_fusion": False}
    if cpu_backend.is_enabled():
        wanted |= {"distributed_backend": "gloo", "gradient_accumulation_fusion": False}
        wanted |= {"masked_softmax_fusion": False}
    if given.skip_train and given.train_samples is None:
        wanted["train_iters"] = 0  # Megatron computes with it all the same
    if given.save is not None:
        wanted["save_interval"] = INTERVAL
    if given.async_save:
        wanted["use_persistent_ckpt_worker"] = True
        has_nvrx = importlib.util.find_spec("nvidia_resiliency_ext") is not None
        if cpu_backend.is_enabled() or not has_nvrx:
            wanted["async_strategy"] = "mcore"
    if given.seq_length is not None:
        wanted["max_position_embeddings"] = given.seq_length
    if not has_validation_data(given):
        wanted["eval_iters"] = 0
    marks = {name: getattr(given, name) for name in wanted}
    return {
        name: value
        for name, value in wanted.items()
        if isinstance(marks[name], _Unset) and marks[name].stock != value
    }


def has_validation_data(args: argparse.Namespace) -> bool:
    """Whether the flags that name the data leave some for evaluation.

    Raises:
        InputError: if ``--split`` cannot be parsed.
    """
    if args.mock_data:
        return True
    if args.data_path or args.data_args_path:
        return parse_split(args.split)[1] > 0
    if args.per_split_data_args_path:
        return True  # a file, which input_checks.py reads
    return bool(args.valid_data_path)


def describe(chosen: dict) -> str:
    """The line that says what was chosen."""
    words = " ".join(in_flags(name, value) for name, value in chosen.items())
    where = ""
    if cpu_backend.is_enabled():
        where = (
            "the CPU is asked for; "
            if cpu_backend.is_asked_for()
            else "no GPU: on the CPU over gloo; "
        )
    return f"> {where}chosen where not given: {words}"


class _Unset:
    """What a flag holds that was not given: Megatron's default."""

    def __init__(self, stock):
        self.stock = stock
