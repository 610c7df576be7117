"""Megatron's loop on Megatron's own model, with this package's data and forward step: the baseline."""

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_scmoe.platform import launch, megatron_workarounds
from megatron_scmoe.training.datasets import datasets_provider
from megatron_scmoe.training.forward_step import forward_step


def main() -> None:
    """Train a dense or a stock MoE model, as Megatron's flags on the command line say.

    What Megatron itself would refuse or ends with is left to it.
    """
    launch.check()
    args = parse_and_validate_args()
    megatron_workarounds.leave_out_missing_fusions(args)
    megatron_workarounds.apply(args)
    config = megatron_workarounds.transformer_config(args)
    model = megatron_workarounds.gpt_config(args, config)
    settings = pretrain_cfg_container_from_args(args, model)
    pretrain(settings, datasets_provider, ModelType.encoder_or_decoder, forward_step)
