"""The one configuration of ScMoE, and which blocks it makes pairs of.

Command-line flags are generated from it (see arguments.py).
"""

import argparse
from dataclasses import dataclass, field
from typing import Literal, get_args

Tap = Literal["pos1", "pos2", "pos3"]
Combine = Literal["add", "cg1", "cg2"]
RouterNorm = Literal["own", "shared"]
Exchange = Literal["collective", "copy-host", "copy-peer"]
AllToAllName = Literal["dispatch", "combine", "dispatch-backward", "combine-backward"]
ExpertBias = Literal["none", "sign", "proportional"]
DecodeSchedule = Literal["auto", "overlapped", "serial"]
SPEC = ("megatron_scmoe.spec", "scmoe_spec")
"""What ``--spec`` takes for a model of ScMoE; a checkpoint trained so has it as its argument."""

AUTO, OVERLAPPED, SERIAL = get_args(DecodeSchedule)
DecodePadding = Literal["auto", "on", "off"]
_, ON, OFF = get_args(DecodePadding)

DecodeGraphsUse = Literal["auto", "on", "off"]


def slot_or_auto(text: str) -> int | str:
    """The ``type`` of ``--scmoe-expert-slot``."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are numbers and auto") from None


@dataclass(frozen=True, kw_only=True)
class ScMoEConfig:
    """ScMoE: a MoE layer that reads an earlier representation, the tap (arXiv 2404.05019)."""

    tap: Tap = "pos2"
    """What router and routed experts read: pos1, the output of the preceding block (with MoE in
    every block: the block's own input); pos2, the preceding block between attention and MLP;
    pos3, the input of the preceding block."""

    combine: Combine = "cg1"
    """How shared and routed output join: add, shared + routed; cg1, sigmoid(w.x) * shared + routed;
    cg2, c0 * shared + c1 * routed with c = softmax(W x). x is the input of the shared expert."""

    router_norm: RouterNorm = "own"
    """The norm on the tap: own, a norm of its own; shared, the norm (its weights; with pos2 also its
    output) of the preceding dense MLP, as in LongCat-Flash."""

    post_norm: bool = False
    """Put a norm on the joined shared and routed output, before the residual add."""

    overlap: bool = field(
        default=True,
        metadata={
            "argparse_meta": {
                "arg_names": ["--scmoe-overlap"],
                "action": argparse.BooleanOptionalAction,
            }
        },
    )
    """Keep both all-to-alls in flight while attention and dense MLPs compute. Off: every launch is
    followed by its wait, with bit-identical results."""

    expert_slot: int | Literal["auto"] | None = field(
        default=None,
        metadata={"argparse_meta": {"type": slot_or_auto, "metavar": "N|auto"}},
    )
    """After how many backbone operators behind the tap the routed experts compute: 0 to 2 with pos1
    (attention, shared expert), 0 to 3 with pos2 (and the preceding MLP before these), 0 to 4 with
    pos3 (and the preceding attention before these); auto: the fastest, measured at start-up.
    Default: 1 with pos1 and pos2, 2 with pos3."""

    operator_times: str | None = field(
        default=None, metadata={"argparse_meta": {"metavar": "FILE"}}
    )
    """File (JSON) of the operator times that --scmoe-expert-slot auto chooses by. If it exists, it is
    read and nothing is measured; if not, the measured times are written to it."""

    chunks: int = 1
    """How many chunks the routed tokens are split into. With more than one, the experts of one chunk
    compute while others are under way: where communication is longer than what hides it."""

    exchange: Exchange = "collective"
    """What carries the all-to-alls: collective, NCCL's (or gloo's) kernels; copy-peer and copy-host,
    the GPUs' copy engines, which take no multiprocessor from the compute meanwhile, directly or
    through pinned host memory. Copy engines reach the GPUs of one host."""

    copy_engine_all_to_alls: list[AllToAllName] | None = None
    """Which all-to-alls the copy engines of --scmoe-exchange carry: dispatch, combine,
    dispatch-backward, combine-backward; the others stay with the collective. Default: all."""

    zero_experts: int = 0
    """Identity ("zero-computation") experts on top of --num-experts, as in LongCat-Flash: a token
    routed to one comes back as itself times its weight, without communication. The router scores
    them after the others, and --moe-router-topk counts them in."""

    expert_bias: ExpertBias = "none"
    """Select experts by score + a bias of their own, weigh them by the score alone; for the softmax
    scores that --moe-router-enable-expert-bias refuses. After each step, at the rate
    --moe-router-bias-update-rate, biases move by the load that an expert lacks (proportional, as in
    LongCat-Flash) or by its sign; those of zero experts stay."""

    active_experts: float | None = None
    """Experts per token, zero experts left out, that --scmoe-expert-bias aims at; needs
    --scmoe-zero-experts. Default: their share if all experts were chosen alike,
    topk * experts / (experts + zero experts)."""

    router_bias: bool = False
    """The router holds a bias of its linear layer, for the way back to a LongCat-Flash checkpoint with
    router_bias. As in transformers' own class, it has no part in the scores and is not trained."""

    mla_scale: bool = False
    """Multiply MLA's normalised latents by sqrt(hidden size / rank), as in LongCat-Flash."""

    mla_norm_epsilon: float | None = None
    """Epsilon of the norms of MLA's latents, 1e-6 in LongCat-Flash. Default: --norm-epsilon."""

    changed: list[str] | None = field(default=None, metadata={"argparse_meta": {"metavar": "FLAG"}})
    """Settings of the model in which this run departs on purpose from the checkpoint that it loads,
    by their flags without dashes in front: rotary-base moe-router-topk. What else differs is refused
    (docs/checkpoints.md). Default: none."""


RUNTIME_FIELDS = (
    "overlap",
    "expert_slot",
    "operator_times",
    "chunks",
    "exchange",
    "copy_engine_all_to_alls",
    "changed",
)
"""Fields that say how a model is computed, not what it computes: another run need not share them."""

DEFAULT_EXPERT_SLOT = {"pos1": 1, "pos2": 1, "pos3": 2}
"""Halves the window: each all-to-all keeps an attention or an MLP to hide under."""


def wanted_slot(scmoe: ScMoEConfig) -> int | Literal["auto"]:
    """The expert slot that was asked for; the tap's own if none was."""
    return DEFAULT_EXPERT_SLOT[scmoe.tap] if scmoe.expert_slot is None else scmoe.expert_slot


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
