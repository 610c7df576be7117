"""Features of Megatron that have no place in ScMoE, whatever else is set: a table."""

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rule import Refused, rule
from megatron_scmoe.validation.settings import Settings

UNSUPPORTED = (
    Refused(
        "overlap_moe_expert_parallel_comm",
        "--overlap-moe-expert-parallel-comm",
        "the 1F1B overlap bypasses the layers' forward; ScMoE overlaps within the pair instead",
        "--scmoe-overlap alone",
    ),
    Refused(
        "moe_shared_expert_overlap",
        "--moe-shared-expert-overlap",
        "it moves the shared expert into the dispatcher; ScMoE overlaps it anyway",
        "--scmoe-overlap alone",
    ),
    Refused(
        "overlap_dispatch_backward_with_experts_wgrad",
        "--overlap-dispatch-backward-with-experts-wgrad",
        "ScMoE hides the dispatch under the backbone",
        "--scmoe-overlap alone",
    ),
    Refused(
        "delay_wgrad_compute",
        "--delay-wgrad-compute",
        "it belongs to the 1F1B overlap",
        "leave the flag out",
    ),
    Refused(
        "moe_layer_recompute",
        "--moe-layer-recompute",
        "the routed path runs beside two blocks and cannot be recomputed as one piece",
        "leave the flag out",
    ),
    Refused(
        "moe_use_upcycling",
        "--moe-use-upcycling",
        "Megatron's layers of a dense checkpoint have no tap; scmoe convert upcycle makes ScMoE's",
        "leave the flag out",
    ),
    Refused(
        "mtp_num_layers",
        "--mtp-num-layers",
        "a multi-token-prediction layer has no preceding block to tap",
        "leave the flag out",
    ),
    Refused(
        "transformer_impl",
        "--transformer-impl",
        "it replaces the layers that ScMoE extends",
        "transformer_engine or local",
        lambda value: value == "inference_optimized",
    ),
    Refused(
        "experimental_attention_variant",
        "--experimental-attention-variant",
        "its layer specs are not wired",
        "leave the flag out",
    ),
    Refused(
        "heterogeneous_block_specs",
        "--heterogeneous-layers-config-path",
        "its layer specs are not wired",
        "leave the flag out",
    ),
    Refused(  # while its file is not read yet
        "heterogeneous_layers_config_path",
        "--heterogeneous-layers-config-path",
        "its layer specs are not wired",
        "leave the flag out",
    ),
    Refused(
        "is_hybrid_model",
        "--hybrid-layer-pattern",
        "Mamba blocks do not tell the routed path what they have passed",
        "leave the flag out",
    ),
    Refused(
        "hybrid_layer_pattern",
        "--hybrid-layer-pattern",
        "Mamba blocks do not tell the routed path what they have passed",
        "leave the flag out",
    ),
    Refused(
        "mlp_chunks_for_training",
        "--mlp-chunks-for-training",
        "the routed path is collected once per block",
        "1",
        lambda value: (value or 1) > 1,
    ),
    Refused(
        "mlp_chunks_for_prefill",
        "--mlp-chunks-for-prefill",
        "the routed path is collected once per block",
        "1",
        lambda value: (value or 1) > 1,
    ),
    Refused(
        "fine_grained_activation_offloading",
        "--fine-grained-activation-offloading",
        "its groups follow the stock order of the layer's operators",
        "leave the flag out",
    ),
    Refused(
        "use_megatron_fsdp",
        "--use-megatron-fsdp",
        "it gathers parameters on entering a block, when the routed path has begun",
        "--use-distributed-optimizer instead",
    ),
    Refused(
        "use_torch_fsdp2",
        "--use-torch-fsdp2",
        "it gathers parameters on entering a block, when the routed path has begun",
        "--use-distributed-optimizer instead",
    ),
)


@rule(*dict.fromkeys(row.flag for row in UNSUPPORTED))
def nothing_unsupported_is_on(scmoe: ScMoEConfig, settings: Settings) -> None:
    for row in UNSUPPORTED:
        if given := row.given(settings):
            raise ScMoEConfigError(given, row.reason, row.accepted)
