"""Megatron's arguments of a model: the part that a checkpoint has to carry, and how to build them."""

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn

import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.arguments import (
    ENVIRONMENT_VARIABLE,
    PREFIX,
    add_scmoe_args,
    check_choices,
    defaults,
    scmoe_arguments,
    scmoe_config_from_args,
    scmoe_config_from_environment,
)
from megatron_scmoe.config import RUNTIME_FIELDS, SPEC, ScMoEConfig
from megatron_scmoe.errors import ConversionError, ScMoEConfigError
from megatron_scmoe.validation.rules import validate

MODEL_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "group_query_attention",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "no_rope_freq",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "qk_layernorm",
    "qk_l2_norm",
    "add_bias_linear",
    "add_qkv_bias",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "openai_gelu",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "use_mup",
    "mup_width_mult",
    "mup_base_hidden_size",
    "mup_embedding_mult",
    "mup_output_mult",
    "mup_base_head_dim",
    "mup_attn_scale_power",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "attention_output_gate",
    "apply_residual_connection_post_layernorm",
    "untie_embeddings_and_output_weights",
    "vocab_size",
    "padded_vocab_size",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rope_type",
    "num_experts",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_dtype",
    "moe_apply_probs_on_input",
    "moe_latent_size",
    *(f"scmoe_{field.name}" for field in fields(ScMoEConfig) if field.name not in RUNTIME_FIELDS),
)
"""The arguments that decide what a model computes; the others say how it is trained and where."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of weights that Megatron trains, by what ``--dtype`` takes."""

LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Megatron's constants of ``--use-rope-scaling``, as transformers names them."""


def model_arguments(args: argparse.Namespace) -> dict:
    """What of :data:`MODEL_ARGUMENTS` a checkpoint's arguments say."""
    return {name: getattr(args, name) for name in MODEL_ARGUMENTS if hasattr(args, name)}


def is_scmoe(saved: argparse.Namespace) -> bool:
    """Whether these arguments are those of a ScMoE model."""
    return hasattr(saved, f"{PREFIX}tap") or built_by_spec(saved)


def built_by_spec(saved: argparse.Namespace) -> bool:
    """Whether ``--spec megatron_scmoe.spec scmoe_spec`` built the model of these arguments."""
    return tuple(getattr(saved, "spec", None) or ()) == SPEC


def with_defaults(saved: argparse.Namespace) -> argparse.Namespace:
    """A checkpoint's arguments with the fields of ScMoE that were added since it was written.

    A checkpoint of ``--spec`` that an older version wrote has none of them: they are taken from
    ``$SCMOE_ARGS``, if that is set.

    Raises:
        ScMoEConfigError: if a later version wrote it, of a model that this one does not know.
    """
    check_choices(saved)
    if hasattr(saved, f"{PREFIX}tap"):
        added = scmoe_arguments(ScMoEConfig())
    elif built_by_spec(saved) and ENVIRONMENT_VARIABLE in os.environ:
        added = scmoe_arguments(scmoe_config_from_environment())
    else:
        added = {}
    return argparse.Namespace(**added | vars(saved))


def with_megatron_defaults(saved: argparse.Namespace) -> argparse.Namespace:
    """A checkpoint's arguments with those of Megatron that were added since it was written."""
    of_megatron = {name: v for name, v in defaults().items() if not name.startswith(PREFIX)}
    return argparse.Namespace(**of_megatron | vars(saved))


def arguments_from_flags(
    flags: list[str], dtype: torch.dtype, vocab_rows: int
) -> argparse.Namespace:
    """Megatron's arguments as a run of ``pretrain_gpt_scmoe.py`` with these flags would save them.

    Args:
        flags: what describes the model, and the tokenizer if there is one.
        dtype: of the weights: float32, bfloat16 or float16.
        vocab_rows: rows of the embedding, padding included.

    Raises:
        ConversionError: if the package cannot build such a model; it names the flag.
    """
    check_dtype(dtype)
    args = parse_flags(flags)
    _derive(args, dtype, vocab_rows)
    try:
        validate(scmoe_config_from_args(args), args)
    except ScMoEConfigError as error:
        raise ConversionError(str(error)) from error
    return args


def parse_flags(flags: list[str]) -> argparse.Namespace:
    """Megatron's arguments and ScMoE's, as these flags say and nothing is derived yet.

    Raises:
        ConversionError: if they cannot be parsed.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = _refuse  # type: ignore[method-assign]  # Megatron adds to the parser given
    return add_scmoe_args(add_megatron_arguments(parser)).parse_args(flags)


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype that is none of :data:`DTYPES`."""
    if dtype not in DTYPES.values():
        accepted = ", ".join(map(str, DTYPES.values()))
        raise ConversionError(f"weights of {dtype}: accepted are {accepted}")


def rope_flags(parameters: Mapping[str, Any]) -> list[str]:
    """The flags of rotary embeddings: plain, linearly interpolated, or scaled as in Llama 3.

    Args:
        parameters: ``rope_parameters`` of a ``config.json``.

    Raises:
        ConversionError: if Megatron cannot compute them; it names the field.
    """
    fixed: dict[str, dict] = {"default": {}, "linear": {}, "llama3": LLAMA3_ROPE}
    kind = parameters.get("rope_type", "default")
    if kind not in fixed:
        raise _refuse_rope("rope_type", kind, " or ".join(fixed))
    for name, accepted in fixed[kind].items():
        if parameters.get(name, accepted) != accepted:
            raise _refuse_rope(name, parameters[name], accepted)
    flags = ["--rotary-base", _whole(parameters, "rope_theta")]
    if "partial_rotary_factor" in parameters:
        flags += ["--rotary-percent", str(_number(parameters, "partial_rotary_factor", most=1))]
    if kind == "linear":
        flags += ["--rotary-seq-len-interpolation-factor", _whole(parameters, "factor")]
    if kind == "llama3":
        flags += ["--use-rope-scaling", "--rope-scaling-factor", str(_number(parameters, "factor"))]
    return flags


def _whole(parameters: Mapping[str, Any], name: str) -> str:
    value = _number(parameters, name)
    if value != int(value):
        raise _refuse_rope(name, value, "a whole number")
    return str(int(value))


def _number(parameters: Mapping[str, Any], name: str, most: float = sys.float_info.max) -> float:
    """A field of ``rope_parameters`` that is a number above 0."""
    value = parameters.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or not is_number or not 0 < value <= most:
        accepted = "a number above 0" + (f", at most {most}" if most == 1 else "")
        raise ConversionError(
            f"config.json: rope_parameters.{name} is {value!r}; accepted: {accepted}"
        )
    return value


def _refuse_rope(name: str, value, accepted) -> ConversionError:
    return ConversionError(
        f"config.json: rope_parameters.{name} is {value}, which Megatron-Core 0.19.2 cannot compute; "
        f"accepted: {accepted}"
    )


def _refuse(message: str) -> NoReturn:
    raise ConversionError(message)


def _derive(args: argparse.Namespace, dtype: torch.dtype, vocab_rows: int) -> None:
    """What Megatron's own validation fills in, for one rank."""
    args.params_dtype = dtype
    args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    args.padded_vocab_size = vocab_rows
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    args.moe_ffn_hidden_size = args.moe_ffn_hidden_size or args.ffn_hidden_size
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.seq_length = args.seq_length or args.max_position_embeddings
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or 1
    args.rank, args.world_size, args.data_parallel_size = 0, 1, 1
    args.iteration = 0
    args.consumed_train_samples = args.consumed_valid_samples = args.skipped_train_samples = 0
    args.moe_shared_expert_gate = args.scmoe_combine == "cg1"
    for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
        value = getattr(args, name)
        if isinstance(value, list) and len(value) == 1:
            setattr(args, name, value[0])
