"""Features of Megatron that have no place in ScMoE, whatever else is set: a table."""

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rule import rule
from megatron_scmoe.validation.settings import Settings


class Unsupported(NamedTuple):
    """One setting: its name, its flag, what to say, and which values are refused."""

    name: str
    flag: str
    reason: str
    accepted: str
    is_refused: Callable[[Any], object] = bool


UNSUPPORTED = (
    Unsupported(
        "overlap_moe_expert_parallel_comm",
        "--overlap-moe-expert-parallel-comm",
        "the 1F1B overlap bypasses the layers' forward; ScMoE overlaps within the pair instead",
        "--scmoe-overlap alone",
    ),
    Unsupported(
        "moe_shared_expert_overlap",
        "--moe-shared-expert-overlap",
        "it moves the shared expert into the dispatcher; ScMoE overlaps it anyway",
        "--scmoe-overlap alone",
    ),
    Unsupported(
        "overlap_dispatch_backward_with_experts_wgrad",
        "--overlap-dispatch-backward-with-experts-wgrad",
        "ScMoE hides the dispatch under the backbone",
        "--scmoe-overlap alone",
    ),
    Unsupported(
        "delay_wgrad_compute",
        "--delay-wgrad-compute",
        "it belongs to the 1F1B overlap",
        "leave the flag out",
    ),
    Unsupported(
        "mtp_num_layers",
        "--mtp-num-layers",
        "a multi-token-prediction layer has no preceding block to tap",
        "leave the flag out",
    ),
    Unsupported(
        "transformer_impl",
        "--transformer-impl",
        "it replaces the layers that ScMoE extends",
        "transformer_engine or local",
        lambda value: value == "inference_optimized",
    ),
    Unsupported(
        "experimental_attention_variant",
        "--experimental-attention-variant",
        "its layer specs are not wired",
        "leave the flag out",
    ),
    Unsupported(
        "heterogeneous_block_specs",
        "--heterogeneous-layers-config-path",
        "its layer specs are not wired",
        "leave the flag out",
    ),
    Unsupported(  # while its file is not read yet
        "heterogeneous_layers_config_path",
        "--heterogeneous-layers-config-path",
        "its layer specs are not wired",
        "leave the flag out",
    ),
    Unsupported(
        "is_hybrid_model",
        "--hybrid-layer-pattern",
        "Mamba blocks do not tell the routed path what they have passed",
        "leave the flag out",
    ),
    Unsupported(
        "hybrid_layer_pattern",
        "--hybrid-layer-pattern",
        "Mamba blocks do not tell the routed path what they have passed",
        "leave the flag out",
    ),
    Unsupported(
        "mlp_chunks_for_training",
        "--mlp-chunks-for-training",
        "the routed path is collected once per block",
        "1",
        lambda value: (value or 1) > 1,
    ),
    Unsupported(
        "mlp_chunks_for_prefill",
        "--mlp-chunks-for-prefill",
        "the routed path is collected once per block",
        "1",
        lambda value: (value or 1) > 1,
    ),
    Unsupported(
        "fine_grained_activation_offloading",
        "--fine-grained-activation-offloading",
        "its groups follow the stock order of the layer's operators",
        "leave the flag out",
    ),
    Unsupported(
        "use_megatron_fsdp",
        "--use-megatron-fsdp",
        "it gathers parameters on entering a block, when the routed path has begun",
        "--use-distributed-optimizer instead",
    ),
    Unsupported(
        "use_torch_fsdp2",
        "--use-torch-fsdp2",
        "it gathers parameters on entering a block, when the routed path has begun",
        "--use-distributed-optimizer instead",
    ),
)


@rule(*dict.fromkeys(row.flag for row in UNSUPPORTED))
def nothing_unsupported_is_on(scmoe: ScMoEConfig, settings: Settings) -> None:
    for row in UNSUPPORTED:
        value = getattr(settings, row.name)
        if row.is_refused(value):
            shown = row.flag if value is True else f"{row.flag} {value}"
            raise ScMoEConfigError(shown, row.reason, row.accepted)
