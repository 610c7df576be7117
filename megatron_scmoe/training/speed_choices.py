"""Flags of speed that a run chooses where they were not given, each with its reason.

None of them changes the model. Fused kernels and another order of sums change last bits, so a run that
goes on from a checkpoint chooses what the run had that saved it, and no more.

``--scmoe-tune off`` leaves all of it out.
"""

import argparse
import contextlib
import copy
import io
import os
import warnings
from collections.abc import Callable, Container
from typing import Any, NamedTuple

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe import moe_utils
from megatron.training.arguments import validate_args

from megatron_scmoe.arguments import in_flags, scmoe_config_from_args
from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.overlap.schedule import slot_behind_second_attention
from megatron_scmoe.platform import cpu_backend, megatron_workarounds
from megatron_scmoe.platform.megatron_flags import TUNE_FLAG, TUNE_OFF
from megatron_scmoe.platform.megatron_judgement import judged_by_megatron
from megatron_scmoe.training import optimizer_state
from megatron_scmoe.training.run_checks import data_parallel_size
from megatron_scmoe.training.saved_run import SavedRun
from megatron_scmoe.validation.rules import validate
from megatron_scmoe.validation.settings import kinds_with_own_choice

CUTLASS = "NVTE_USE_CUTLASS_GROUPED_GEMM"
"""Transformer Engine's variable: the GEMMs of all experts of a rank in one kernel."""


class Choice(NamedTuple):
    """Flags that are chosen together.

    Args:
        values: by the arguments' names.
        reason: in a few words.
        applies: whether these arguments have a use for it.
        changes_bits: whether last bits, or what is saved, depend on it.
    """

    values: dict[str, Any]
    reason: str
    applies: Callable[[argparse.Namespace], bool]
    changes_bits: bool = True


class Chosen(NamedTuple):
    """What a run has chosen for speed.

    Args:
        choices: those taken.
        notes: what else is to be said.
        environment: variables to set, each with its reason.
    """

    choices: list[Choice]
    notes: list[str]
    environment: dict[str, tuple[str, str]]

    @property
    def values(self) -> dict[str, Any]:
        """All flags, by the arguments' names."""
        return {name: value for choice in self.choices for name, value in choice.values.items()}


def choose(
    args: argparse.Namespace, given: Container[str], saved: SavedRun | None = None
) -> Chosen:
    """What a run takes of :data:`TABLE` and of CUDA graphs.

    A choice is taken whole or not at all: not if one of its flags was given, and not if the rules of
    ScMoE or Megatron refuse it beside the flags that were.

    Args:
        args: as parsed, with what had to be chosen already.
        given: names of the arguments that the command line has.
        saved: the checkpoint that is loaded.
    """
    found = Chosen([], [], {})
    if args.scmoe_tune == TUNE_OFF:
        return found
    now = copy.deepcopy(args)
    for choice in TABLE:
        if choice.applies(now) and _is_open(choice, now, given) and _goes_on(choice, args, saved):
            found.choices.append(choice)
            vars(now).update(choice.values)
    if found.choices and refusal(now) is not None:
        _leave_out_refused(args, found)
        now = argparse.Namespace(**vars(args) | found.values)
    _choose_graphs(now, found, given, args, saved)
    if saved is None and _has_many_small_experts(argparse.Namespace(**vars(args) | found.values)):
        found.environment[CUTLASS] = "1", "one kernel for the GEMMs of a rank's many experts"
    if _has_one_queue(args):
        found.notes.append(
            "CUDA_DEVICE_MAX_CONNECTIONS=1 is set: no all-to-all is launched behind compute; unset it"
        )
    return found


def describe(chosen: Chosen) -> str:
    """The block that is logged: a line for each choice, and what else is to be said."""
    lines = [f"> chosen for speed where not given ({TUNE_FLAG} {TUNE_OFF} leaves it out):"]
    for choice in chosen.choices:
        words = " ".join(in_flags(name, value) for name, value in choice.values.items())
        lines.append(f"  {words}\n      {choice.reason}" if len(words) > 46 else
                     f"  {words:<46}  {choice.reason}")  # fmt: skip
    for name, (value, reason) in chosen.environment.items():
        lines.append(f"  {f'{name}={value}':<46}  {reason}")
    return "\n".join([*lines, *(f"  {note}" for note in chosen.notes)])


def refusal(args: argparse.Namespace) -> ScMoEError | None:
    """What ScMoE or Megatron would raise against these parsed arguments; None if nothing.

    It asks their own checks, on a copy.
    """
    args = copy.deepcopy(args)
    try:
        scmoe = scmoe_config_from_args(args)
        validate(scmoe, args)
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            judged_by_megatron(),
        ):
            validate_args(args)
            megatron_workarounds.leave_out_missing_fusions(args)
            config = megatron_workarounds.transformer_config(args)
        validate(scmoe, config)
    except ScMoEError as error:
        return error
    return None


def is_on_gpu() -> bool:
    """Whether this process has a GPU, and Transformer Engine for it."""
    return HAVE_TE and not cpu_backend.is_enabled()


def _has_fast_kernels(args: argparse.Namespace) -> bool:
    """Whether Transformer Engine computes the model in 16 bits on a GPU."""
    plain = (args.bf16 or args.fp16) and not (args.fp8 or args.fp4)
    return is_on_gpu() and bool(plain) and args.transformer_impl == "transformer_engine"


def _groups_gemms(args: argparse.Namespace) -> bool:
    return _has_fast_kernels(args) and torch.cuda.get_device_capability()[0] >= 8


def _has_many_small_experts(args: argparse.Namespace) -> bool:
    """Where it was measured to pay: 32 experts a rank, on Hopper, whose kernels these are."""
    experts = (args.num_experts or 0) // args.expert_model_parallel_size
    is_open = CUTLASS not in os.environ
    return is_open and args.moe_grouped_gemm and experts >= 16 and _is_hopper(args)


def _is_hopper(args: argparse.Namespace) -> bool:
    return _has_fast_kernels(args) and torch.cuda.get_device_capability() == (9, 0)


def _fuses_permutation(args: argparse.Namespace) -> bool:
    kernels = (moe_utils.fused_permute_with_probs, moe_utils.fused_sort_chunks_by_index_with_probs)
    has_capacity = args.moe_expert_capacity_factor is not None
    return _has_fast_kernels(args) and None not in kernels and not has_capacity


def _fuses_router(args: argparse.Namespace) -> bool:
    """Its kernels are tested by their authors in fp32 alone, and know neither replay nor sinkhorn."""
    kernels = (moe_utils.fused_topk_with_score_function, moe_utils.fused_moe_aux_loss)
    chosen = kinds_with_own_choice(args.moe_router_load_balancing_type)
    other = chosen or args.moe_enable_routing_replay
    is_fp32 = args.moe_router_dtype == "fp32"
    return _has_fast_kernels(args) and None not in kernels and is_fp32 and not other


def _needs_no_mask(args: argparse.Namespace) -> bool:
    return _has_fast_kernels(args) and not args.reset_attention_mask


def _shards_optimizer(args: argparse.Namespace) -> bool:
    return (
        _has_fast_kernels(args)
        and data_parallel_size(args) > 1
        and args.optimizer == "adam"
        and args.ckpt_format == "torch_dist"
        and not (args.optimizer_cpu_offload or args.freeze_all_layers)
    )


def _reduces_under_backward(args: argparse.Namespace) -> bool:
    """Over NCCL, and over gloo on a CPU."""
    return data_parallel_size(args) > 1 and not args.freeze_all_layers


def _gathers_under_forward(args: argparse.Namespace) -> bool:
    has_both = args.use_distributed_optimizer and args.overlap_grad_reduce
    return _has_fast_kernels(args) and bool(has_both) and args.save_params_interval is None


TABLE = (
    Choice(
        {"moe_grouped_gemm": True}, "one launch for the GEMMs of a rank's experts", _groups_gemms
    ),
    Choice({"moe_permute_fusion": True}, "one kernel sorts the tokens", _fuses_permutation),
    Choice({"moe_router_fusion": True}, "few kernels for the router", _fuses_router),
    Choice(
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
        "few kernels for the loss, and less memory",
        _has_fast_kernels,
    ),
    Choice(
        {"create_attention_mask_in_dataloader": False},
        "the kernels know that attention is causal",
        _needs_no_mask,
        changes_bits=False,
    ),
    Choice(
        {"use_distributed_optimizer": True},
        "each rank updates its share of the parameters",
        _shards_optimizer,
    ),
    Choice(
        {"overlap_grad_reduce": True},
        "gradients are reduced while backward goes on",
        _reduces_under_backward,
    ),
    Choice(
        {"overlap_param_gather": True},
        "parameters are gathered while forward goes on",
        _gathers_under_forward,
    ),
    Choice(
        {"manual_gc": True, "manual_gc_interval": 100},
        "ranks collect garbage together, not one by one",
        lambda args: True,
        changes_bits=False,
    ),
    Choice(
        {"rerun_mode": "disabled"},
        "NaN and Inf end the run at once; no state is copied to repeat an iteration",
        lambda args: is_on_gpu(),
        changes_bits=False,
    ),
)
"""The choices, in this order: a later one sees the flags of those before."""

_GRAPHS = (
    ("attn", "mlp", "moe_router", "moe_preprocess"),
    ("attn", "moe_router", "moe_preprocess"),
    ("attn",),
)
"""Sets of modules for CUDA graphs; the first that is accepted is taken."""

_OF_GRAPHS = ("cuda_graph_impl", "cuda_graph_modules", "cuda_graph_scope_deprecated")


def _choose_graphs(
    now: argparse.Namespace,
    found: Chosen,
    given: Container[str],
    args: argparse.Namespace,
    saved: SavedRun | None,
) -> None:
    """Add the fullest set of captured modules that is accepted, or a note that none is."""
    if not _has_fast_kernels(now) or any(name in given for name in _OF_GRAPHS):
        return
    if now.pipeline_model_parallel_size > 1:
        found.notes.append(
            "no CUDA graphs: with pipeline stages each micro-batch in flight needs memory for its own"
        )
        return
    reasons = []
    for modules in _GRAPHS:
        choice = _capturing(modules, now, given)
        if not _goes_on(choice, args, saved):
            return
        refused = refusal(argparse.Namespace(**vars(now) | choice.values))
        if refused is None:
            found.choices.append(choice)
            return
        reasons.append(refused.without_advice)
    if refusal(now) is None:
        found.notes.append(f"no CUDA graphs: {reasons[-1]}")


def _capturing(modules: tuple[str, ...], now: argparse.Namespace, given: Container[str]) -> Choice:
    values: dict[str, Any] = {
        "cuda_graph_impl": "transformer_engine",
        "cuda_graph_modules": [CudaGraphModule[name] for name in modules],
        "te_rng_tracker": True,
    }
    if "mlp" in modules and now.scmoe_overlap and "scmoe_expert_slot" not in given:
        values["scmoe_expert_slot"] = slot_behind_second_attention(now.scmoe_tap)
    reason = "one launch instead of a block's many"
    return Choice(values, reason, _has_fast_kernels)


def _is_open(choice: Choice, args: argparse.Namespace, given: Container[str]) -> bool:
    """Whether no flag of it was given, and it says anything new."""
    is_new = any(getattr(args, name) != value for name, value in choice.values.items())
    return is_new and not any(name in given for name in choice.values)


def _goes_on(choice: Choice, args: argparse.Namespace, saved: SavedRun | None) -> bool:
    """Whether a run that loads this checkpoint may choose it: the run that saved it had it, too."""
    if saved is None or not choice.changes_bits:
        return True
    if not optimizer_state.is_loaded(args, saved):
        return saved.is_distributed
    return all(
        name.startswith("scmoe_") or _same(getattr(saved.args, name, None), value)
        for name, value in choice.values.items()
    )


def _same(before: Any, value: Any) -> bool:
    """A graph's modules may have become more or fewer: what is captured changes no bit."""
    return bool(before) if isinstance(value, list) else before == value


def _leave_out_refused(args: argparse.Namespace, found: Chosen) -> None:
    """Take the choices one by one, and those alone that are accepted; none if nothing would be."""
    tried, found.choices[:] = list(found.choices), []
    if refusal(args) is not None:
        return
    for choice in tried:
        if refusal(argparse.Namespace(**vars(args) | found.values | choice.values)) is None:
            found.choices.append(choice)


def _has_one_queue(args: argparse.Namespace) -> bool:
    """Whether the environment has one hardware queue where Megatron asks for none."""
    needed = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    given = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    return given and not needed and not cpu_backend.is_enabled()
