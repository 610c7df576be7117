"""Everything that ScMoE cannot do: one table of rules, one entry.

    python -m megatron_scmoe.validation.rules --moe-router-topk    # the rules that name a flag

:func:`validate` sees the model's settings twice: as parsed flags, before Megatron has judged them
(so that the message is ours), and as the final ``TransformerConfig``, which every way into the
package ends in.

To add a rule, write a function under ``@rule`` with its flags in the module of its subject, name it in
:data:`RULES`, and give a combination that it refuses in tests/unit/validation/test_validation.py.
"""

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.validation import (
    communication,
    cuda_graphs,
    latent_attention,
    model,
    overlap,
    parallelism,
    recompute,
    router,
    unsupported,
)
from megatron_scmoe.validation.rule import Rule
from megatron_scmoe.validation.settings import Settings


def validate(scmoe: ScMoEConfig, settings: TransformerConfig | argparse.Namespace) -> None:
    """Refuse what cannot work.

    Args:
        scmoe: the configuration of ScMoE.
        settings: a ``TransformerConfig``, or Megatron's parsed arguments.

    Raises:
        ScMoEConfigError: at the first setting that cannot work.
    """
    view = Settings(settings)
    for rule in RULES:
        rule.check(scmoe, view)


RULES: tuple[Rule, ...] = (
    unsupported.nothing_unsupported_is_on,
    model.there_are_experts,
    model.tap_is_of_a_dense_block,
    model.shared_norm_is_of_a_dense_block,
    model.blocks_come_in_pairs,
    model.dense_and_moe_blocks_alternate,
    overlap.operator_times_are_for_slot_auto,
    overlap.slot_auto_needs_overlap,
    overlap.slot_auto_is_not_measured_in_fp8,
    overlap.slot_auto_needs_weights,
    overlap.slot_is_one_of_the_taps,
    overlap.there_is_a_chunk,
    overlap.chunks_are_not_padded_to_capacity,
    overlap.chunks_are_not_padded_by_the_router,
    model.gates_weigh_a_shared_expert,
    model.megatrons_shared_expert_gate_is_cg1,
    router.one_expert_has_a_gradient,
    router.there_are_topk_experts,
    router.zero_experts_are_a_number,
    router.there_is_one_bias,
    router.bias_is_for_softmax_of_all_experts,
    router.active_experts_are_aimed_at_by_a_bias,
    router.active_experts_are_among_topk,
    router.fewer_active_experts_need_zero_experts,
    router.own_router_knows_the_options,
    router.zero_experts_are_in_no_group,
    router.zero_experts_are_not_dispatched_by_flex,
    latent_attention.epsilon_is_positive,
    latent_attention.there_are_latents,
    latent_attention.latents_have_norms,
    latent_attention.latents_are_not_cached,
    latent_attention.two_down_projections_are_fused,
    latent_attention.fused_down_projections_have_megatrons_norms,
    parallelism.tensor_parallel_ranks_have_tokens_of_their_own,
    communication.allgather_is_not_overlapped,
    communication.deepep_is_a_backend_of_flex,
    communication.flex_has_its_package,
    communication.copied_needs_copy_engines,
    communication.copied_are_all_to_alls,
    communication.copy_engines_serve_the_alltoall_dispatcher,
    communication.copy_engines_are_those_of_a_gpu,
    communication.copies_have_a_hardware_queue,
    communication.copy_engines_have_their_package,
    model.experts_have_no_fused_gelu,
    model.fused_shared_expert_has_no_biases,
    recompute.moe_is_not_recomputed_alone,
    recompute.pairs_are_not_recomputed_by_block,
    recompute.recompute_chunks_hold_whole_pairs,
    cuda_graphs.transformer_engine_captures,
    cuda_graphs.captured_modules_lie_between_boundaries,
    cuda_graphs.captured_routing_is_whole,
    cuda_graphs.torch_has_events_inside_graphs,
    cuda_graphs.dispatch_does_not_queue_behind_its_graph,
    cuda_graphs.slot_auto_is_not_measured_captured,
    cuda_graphs.dispatch_has_compute_beside_it_in_backward,
    cuda_graphs.modules_of_transformer_engine_are_captured,
    cuda_graphs.latent_attention_is_not_captured,
    cuda_graphs.inputs_of_graphs_are_bf16,
    cuda_graphs.residual_of_graphs_is_bf16,
    cuda_graphs.positions_are_captured,
    model.local_norms_have_no_zero_centred_scale,
    recompute.local_modules_are_recomputed,
    parallelism.local_attention_has_no_context_parallelism,
    parallelism.pipeline_stages_hold_whole_pairs,
)
"""In the order in which they are judged: later ones rely on what earlier ones have refused."""


def index_by_flag() -> dict[str, list[Rule]]:
    """The rules that name each flag, flags in alphabetical order."""
    flags = sorted({flag for rule in RULES for flag in rule.flags})
    return {flag: [rule for rule in RULES if flag in rule.flags] for flag in flags}


def describe(wanted: Sequence[str] = ()) -> Iterator[str]:
    """One line a flag and rule: ``--scmoe-chunks  overlap.py:66  there is a chunk``.

    Args:
        wanted: the flags; none for all.
    """
    for flag, rules in index_by_flag().items():
        for rule in rules if flag in wanted or not wanted else ():
            file = Path(inspect.getfile(rule.check)).name
            line = inspect.getsourcelines(rule.check)[1]
            name = rule.check.__name__.replace("_", " ")
            yield f"{flag:<44} {f'{file}:{line}':<24} {name}"


if __name__ == "__main__":
    print("\n".join(describe(sys.argv[1:])))
