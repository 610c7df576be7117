"""How a model is upcycled: settings alone, so that a command line shows them without Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_scmoe.config import Combine, RouterNorm, Tap

if TYPE_CHECKING:
    import torch

    from megatron_scmoe.checkpoints.vocabulary import Padding

INITS = ("copy", "drop", "noise")


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a model is upcycled.

    ``num_experts`` and ``topk`` are those of the routed experts; None for a stock MoE model, which has
    them. ``combine`` None is cg1 for a dense model, and for a stock MoE model what it has: cg1 with a
    gate on the shared expert, add without.
    """

    num_experts: int | None = None
    topk: int | None = None
    expert_ffn: int | None = None
    """Intermediate size of a routed expert; None for that of the dense MLP."""
    init: str = "copy"
    tap: Tap = "pos2"
    combine: Combine | None = None
    router_norm: RouterNorm = "own"
    every_block: bool = False
    """MoE in every block instead of every second one; with tap pos1."""
    drop_ratio: float = 0.5
    """Of init drop: the part of the intermediate dimensions drawn anew."""
    noise_scale: float = 0.1
    """Of init noise: deviation of the noise, in deviations of the weights."""
    routed_scale: float = 0.0
    """Factor on the routed experts' down-projections; above 0 the logits change."""
    seed: int = 1234
    dtype: torch.dtype | None = None
    """Of the weights in the checkpoint; None as in the source."""
    tokenizer: str | None = None
    """Instead of the source's: a SentencePiece model, a folder, or "none"."""
    padding: Padding | None = None
    """Of the vocabulary; None for Megatron's default, and for a Megatron checkpoint what it has."""
