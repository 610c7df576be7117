"""The layer spec for another entry point than ``pretrain_gpt_scmoe.py``.

    SCMOE_ARGS='--scmoe-tap pos3' torchrun ... pretrain_gpt.py --spec megatron_scmoe.spec scmoe_spec ...

Such a script's parser knows no ``--scmoe-*``; they are in ``$SCMOE_ARGS``. Here they become Megatron's
arguments, so that checkpoints hold them, and what the run loads is compared with it, as
``pretrain_gpt_scmoe.py`` does both on its own.
"""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training import get_args
from megatron.training.utils import print_rank_0

from megatron_scmoe.arguments import (
    ENVIRONMENT_VARIABLE,
    PREFIX,
    given_in_environment,
    scmoe_arguments,
    scmoe_config_from_args,
    scmoe_config_from_environment,
)
from megatron_scmoe.checkpoints.local_norm_keys import has_local_norm_keys
from megatron_scmoe.config import RUNTIME_FIELDS, ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError, ScMoEError
from megatron_scmoe.model.layer_spec import build_block_spec, describe
from megatron_scmoe.platform import command_line
from megatron_scmoe.training import optimizer_state, resuming, saved_run
from megatron_scmoe.training.saved_run import SavedRun

WHERE = f"${ENVIRONMENT_VARIABLE} with "
"""Before flags of ScMoE, in what is recommended."""


def scmoe_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The entry for ``--spec``; the configuration comes from ``$SCMOE_ARGS``.

    In a run of Megatron's (with its global arguments) it becomes part of the arguments, and so of
    checkpoints; what cannot work ends the run with one line and status 2.

    Args:
        config: Megatron 0.19's ``GPTModelConfig``, or the ``TransformerConfig`` which older
            builders of a checkout pass.
        vp_stage: virtual pipeline stage, if any.
    """
    config = getattr(config, "transformer", config)
    args = _arguments()
    if args is None:
        return build_block_spec(config, scmoe_config_from_environment(), vp_stage)
    try:
        scmoe = _settle(args)
        keys = has_local_norm_keys(args.load, args.ckpt_step)
        block_spec = build_block_spec(config, scmoe, vp_stage, keys)
    except ScMoEError as error:
        _refuse(error)
    if not vp_stage:
        print_rank_0(describe(scmoe))
    return block_spec


def _arguments() -> argparse.Namespace | None:
    """Megatron's arguments of this run; None in a program that builds models without them."""
    try:
        args: argparse.Namespace = get_args()
        return args
    except AssertionError:
        return None


def _settle(args: argparse.Namespace) -> ScMoEConfig:
    """The configuration of this run, which ``args`` hold from now on; what is loaded is judged by it.

    Flags that the script's own parser took (``add_scmoe_args``) count as they are. With
    ``--use-checkpoint-args`` what defines the model is the checkpoint's.

    Raises:
        ScMoEConfigError, InputError, ConversionError: if the run cannot go on from what it loads.
    """
    if _settled and _settled[0] is args:
        return scmoe_config_from_args(args)
    if not hasattr(args, f"{PREFIX}tap"):
        scmoe = scmoe_config_from_environment()
        vars(args).update(scmoe_arguments(scmoe))
        if ENVIRONMENT_VARIABLE not in os.environ:
            print_rank_0(
                f"WARNING: ${ENVIRONMENT_VARIABLE} is not set: every --scmoe-* has its default "
                f"({ENVIRONMENT_VARIABLE}='--scmoe-tap pos3 ...' gives others, '' says that they are "
                "meant)"
            )
    if args.scmoe_expert_slot == "auto":
        raise ScMoEConfigError(
            "--scmoe-expert-slot auto under --spec",
            "a foreign entry point does not measure at start-up",
            "a number, or pretrain_gpt_scmoe.py",
        )
    saved = saved_run.find(args)
    if saved is not None:
        if args.use_checkpoint_args:
            _restore(args, saved)
        resuming.settle(args, saved, WHERE)
    optimizer_state.load_on_any_layout()
    args.moe_shared_expert_gate = args.scmoe_combine == "cg1"
    _settled[:] = [args]
    return scmoe_config_from_args(args)


def _refuse(error: ScMoEError) -> NoReturn:
    """End the script with one line."""
    prog = Path(sys.argv[0]).name
    command_line.end(f"{prog}: error: {error}", status=error.status)


_settled: list[argparse.Namespace] = []
"""The arguments that have been settled: the spec of each virtual stage asks for them."""


def _restore(args: argparse.Namespace, saved: SavedRun) -> None:
    """Take over the fields of the model, and say which were given otherwise."""
    changed = resuming.changed(args)
    names = [PREFIX + f.name for f in fields(ScMoEConfig) if f.name not in RUNTIME_FIELDS]
    before = saved.args
    found = {n: getattr(before, n) for n in names if hasattr(before, n) and n not in changed}
    given = {name: value for name, value in given_in_environment().items() if name in found}
    vars(args).update(found)
    for line in resuming.overridden(given, args, "it is the checkpoint's (--use-checkpoint-args)"):
        print_rank_0(line)
