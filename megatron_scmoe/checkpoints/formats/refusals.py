"""What one side cannot express of the other: refused by flag on export, by field on import.

Most of these change what is computed without changing a tensor: the result would load and be wrong.
"""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from megatron_scmoe.errors import ConversionError
from megatron_scmoe.validation.settings import kinds_with_own_choice

Refusal = tuple[str, str, Callable[[Any], bool]]
"""An argument's name, its flag, and which of its values the format has."""


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Accept these values."""
    return lambda value: value in values


def refuse(args: argparse.Namespace, model_type: str, refusals: Iterable[Refusal]) -> None:
    """Compare the arguments in a checkpoint with what the model in transformers has.

    Raises:
        ConversionError: at the first that it has not; it names the flag.
    """
    for name, flag, is_fine in refusals:
        value = getattr(args, name, None)
        if not is_fine(value):
            shown = flag if value is True else f"{flag} {value}"
            raise ConversionError(f"{shown}: the {model_type} model in transformers has it not")


def require(config: Any, field: str, *accepted: Any) -> None:
    """Compare a field of transformers' configuration with what Megatron computes.

    A model without the field has the first of the accepted values.

    Raises:
        ConversionError: if it is another value; it names the field.
    """
    value = getattr(config, field, accepted[0])
    if value not in accepted:
        raise refusal_of_field(config, field, value, " or ".join(map(str, accepted)))


def refusal_of_field(config: Any, field: str, value: Any, accepted: Any) -> ConversionError:
    """What to raise for a field of transformers' configuration that Megatron cannot compute."""
    return ConversionError(
        f"config.json of a {config.model_type} model: {field} is {value}, which Megatron-Core 0.19.2 "
        f"cannot compute; accepted: {accepted}"
    )


IN_NO_FORMAT: tuple[Refusal, ...] = (
    ("num_experts", "--num-experts", bool),
    ("rotary_interleaved", "--rotary-interleaved", one_of(None, False)),
    ("no_rope_freq", "--no-rope-freq", one_of(None)),
    ("qk_l2_norm", "--qk-l2-norm", one_of(None, False)),
    ("window_size", "--window-size", one_of(None)),
    ("softmax_type", "--softmax-type", one_of(None, "vanilla")),
    ("attention_output_gate", "--attention-output-gate", one_of(None, False)),
    (
        "apply_residual_connection_post_layernorm",
        "--apply-residual-connection-post-layernorm",
        one_of(None, False),
    ),
    ("glu_linear_offset", "--glu-linear-offset", one_of(None, 0.0)),
    ("activation_func_clamp_value", "--activation-func-clamp-value", one_of(None)),
    ("use_mup", "--use-mup", one_of(None, False)),
    ("fp32_residual_connection", "--fp32-residual-connection", one_of(None, False)),
    ("mtp_num_layers", "--mtp-num-layers", one_of(None, 0)),
    ("moe_latent_size", "--moe-latent-size", one_of(None)),
    ("moe_apply_probs_on_input", "--moe-apply-probs-on-input", one_of(None, False)),
    ("moe_expert_capacity_factor", "--moe-expert-capacity-factor", one_of(None)),
    (
        "moe_router_force_load_balancing",
        "--moe-router-force-load-balancing",
        one_of(None, False),
    ),
    (
        "moe_router_load_balancing_type",
        "--moe-router-load-balancing-type",
        lambda value: not kinds_with_own_choice(value),
    ),
)
"""Of all formats that are exported to; each adds its own."""
