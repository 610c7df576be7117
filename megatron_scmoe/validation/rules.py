"""Everything ScMoE cannot do, refused at start-up: one place, one line for each.

:func:`validate` sees the model's settings twice: as parsed flags, before Megatron has judged them
(so that the message is ours), and as the final ``TransformerConfig``, which every way into the
package ends in.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import ClassVar, get_args

import torch
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import is_torch_min_version

from megatron_scmoe.arguments import defaults
from megatron_scmoe.config import DEFAULT_EXPERT_SLOT, AllToAllName, ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.overlap.schedule import num_slots, slot_behind_second_attention
from megatron_scmoe.platform import cpu_backend


def validate(scmoe: ScMoEConfig, settings) -> None:
    """Refuse what cannot work.

    Args:
        scmoe: the configuration of ScMoE.
        settings: a ``TransformerConfig``, or Megatron's parsed arguments.

    Raises:
        ScMoEConfigError: at the first setting that cannot work.
    """
    view = _View(settings)
    for check in _CHECKS:
        check(scmoe, view)
    if isinstance(settings, TransformerConfig):
        _check_pipeline_split(scmoe, settings)


def needs_dense_partner(scmoe: ScMoEConfig) -> bool:
    """Whether the routed path needs something of the preceding dense block.

    If it does not (Pos-1 with a norm of its own), it reads nothing but its own block's input, and
    the two blocks of a pair may lie in different pipeline stages or recompute chunks.
    """
    return scmoe.tap != "pos1" or scmoe.router_norm == "shared"


def moe_pattern(moe_layer_freq: int | list[int], num_layers: int) -> list[int]:
    """Megatron's ``--moe-layer-freq`` as one 0 (dense) or 1 (MoE) per block."""
    if isinstance(moe_layer_freq, int):
        return [int(i % moe_layer_freq == 0) for i in range(num_layers)]
    return list(moe_layer_freq)


@functools.cache
def names_of_settings() -> frozenset[str]:
    """What Megatron calls its settings: fields of its configurations, and arguments by their names."""
    kinds = (TransformerConfig, MLATransformerConfig)
    return frozenset(defaults()).union(f.name for kind in kinds for f in fields(kind))


class _View:
    """Settings by the names of ``TransformerConfig``, read from it or from parsed flags.

    What only the other of the two has is None. A name that neither has is an error: Megatron has
    renamed it, and a check of it would find nothing.
    """

    _FLAG_NAMES: ClassVar[dict[str, str]] = {"num_moe_experts": "num_experts"}

    def __init__(self, settings):
        self._settings = settings

    def __getattr__(self, name):
        for known_as in (name, self._FLAG_NAMES.get(name, name)):
            if hasattr(self._settings, known_as):
                return getattr(self._settings, known_as)
        if name not in names_of_settings():
            raise AttributeError(f"Megatron-Core has no setting {name}")
        return None


def _check_blocks(scmoe: ScMoEConfig, view: _View) -> None:
    if not view.num_moe_experts:
        raise ScMoEConfigError("--num-experts is not given", "ScMoE needs experts", "2 or more")
    if view.num_layers is None or view.moe_layer_freq is None:
        return
    layers, freq = view.num_layers, view.moe_layer_freq
    pattern = moe_pattern(freq, layers)
    given = f"--moe-layer-freq {freq}"
    if all(pattern):
        if scmoe.tap != "pos1":
            raise ScMoEConfigError(
                f"--scmoe-tap {scmoe.tap} with MoE in every block ({given})",
                "there is no preceding dense block to tap",
                f"--scmoe-tap pos1, or --moe-layer-freq '[0,1]*{max(layers // 2, 1)}'",
            )
        if scmoe.router_norm == "shared":
            raise ScMoEConfigError(
                f"--scmoe-router-norm shared with MoE in every block ({given})",
                "there is no preceding dense MLP whose norm could be shared",
                "--scmoe-router-norm own",
            )
        return
    if layers % 2:
        raise ScMoEConfigError(
            f"--num-layers {layers}",
            "blocks come in pairs of a dense and a MoE block",
            f"{layers - 1} or {layers + 1}",
        )
    if pattern != [0, 1] * (layers // 2):
        raise ScMoEConfigError(
            given,
            "dense and MoE blocks must alternate, dense first",
            f"'[0,1]*{layers // 2}', or 1 for MoE in every block with --scmoe-tap pos1",
        )


def _check_slot(scmoe: ScMoEConfig, view: _View) -> None:
    last = num_slots(scmoe.tap) - 1
    if scmoe.operator_times and scmoe.expert_slot != "auto":
        raise ScMoEConfigError(
            f"--scmoe-operator-times {scmoe.operator_times} without --scmoe-expert-slot auto",
            "nothing would read or write it",
            "--scmoe-expert-slot auto, or leave the flag out",
        )
    if scmoe.expert_slot == "auto":
        if not scmoe.overlap:
            raise ScMoEConfigError(
                "--scmoe-expert-slot auto with --no-scmoe-overlap",
                "without overlap every slot takes the same time",
                "--scmoe-overlap, or a number",
            )
        for name in ("fp8", "fp4"):
            if getattr(view, name):
                raise ScMoEConfigError(
                    f"--scmoe-expert-slot auto with --{name}-format {getattr(view, name)}",
                    "measuring would enter its amax history",
                    f"a number: 0 to {last}",
                )
        if view.init_model_with_meta_device:
            raise ScMoEConfigError(
                "--scmoe-expert-slot auto with --init-model-with-meta-device",
                "the model has no weights yet when it would be measured",
                f"a number: 0 to {last}",
            )
    elif scmoe.expert_slot is not None and not 0 <= scmoe.expert_slot <= last:
        raise ScMoEConfigError(
            f"--scmoe-expert-slot {scmoe.expert_slot}",
            f"--scmoe-tap {scmoe.tap} has the slots 0 to {last}",
            str(min(max(scmoe.expert_slot, 0), last)),
        )


def _check_chunks(scmoe: ScMoEConfig, view: _View) -> None:
    if scmoe.chunks < 1:
        raise ScMoEConfigError(f"--scmoe-chunks {scmoe.chunks}", "it counts chunks", "1 or more")
    if scmoe.chunks > 1 and view.moe_pad_expert_input_to_capacity:
        raise ScMoEConfigError(
            f"--scmoe-chunks {scmoe.chunks} with --moe-pad-expert-input-to-capacity",
            "the capacity counts the tokens of all chunks",
            "--scmoe-chunks 1",
        )
    if scmoe.chunks > 1 and view.moe_router_padding_for_quantization:
        raise ScMoEConfigError(
            f"--scmoe-chunks {scmoe.chunks} with --moe-router-padding-for-quantization",
            "the router pads the tokens of all chunks together",
            "--scmoe-chunks 1, or leave the flag out",
        )


def _check_combine(scmoe: ScMoEConfig, view: _View) -> None:
    if scmoe.combine != "add" and view.moe_shared_expert_intermediate_size is None:
        raise ScMoEConfigError(
            f"--scmoe-combine {scmoe.combine} without --moe-shared-expert-intermediate-size",
            "there is no shared expert to weigh",
            "--scmoe-combine add, or a shared expert",
        )
    if view.moe_shared_expert_gate and scmoe.combine != "cg1":
        raise ScMoEConfigError(
            f"--moe-shared-expert-gate with --scmoe-combine {scmoe.combine}",
            "the shared expert's gate is what CG-1 means",
            "--scmoe-combine cg1",
        )


def _check_router(scmoe: ScMoEConfig, view: _View) -> None:
    if (
        view.moe_router_topk == 1
        and view.moe_router_score_function == "softmax"
        and not view.moe_router_pre_softmax
        and view.moe_router_load_balancing_type != "sinkhorn"
    ):
        raise ScMoEConfigError(
            "--moe-router-topk 1 without --moe-router-pre-softmax",
            "a softmax over the one kept logit is 1 and gives the router no gradient",
            "--moe-router-pre-softmax, or --moe-router-score-function sigmoid",
        )
    topk, experts = view.moe_router_topk, view.num_moe_experts + max(scmoe.zero_experts, 0)
    if topk is not None and not 1 <= topk <= experts:
        raise ScMoEConfigError(
            f"--moe-router-topk {topk}",
            f"there are {experts} experts" + (", zero experts counted" * bool(scmoe.zero_experts)),
            str(min(max(topk, 1), experts)),
        )


_NOT_WITH_OWN_ROUTER: tuple[tuple[str, Callable, str, str], ...] = (
    (
        "moe_router_load_balancing_type",
        lambda value: {"sinkhorn", "quantile_balancing"}.intersection(_as_list(value)),
        "--moe-router-load-balancing-type",
        "aux_loss, seq_aux_loss, global_aux_loss or none",
    ),
    (
        "moe_expert_capacity_factor",
        lambda value: value is not None,
        "--moe-expert-capacity-factor",
        "leave the flag out",
    ),
    ("moe_router_fusion", bool, "--moe-router-fusion", "leave the flag out"),
    ("moe_enable_routing_replay", bool, "--moe-enable-routing-replay", "leave the flag out"),
)
"""Options of the router that know neither zero experts nor a bias beside softmax scores."""


def _check_own_router(scmoe: ScMoEConfig, view: _View) -> None:
    zero, topk = scmoe.zero_experts, view.moe_router_topk
    if zero < 0:
        raise ScMoEConfigError(
            f"--scmoe-zero-experts {zero}", "it is a number of experts", "0 or more"
        )
    biased = scmoe.expert_bias != "none"
    asked = f"--scmoe-expert-bias {scmoe.expert_bias}" if biased else f"--scmoe-zero-experts {zero}"
    if biased and view.moe_router_enable_expert_bias:
        raise ScMoEConfigError(
            f"{asked} with --moe-router-enable-expert-bias",
            "each gives the router a bias",
            "--scmoe-expert-bias for softmax scores, --moe-router-enable-expert-bias for others",
        )
    if biased and not (view.moe_router_score_function == "softmax" and view.moe_router_pre_softmax):
        raise ScMoEConfigError(
            f"{asked} without --moe-router-score-function softmax --moe-router-pre-softmax",
            "the bias is added to softmax scores of all experts",
            "both flags, or --moe-router-enable-expert-bias for other scores",
        )
    if scmoe.active_experts is not None and not biased:
        raise ScMoEConfigError(
            f"--scmoe-active-experts {scmoe.active_experts}",
            "it is what --scmoe-expert-bias aims at",
            "--scmoe-expert-bias proportional, or leave the flag out",
        )
    if scmoe.active_experts is not None and not 0 < scmoe.active_experts <= topk:
        raise ScMoEConfigError(
            f"--scmoe-active-experts {scmoe.active_experts}",
            f"a token has {topk} experts (--moe-router-topk)",
            f"more than 0, up to {topk}",
        )
    if scmoe.active_experts not in (None, topk) and not zero:
        raise ScMoEConfigError(
            f"--scmoe-active-experts {scmoe.active_experts} without --scmoe-zero-experts",
            f"every token then has all its {topk} experts (--moe-router-topk), whatever the biases",
            f"leave the flag out, {topk}, or --scmoe-zero-experts",
        )
    if not zero and not biased:
        return
    for name, is_given, flag, accepted in _NOT_WITH_OWN_ROUTER:
        value = getattr(view, name)
        if value is not None and is_given(value):
            shown = flag if value is True else " ".join([flag, *map(str, _as_list(value))])
            raise ScMoEConfigError(f"{shown} with {asked}", "it does not know them", accepted)
    if zero and view.moe_router_num_groups:
        raise ScMoEConfigError(
            f"--moe-router-num-groups {view.moe_router_num_groups} with {asked}",
            "zero experts belong to no group",
            "leave the flag out",
        )
    if zero and view.moe_token_dispatcher_type == "flex":
        raise ScMoEConfigError(
            f"--moe-token-dispatcher-type flex with {asked}",
            "its kernels take it that every token has --moe-router-topk experts to go to",
            "--moe-token-dispatcher-type alltoall",
        )


def _as_list(value) -> list:
    """A setting that Megatron's parser makes a list of, and its configuration may not."""
    return value if isinstance(value, list) else [value]


def _check_latent_attention(scmoe: ScMoEConfig, view: _View) -> None:
    own = "--scmoe-mla-scale" if scmoe.mla_scale else None
    if scmoe.mla_norm_epsilon is not None:
        own = f"--scmoe-mla-norm-epsilon {scmoe.mla_norm_epsilon}"
        if scmoe.mla_norm_epsilon <= 0:
            raise ScMoEConfigError(own, "it is added to a variance", "1e-6, for example")
    if own and not view.multi_latent_attention:
        raise ScMoEConfigError(
            own, "there are no latents", "--multi-latent-attention, or leave the flag out"
        )
    if own and not view.qk_layernorm:
        raise ScMoEConfigError(
            f"{own} without --qk-layernorm", "the latents have no norms", "--qk-layernorm"
        )
    if not view.multi_latent_attention:
        return
    if view.cache_mla_latents:
        raise ScMoEConfigError(
            "--cache-mla-latents", "it is for inference only", "leave the flag out"
        )
    if view.mla_down_proj_fusion and view.q_lora_rank is None:
        raise ScMoEConfigError(
            "--mla-down-proj-fusion without --q-lora-rank",
            "there is one down-projection, nothing to fuse it with",
            "--q-lora-rank, or leave the flag out",
        )
    if view.mla_down_proj_fusion and (own or view.transformer_impl == "local"):
        raise ScMoEConfigError(
            f"--mla-down-proj-fusion with {own or '--transformer-impl local'}",
            "the fused projections have Megatron's norms, in Transformer Engine",
            "leave the flag out",
        )


def _check_tensor_parallel(scmoe: ScMoEConfig, view: _View) -> None:
    """Megatron's MoE refuses this in its forward: gradients of experts and router would be wrong."""
    size = view.tensor_model_parallel_size or 1
    if size > 1 and not view.sequence_parallel:
        raise ScMoEConfigError(
            f"--tensor-model-parallel-size {size} without --sequence-parallel",
            "every tensor-parallel rank would send the same tokens to the experts",
            "--sequence-parallel",
        )


def _check_dispatcher(scmoe: ScMoEConfig, view: _View) -> None:
    kind = view.moe_token_dispatcher_type
    if kind == "allgather" and scmoe.overlap:
        raise ScMoEConfigError(
            "--moe-token-dispatcher-type allgather with --scmoe-overlap",
            "all-gather and reduce-scatter are not overlapped",
            "--moe-token-dispatcher-type alltoall, or --no-scmoe-overlap",
        )
    packages = {"deepep": ("deep_ep",), "hybridep": ("deep_ep",), "ncclep": ()}
    backend = view.moe_flex_dispatcher_backend
    if kind == "flex":
        for package in packages.get(backend, ()):
            if importlib.util.find_spec(package) is None:
                raise ScMoEConfigError(
                    f"--moe-token-dispatcher-type flex with --moe-flex-dispatcher-backend {backend}",
                    f"the package {package} is not installed",
                    "--moe-token-dispatcher-type alltoall, or install the package",
                )


def _check_exchange(scmoe: ScMoEConfig, view: _View) -> None:
    if scmoe.exchange == "collective":
        if scmoe.copy_engine_all_to_alls is not None:
            raise ScMoEConfigError(
                f"--scmoe-copy-engine-all-to-alls {' '.join(scmoe.copy_engine_all_to_alls)} "
                "with --scmoe-exchange collective",
                "there are no copy engines to carry them",
                "--scmoe-exchange copy-peer or copy-host",
            )
        return
    names = get_args(AllToAllName)
    if scmoe.copy_engine_all_to_alls is not None and not (
        scmoe.copy_engine_all_to_alls and set(scmoe.copy_engine_all_to_alls) <= set(names)
    ):
        raise ScMoEConfigError(
            f"--scmoe-copy-engine-all-to-alls {' '.join(scmoe.copy_engine_all_to_alls)}",
            "no such all-to-alls",
            ", ".join(names),
        )
    given = f"--scmoe-exchange {scmoe.exchange}"
    if view.moe_token_dispatcher_type != "alltoall":
        raise ScMoEConfigError(
            f"{given} with --moe-token-dispatcher-type {view.moe_token_dispatcher_type}",
            "that dispatcher has communication of its own",
            "--moe-token-dispatcher-type alltoall, or --scmoe-exchange collective",
        )
    if cpu_backend.is_enabled():
        raise ScMoEConfigError(given, "there is no GPU whose engines could copy", "collective")
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise ScMoEConfigError(
            f"{given} with CUDA_DEVICE_MAX_CONNECTIONS=1",
            "with one hardware queue compute would wait behind the copies",
            "collective, or CUDA_DEVICE_MAX_CONNECTIONS=32",
        )
    if not (importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")):
        raise ScMoEConfigError(given, "the package cuda-bindings is not installed", "collective")


def _check_activation(scmoe: ScMoEConfig, view: _View) -> None:
    """Megatron's experts have no fused gelu and fail in their first forward."""
    fused = (
        view.bias_activation_fusion
    )  # of a TransformerConfig; flags are mended in megatron_workarounds.py
    if fused and view.activation_func is torch.nn.functional.gelu and not view.gated_linear_unit:
        raise ScMoEConfigError(
            "experts with gelu and its fusion with the bias",
            "Megatron's experts have no such kernel",
            "--no-bias-gelu-fusion, or --swiglu",
        )
    if view.add_bias_linear and view.use_grouped_gemm_for_shared_expert:
        raise ScMoEConfigError(
            "--use-grouped-gemm-for-shared-expert without --disable-bias-linear",
            "the fused shared expert has no biases",
            "one of them",
        )


def _check_recompute(scmoe: ScMoEConfig, view: _View) -> None:
    if view.recompute_granularity == "selective" and "moe" in (view.recompute_modules or ()):
        raise ScMoEConfigError(
            "--recompute-modules moe",
            "the routed path runs beside two blocks and cannot be recomputed as one piece",
            "moe_act, shared_experts, layernorm, mlp, core_attn, or --recompute-granularity full",
        )
    if view.recompute_granularity != "full" or not needs_dense_partner(scmoe):
        return
    number = view.recompute_num_layers
    if view.recompute_method == "block":
        raise ScMoEConfigError(
            "--recompute-method block",
            "it recomputes block by block and would split the pairs",
            "--recompute-method uniform --recompute-num-layers 2",
        )
    if number is not None and number % 2:
        raise ScMoEConfigError(
            f"--recompute-num-layers {number}",
            "a recompute chunk must hold whole pairs of blocks",
            f"{number + 1}" if number == 1 else f"{number - 1} or {number + 1}",
        )


def _check_cuda_graphs(scmoe: ScMoEConfig, view: _View) -> None:
    impl = view.cuda_graph_impl or "none"
    if impl == "none":
        return
    if impl != "transformer_engine":
        raise ScMoEConfigError(
            f"--cuda-graph-impl {impl}",
            "a captured block cannot tell the routed path what it has passed",
            "none, or transformer_engine with --cuda-graph-modules attn",
        )
    given = view.cuda_graph_modules or view.cuda_graph_scope_deprecated or []
    modules = list(dict.fromkeys(getattr(module, "name", module) for module in _as_list(given)))
    routing = {"attn", "moe_router", "moe_preprocess"}
    if set(modules) not in ({"attn"}, routing, routing | {"mlp"}):
        raise ScMoEConfigError(
            f"--cuda-graph-modules {' '.join(modules) or '(none, which is all)'}",
            "parts of a block alone lie between boundaries of the routed path",
            "attn, attn moe_router moe_preprocess, or attn mlp moe_router moe_preprocess",
        )
    if len(modules) > 1:
        _check_captured_routing(scmoe, view)
        _check_one_graph(scmoe, view, modules)
    positions = view.position_embedding_type  # a flag; not in a TransformerConfig
    for wrong, setting, reason, accepted in (
        (
            view.transformer_impl != "transformer_engine",
            f"with --transformer-impl {view.transformer_impl}",
            "Transformer Engine captures its own modules",
            "--cuda-graph-impl none",
        ),
        (
            view.multi_latent_attention,
            "with --multi-latent-attention",
            "capturing latent attention has not been tried",
            "--cuda-graph-impl none",
        ),
        (not view.bf16, "without --bf16", "Megatron captures for inputs in bf16", "--bf16"),
        (
            view.fp32_residual_connection,
            "with --fp32-residual-connection",
            "a graph's input is bf16: the residual would be rounded at every block",
            "--cuda-graph-impl none",
        ),
        (
            positions not in (None, "rope", "learned_absolute", "none"),
            f"with --position-embedding-type {positions}",
            "Megatron captures attention without these positions",
            "--position-embedding-type rope, learned_absolute or none",
        ),
    ):
        if wrong:
            raise ScMoEConfigError(
                f"--cuda-graph-impl transformer_engine {setting}", reason, accepted
            )


def _check_one_graph(scmoe: ScMoEConfig, view: _View, modules: list[str]) -> None:
    """Routing with compute behind it in its graph: the dispatch begins in the midst of the graph."""
    given = f"--cuda-graph-modules {' '.join(modules)}"
    if not is_torch_min_version("2.9.0a0"):
        raise ScMoEConfigError(
            given, f"events inside a graph need torch 2.9; this is {torch.__version__}", "attn"
        )
    if "mlp" not in modules and scmoe.tap != "pos3":
        return
    where = f"{given} with --scmoe-tap {scmoe.tap}"
    if scmoe.overlap and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        raise ScMoEConfigError(
            f"{where} and CUDA_DEVICE_MAX_CONNECTIONS=1",
            "one hardware queue would run the dispatch behind the whole graph",
            "attn, or CUDA_DEVICE_MAX_CONNECTIONS=32",
        )
    slot = DEFAULT_EXPERT_SLOT[scmoe.tap] if scmoe.expert_slot is None else scmoe.expert_slot
    behind = slot_behind_second_attention(scmoe.tap)
    if slot == "auto":
        raise ScMoEConfigError(
            f"--scmoe-expert-slot auto with {where}",
            "slots are measured uncaptured, and in backward this graph is one piece",
            f"a number; the second attention lies between tap and slot {behind}",
        )
    exchanges = scmoe.overlap and (view.expert_model_parallel_size or 1) > 1
    if "mlp" in modules and exchanges and slot < behind:
        raise ScMoEConfigError(
            f"--scmoe-expert-slot {slot} with {where}",
            "in backward this graph is one piece: the dispatch would have no compute beside it",
            f"--scmoe-expert-slot {behind}, or --cuda-graph-modules without mlp",
        )


def _check_captured_routing(scmoe: ScMoEConfig, view: _View) -> None:
    for wrong, given in (
        (scmoe.tap == "pos1", f"--scmoe-tap {scmoe.tap}"),
        (scmoe.router_norm != "own", f"--scmoe-router-norm {scmoe.router_norm}"),
        (scmoe.chunks > 1, f"--scmoe-chunks {scmoe.chunks}"),
        (scmoe.zero_experts > 0, f"--scmoe-zero-experts {scmoe.zero_experts}"),
        (scmoe.expert_bias != "none", f"--scmoe-expert-bias {scmoe.expert_bias}"),
        (view.moe_latent_size, f"--moe-latent-size {view.moe_latent_size}"),
        (
            view.moe_expert_capacity_factor is not None,
            f"--moe-expert-capacity-factor {view.moe_expert_capacity_factor}",
        ),
        (view.moe_router_padding_for_quantization, "--moe-router-padding-for-quantization"),
        (view.moe_enable_routing_replay, "--moe-enable-routing-replay"),
        (
            "sinkhorn" in _as_list(view.moe_router_load_balancing_type),
            "--moe-router-load-balancing-type sinkhorn",
        ),
        (
            view.moe_token_dispatcher_type != "alltoall",
            f"--moe-token-dispatcher-type {view.moe_token_dispatcher_type}",
        ),
    ):
        if wrong:
            raise ScMoEConfigError(
                f"--cuda-graph-modules moe_router with {given}",
                "routing is captured with the attention it lies beside, and as a whole",
                "attn",
            )


_REFUSED: tuple[tuple[str, Callable, str, str, str], ...] = (
    (
        "overlap_moe_expert_parallel_comm",
        bool,
        "--overlap-moe-expert-parallel-comm",
        "the 1F1B overlap bypasses the layers' forward; ScMoE overlaps within the pair instead",
        "--scmoe-overlap alone",
    ),
    (
        "moe_shared_expert_overlap",
        bool,
        "--moe-shared-expert-overlap",
        "it moves the shared expert into the dispatcher; ScMoE overlaps it anyway",
        "--scmoe-overlap alone",
    ),
    (
        "overlap_dispatch_backward_with_experts_wgrad",
        bool,
        "--overlap-dispatch-backward-with-experts-wgrad",
        "ScMoE hides the dispatch under the backbone",
        "--scmoe-overlap alone",
    ),
    (
        "delay_wgrad_compute",
        bool,
        "--delay-wgrad-compute",
        "it belongs to the 1F1B overlap",
        "leave the flag out",
    ),
    (
        "mtp_num_layers",
        bool,
        "--mtp-num-layers",
        "a multi-token-prediction layer has no preceding block to tap",
        "leave the flag out",
    ),
    (
        "transformer_impl",
        lambda value: value == "inference_optimized",
        "--transformer-impl",
        "it replaces the layers that ScMoE extends",
        "transformer_engine or local",
    ),
    (
        "experimental_attention_variant",
        bool,
        "--experimental-attention-variant",
        "its layer specs are not wired",
        "leave the flag out",
    ),
    (
        "heterogeneous_block_specs",
        bool,
        "--heterogeneous-layers-config-path",
        "its layer specs are not wired",
        "leave the flag out",
    ),
    (
        "is_hybrid_model",
        bool,
        "--hybrid-layer-pattern",
        "Mamba blocks do not tell the routed path what they have passed",
        "leave the flag out",
    ),
    (
        "hybrid_layer_pattern",
        bool,
        "--hybrid-layer-pattern",
        "Mamba blocks do not tell the routed path what they have passed",
        "leave the flag out",
    ),
    (
        "mlp_chunks_for_training",
        lambda value: (value or 1) > 1,
        "--mlp-chunks-for-training",
        "the routed path is collected once per block",
        "1",
    ),
    (
        "mlp_chunks_for_prefill",
        lambda value: (value or 1) > 1,
        "--mlp-chunks-for-prefill",
        "the routed path is collected once per block",
        "1",
    ),
    (
        "fine_grained_activation_offloading",
        bool,
        "--fine-grained-activation-offloading",
        "its groups follow the stock order of the layer's operators",
        "leave the flag out",
    ),
    (
        "use_megatron_fsdp",
        bool,
        "--use-megatron-fsdp",
        "it gathers parameters on entering a block, when the routed path has begun",
        "--use-distributed-optimizer instead",
    ),
    (
        "use_torch_fsdp2",
        bool,
        "--use-torch-fsdp2",
        "it gathers parameters on entering a block, when the routed path has begun",
        "--use-distributed-optimizer instead",
    ),
)


def _check_refused(scmoe: ScMoEConfig, view: _View) -> None:
    for name, is_given, flag, reason, accepted in _REFUSED:
        value = getattr(view, name)
        if is_given(value):
            shown = flag if value is True else f"{flag} {value}"
            raise ScMoEConfigError(shown, reason, accepted)


def _check_local_implementation(scmoe: ScMoEConfig, view: _View) -> None:
    """What Megatron's local specs would fail on, deep inside, or ignore."""
    if view.transformer_impl != "local":
        return
    if view.layernorm_zero_centered_gamma:
        raise ScMoEConfigError(
            "--apply-layernorm-1p with --transformer-impl local",
            "PyTorch's norms have no zero-centred scale",
            "--transformer-impl transformer_engine, or leave the flag out",
        )
    needs_te = {"layernorm", "moe_act", "mla_up_proj"} & set(view.recompute_modules or ())
    if view.recompute_granularity == "selective" and needs_te:
        raise ScMoEConfigError(
            f"--recompute-modules {sorted(needs_te)[0]} with --transformer-impl local",
            "Megatron recomputes it with Transformer Engine",
            "core_attn, mlp, shared_experts, or --transformer-impl transformer_engine",
        )
    if (view.context_parallel_size or 1) > 1:
        raise ScMoEConfigError(
            f"--context-parallel-size {view.context_parallel_size} with --transformer-impl local",
            "Megatron's local attention knows no context parallelism",
            "--transformer-impl transformer_engine, or --context-parallel-size 1",
        )


_CHECKS = (
    _check_refused,
    _check_blocks,
    _check_slot,
    _check_chunks,
    _check_combine,
    _check_router,
    _check_own_router,
    _check_latent_attention,
    _check_tensor_parallel,
    _check_dispatcher,
    _check_exchange,
    _check_activation,
    _check_recompute,
    _check_cuda_graphs,
    _check_local_implementation,
)


def _check_pipeline_split(scmoe: ScMoEConfig, config: TransformerConfig) -> None:
    """Refuse a pipeline layout in which the blocks of a pair lie in different (virtual) stages."""
    if config.pipeline_model_parallel_size == 1 or not needs_dense_partner(scmoe):
        return
    for first, count in _stages(config):
        split = first if first % 2 else first + count
        if split % 2:
            flag, nearest = _pipeline_flag(config)
            raise ScMoEConfigError(
                flag,
                f"a pipeline stage would split the pair of blocks {split} and {split + 1} "
                f"of {config.num_layers}",
                nearest,
            )


def _stages(config: TransformerConfig) -> Iterator[tuple[int, int]]:
    """First block (from 0) and number of blocks of each (virtual) pipeline stage."""
    layout = config.pipeline_model_parallel_layout
    virtual = config.virtual_pipeline_model_parallel_size
    for vp_stage in range(virtual) if virtual else (None,):
        for pp_rank in range(config.pipeline_model_parallel_size):
            if layout is not None:
                blocks = layout.get_layer_id_list(
                    layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
                )
                if blocks:
                    yield blocks[0], len(blocks)
            else:
                count = get_num_layers_to_build(config, vp_stage, pp_rank)
                if count:
                    yield get_transformer_layer_offset(config, vp_stage, pp_rank), count


def _pipeline_flag(config: TransformerConfig) -> tuple[str, str]:
    """The flag that decides the layout, with its value, and the nearest valid one."""
    pairs = config.num_layers // 2
    size = config.pipeline_model_parallel_size
    if config.pipeline_model_parallel_layout is not None:
        return (
            f"--pipeline-model-parallel-layout {config.pipeline_model_parallel_layout}",
            "a layout with an even number of decoder blocks ('tt') in each stage",
        )
    for end in ("first", "last"):
        number = getattr(config, f"num_layers_in_{end}_pipeline_stage")
        if number is not None:
            return f"--decoder-{end}-pipeline-num-layers {number}", "even numbers for every stage"
    for part in ("embedding", "loss"):
        if getattr(config, f"account_for_{part}_in_pipeline_split"):
            return (
                f"--account-for-{part}-in-pipeline-split",
                "a --pipeline-model-parallel-layout with an even number of blocks in each stage",
            )
    virtual = config.virtual_pipeline_model_parallel_size
    if virtual and pairs % size == 0:
        return (
            f"--num-virtual-stages-per-pipeline-rank {virtual}",
            _nearest_divisor(pairs // size, virtual),
        )
    return f"--pipeline-model-parallel-size {size}", _nearest_divisor(pairs, size)


def _nearest_divisor(number: int, wanted: int) -> str:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    distance = min(abs(d - wanted) for d in divisors)
    return " or ".join(str(d) for d in divisors if abs(d - wanted) == distance)
