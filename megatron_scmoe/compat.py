"""Gaps of Megatron-Core 0.19.2, closed in one place; each with the reason and when it applies."""

import importlib.util
import os

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.utils import warn_rank_0


def leave_out_missing_fusions(args) -> None:
    """Turn off the fused kernels that Megatron asks for by default and no installed package has.

    They change speed, not results. Megatron stops instead, naming the flag to give.
    """
    if args.apply_rope_fusion and not HAVE_TE:
        args.apply_rope_fusion = False
        warn_rank_0("no Transformer Engine: RoPE is not fused (--no-rope-fusion)")
    have_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    if args.gradient_accumulation_fusion and not have_apex:
        args.gradient_accumulation_fusion = False
        warn_rank_0("no Apex: no fused accumulation (--no-gradient-accumulation-fusion)")


def apply() -> None:
    """Close the gaps that need a change in Megatron itself."""
    _use_built_dataset_helper()


def _use_built_dataset_helper() -> None:
    """``compile_helpers`` runs make, for which the wheel has no Makefile, and exits the first rank.

    The wheel has the built helper. Applies wherever that is so; a source checkout is left alone.
    """
    from megatron.core.datasets import utils

    folder = os.path.dirname(utils.__file__)
    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if built and not os.path.exists(os.path.join(folder, "Makefile")):
        utils.compile_helpers = lambda: None
