"""Flags that say where a model's experts are while it generates (docs/offloading.md)."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron_scmoe.platform.command_line import UsageError

_OF_OFFLOADING = ("expert_folder", "expert_cache_gb", "expert_cache_policy", "cpu_moe_layers")


def add_expert_flags(parser: ArgumentParser) -> None:
    """Add them as a group of their own."""
    experts = parser.add_argument_group("experts on the host (docs/offloading.md)")
    experts.add_argument(
        "--offload-experts", action="store_true",
        help="keep routed experts out of the device, and fetch those that the gate has chosen",
    )  # fmt: skip
    experts.add_argument(
        "--expert-folder", type=Path, metavar="DIR",
        help="on the CPU: where files of experts are, or will be written once, to be mapped",
    )  # fmt: skip
    experts.add_argument(
        "--expert-cache-gb", type=float, metavar="G",
        help="10^9 bytes for experts on the device (default: what a layer needs at once)",
    )  # fmt: skip
    experts.add_argument(
        "--expert-cache-policy", choices=("lru", "frequency"),
        help="which expert makes room: the one not used for longest (default), or the one used least",
    )  # fmt: skip
    experts.add_argument(
        "--cpu-moe-layers", type=int, metavar="N",
        help="offload the experts of the first N MoE layers alone (default: of all)",
    )  # fmt: skip


def check_expert_flags(args: Namespace) -> None:
    """Refuse what says how experts are offloaded if they are not, and what cannot be.

    Raises UsageError.
    """
    for name in _OF_OFFLOADING:
        value = getattr(args, name)
        if value is None:
            continue
        flag = f"--{name.replace('_', '-')} {value}"
        if not args.offload_experts:
            raise UsageError(f"{flag}: accepted with --offload-experts")
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise UsageError(f"{flag}: accepted is more than 0")


def expert_offload(args: Namespace):
    """What the flags ask for; None if experts are to be resident. Imports Megatron.

    Raises UsageError: the CPU maps experts from files, which say of which checkpoint they are; for a
    GPU they are in pinned memory.
    """
    from megatron_scmoe.inference.exported import is_model_folder
    from megatron_scmoe.inference.offloading import ExpertOffload, OffloadSettings
    from megatron_scmoe.platform import cpu_backend

    if not args.offload_experts:
        return None
    if cpu_backend.is_enabled() and args.expert_folder is None:
        raise UsageError(
            "--offload-experts: without a GPU experts are mapped from files; accepted with "
            "--expert-folder DIR, where they are or will be written"
        )
    if cpu_backend.is_enabled() and is_model_folder(args.load):
        raise UsageError(
            f"--offload-experts with --load {args.load}: a model folder is converted anew each time; "
            "accepted without a GPU: a Megatron checkpoint, as tools/convert.py hf-to-megatron writes"
        )
    if not cpu_backend.is_enabled() and args.expert_folder is not None:
        raise UsageError(
            f"--expert-folder {args.expert_folder}: with a GPU experts are in the host's memory; "
            "accepted without a GPU"
        )
    return ExpertOffload(
        OffloadSettings(
            cache_gb=args.expert_cache_gb,
            layers=args.cpu_moe_layers,
            folder=args.expert_folder,
            policy=args.expert_cache_policy or "lru",
        )
    )
