"""A script like pretrain_gpt.py of a Megatron-LM checkout: stock flags, ``--spec``, ``pretrain()``."""

import functools
import os
from unittest.mock import patch

from tests import harness


def main(finalize=None) -> None:
    """What such a script does, on a CPU.

    Args:
        finalize: a function of its own in place of Megatron's ``finalize_model_grads``.
    """
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import (
        core_transformer_config_from_args,
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_scmoe.platform import megatron_workarounds
    from megatron_scmoe.training.datasets import datasets_provider
    from megatron_scmoe.training.forward_step import forward_step

    args = parse_and_validate_args()
    megatron_workarounds.apply(args)  # what Megatron needs on a CPU
    config = core_transformer_config_from_args(args)
    config.finalize_model_grads_func = finalize
    model = gpt_config_from_args(args, config=config)
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )


def main_with_own_finalize() -> None:
    """The same with a function of its own at the end of each backward."""
    from megatron.core.distributed import finalize_model_grads

    def finalize(*args, **kwargs):
        print("> the script's own finalize function")
        finalize_model_grads(*args, **kwargs)

    main(finalize)


def run(flags: list[str], world_size: int, scmoe_args: str | None, script=main) -> harness.Run:
    """Run it with ``flags``, and with ``$SCMOE_ARGS`` set (None: not set)."""
    flags = ["--spec", "megatron_scmoe.spec", "scmoe_spec", *flags]
    start = functools.partial(_with_scmoe_args, scmoe_args, script)
    return harness.run_pretrain(flags, world_size, main=start)


def _with_scmoe_args(scmoe_args: str | None, script) -> None:
    with patch.dict(os.environ):
        os.environ.pop("SCMOE_ARGS", None)
        if scmoe_args is not None:
            os.environ["SCMOE_ARGS"] = scmoe_args
        script()
