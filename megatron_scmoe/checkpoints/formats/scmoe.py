"""ScMoE's own Hugging Face format: ``config.json`` and names of tensors, both ways and exact.

Names and shapes of a folder's tensors are those of the modelling code (hf/modeling_scmoe.py).
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_scmoe.checkpoints import hf
from megatron_scmoe.checkpoints.formats.refusals import IN_NO_FORMAT, Refusal, one_of, refuse
from megatron_scmoe.checkpoints.formats.registry import Format
from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import ScMoEForCausalLM
from megatron_scmoe.checkpoints.lazy_tensor import Tensors
from megatron_scmoe.checkpoints.model_arguments import LLAMA3_ROPE, rope_flags
from megatron_scmoe.checkpoints.parameter_mapping import Param, ParamMapping, Row, Table
from megatron_scmoe.checkpoints.parameter_transforms import EXPERTS, GATE_UP, QKV, Sizes
from megatron_scmoe.config import moe_pattern
from megatron_scmoe.errors import ConversionError, in_words

MODEL_TYPE = ScMoEConfig.model_type


def config_from_arguments(args: argparse.Namespace, tokens: int, rows: int) -> dict[str, Any]:
    """``config.json`` of the model that Megatron's arguments describe.

    Args:
        args: the arguments in a checkpoint.
        tokens: how many tokens exist.
        rows: rows of the embedding that are written; more than the tokens with Megatron's padding.

    Raises:
        ConversionError: if the modelling code cannot express it; it names the flag.
    """
    refuse(args, MODEL_TYPE, (*IN_NO_FORMAT, *_REFUSED))
    if not hasattr(args, "scmoe_tap"):
        raise ConversionError("no --scmoe-tap in the checkpoint's arguments: it is no ScMoE model")
    try:
        return _config_from_arguments(args, tokens, rows)
    except ConversionError:
        raise
    except AttributeError as error:
        raise ConversionError(f"the checkpoint's arguments have no {error.name}") from error
    except ValueError as error:
        raise ConversionError(f"the checkpoint's arguments: {error}") from error


def flags_from_config(config: Mapping[str, Any]) -> list[str]:
    """The flags of ``pretrain_gpt_scmoe.py`` that build the model of a ``config.json``.

    Raises:
        ConversionError: if Megatron cannot express it; it names the field.
    """
    c = _config(config)
    flags = f"""
        --num-layers {c.num_hidden_layers} --hidden-size {c.hidden_size}
        --ffn-hidden-size {c.intermediate_size} --num-attention-heads {c.num_attention_heads}
        --kv-channels {c.head_dim} --max-position-embeddings {c.max_position_embeddings}
        --position-embedding-type {c.position_embedding}
        --normalization {c.norm_type} --norm-epsilon {c.norm_eps!r}
        --attention-dropout {c.attention_dropout!r} --hidden-dropout {c.hidden_dropout!r}
        --init-method-std {c.initializer_range!r}
        --num-experts {c.num_experts} --moe-ffn-hidden-size {c.moe_intermediate_size}
        --moe-router-topk {c.num_experts_per_tok}
        --moe-router-score-function {c.router_score_function}
        --moe-token-dispatcher-type alltoall
        --scmoe-tap {c.tap} --scmoe-combine {c.combine} --scmoe-router-norm {c.router_norm}
    """.split()
    if c.num_key_value_heads != c.num_attention_heads:
        flags += ["--group-query-attention", "--num-query-groups", str(c.num_key_value_heads)]
    every = all(c.moe_layers)
    flags += ["--moe-layer-freq", "1" if every else f"[0,1]*{c.num_hidden_layers // 2}"]
    flags += _activation_flags(c)
    flags += rope_flags(c.rope_parameters) if c.position_embedding == "rope" else []
    for flag, value in (
        ("--moe-shared-expert-intermediate-size", c.shared_expert_intermediate_size),
        ("--moe-router-topk-scaling-factor", c.router_scaling_factor),
        ("--moe-router-num-groups", c.router_num_groups),
        ("--moe-router-group-topk", c.router_group_topk),
        ("--moe-router-dtype", _flag_of(_ROUTER_DTYPES, "router_dtype", c.router_dtype)),
        ("--moe-aux-loss-coeff", c.router_aux_loss_coef),
    ):
        flags += [] if value is None else [flag, str(value)]
    for flag, is_given in (
        ("--disable-bias-linear", not c.linear_bias),
        ("--add-qkv-bias", c.qkv_bias),
        ("--qk-layernorm", c.qk_norm),
        ("--apply-layernorm-1p", c.norm_zero_centered),
        ("--untie-embeddings-and-output-weights", not c.tie_word_embeddings),
        ("--scmoe-post-norm", c.post_norm),
        ("--moe-router-pre-softmax", c.router_pre_softmax),
        ("--moe-router-enable-expert-bias", c.router_expert_bias),
    ):
        flags += [flag] if is_given else []
    if c.attention_scale is not None:
        raise ConversionError(f"attention_scale {c.attention_scale}: Megatron has no flag for it")
    return flags


def to_hf(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of a folder from Megatron's."""
    return mapping(_config(config)).to_hf(tensors)


def to_megatron(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Megatron's tensors from those of a folder."""
    return mapping(_config(config)).to_megatron(tensors)


_FOLDER = Path(hf.__file__).parent

FORMAT = Format(
    model_type=MODEL_TYPE,
    config_class=ScMoEConfig,
    config=config_from_arguments,
    to_hf=to_hf,
    flags=flags_from_config,
    to_megatron=to_megatron,
    code=(_FOLDER / "configuration_scmoe.py", _FOLDER / "modeling_scmoe.py"),
)


# --- arguments ------------------------------------------------------------------------------------


_REFUSED: tuple[Refusal, ...] = (
    ("multi_latent_attention", "--multi-latent-attention", one_of(None, False)),
    (
        "position_embedding_type",
        "--position-embedding-type",
        one_of("rope", "learned_absolute", "none"),
    ),
    ("moe_router_score_function", "--moe-router-score-function", one_of("softmax", "sigmoid")),
    ("scmoe_zero_experts", "--scmoe-zero-experts", one_of(None, 0)),
    ("scmoe_expert_bias", "--scmoe-expert-bias", one_of(None, "none")),
    ("scmoe_router_bias", "--scmoe-router-bias", one_of(None, False)),
)
"""What the modelling code has not beside what no format has."""

_ROUTER_DTYPES = {None: None, "fp32": "float32", "fp64": "float64"}


def _config_from_arguments(args: argparse.Namespace, tokens: int, rows: int) -> dict[str, Any]:
    act, gated = _activation(args)
    layers = args.num_layers
    return ScMoEConfig(
        architectures=[ScMoEForCausalLM.__name__],
        vocab_size=rows,
        unpadded_vocab_size=tokens if tokens != rows else None,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        moe_intermediate_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        shared_expert_intermediate_size=args.moe_shared_expert_intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups
        if args.group_query_attention
        else args.num_attention_heads,
        head_dim=args.kv_channels,
        max_position_embeddings=args.max_position_embeddings,
        moe_layers=moe_pattern(args.moe_layer_freq, layers),
        num_experts=args.num_experts,
        num_experts_per_tok=args.moe_router_topk,
        tap=args.scmoe_tap,
        combine=args.scmoe_combine,
        router_norm=args.scmoe_router_norm,
        post_norm=args.scmoe_post_norm,
        router_score_function=args.moe_router_score_function,
        router_pre_softmax=args.moe_router_pre_softmax,
        router_expert_bias=args.moe_router_enable_expert_bias,
        router_scaling_factor=args.moe_router_topk_scaling_factor,
        router_num_groups=args.moe_router_num_groups,
        router_group_topk=args.moe_router_group_topk,
        router_dtype=_ROUTER_DTYPES[args.moe_router_dtype],
        hidden_act=act,
        gated_mlp=gated,
        norm_type=args.normalization,
        norm_eps=args.layernorm_epsilon,
        norm_zero_centered=args.layernorm_zero_centered_gamma,
        linear_bias=args.add_bias_linear,
        qkv_bias=args.add_qkv_bias,
        qk_norm=args.qk_layernorm,
        position_embedding=args.position_embedding_type,
        rope_parameters=_rope_parameters(args),
        attention_dropout=args.attention_dropout,
        hidden_dropout=args.hidden_dropout,
        initializer_range=args.init_method_std,
        router_aux_loss_coef=_aux_loss_coefficient(args),
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
    ).to_dict()


def _aux_loss_coefficient(args: argparse.Namespace) -> float:
    """Of Megatron's auxiliary losses the one that the model in transformers has, ``aux_loss``."""
    kinds = getattr(args, "moe_router_load_balancing_type", "aux_loss")
    coefficients = getattr(args, "moe_aux_loss_coeff", 0.0)
    if not isinstance(kinds, list):
        kinds, coefficients = [kinds], [coefficients]
    return float(dict(zip(kinds, coefficients)).get("aux_loss", 0.0))


def _activation(args: argparse.Namespace) -> tuple[str, bool]:
    """Transformers' name of the activation, and whether MLPs are gated."""
    if args.swiglu:
        return "silu", True
    if args.squared_relu:
        return "relu2", False
    if args.quick_geglu:
        return "quick_gelu", True
    if args.openai_gelu or (args.bias_gelu_fusion and args.add_bias_linear):
        return "gelu_pytorch_tanh", False  # which the fused kernel computes, too
    return "gelu", False


_ACTIVATION_FLAGS = {
    ("silu", True): ["--swiglu"],
    ("relu2", False): ["--squared-relu"],
    ("quick_gelu", True): ["--quick-geglu"],
    ("gelu_pytorch_tanh", False): ["--openai-gelu", "--no-bias-gelu-fusion"],
    ("gelu", False): ["--no-bias-gelu-fusion"],
}


def _activation_flags(c: ScMoEConfig) -> list[str]:
    key = (c.hidden_act, c.gated_mlp)
    if key not in _ACTIVATION_FLAGS:
        raise ConversionError(
            f"hidden_act {c.hidden_act} with gated_mlp {c.gated_mlp}: Megatron has no flag for it"
        )
    return _ACTIVATION_FLAGS[key]


def _rope_parameters(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.position_embedding_type != "rope":
        return None
    parameters = {"rope_type": "default", "rope_theta": float(args.rotary_base)}
    if args.rotary_percent != 1.0:
        parameters["partial_rotary_factor"] = args.rotary_percent
    factor = args.rotary_seq_len_interpolation_factor
    if args.use_rope_scaling:
        if factor is not None:
            raise ConversionError(
                f"--rotary-seq-len-interpolation-factor {factor} with --use-rope-scaling: "
                f"the {MODEL_TYPE} model in transformers has one of them"
            )
        parameters |= {"rope_type": "llama3", "factor": args.rope_scaling_factor, **LLAMA3_ROPE}
    elif factor is not None:
        parameters |= {"rope_type": "linear", "factor": float(factor)}
    return parameters


def _flag_of(names: Mapping[str | None, Any], field: str, value) -> str | None:
    for flag, name in names.items():
        if name == value:
            return flag
    raise ConversionError(f"{field} {value}: accepted: {', '.join(map(str, names.values()))}")


def _config(config: Mapping[str, Any]) -> ScMoEConfig:
    try:
        return ScMoEConfig.from_dict(dict(config))
    except Exception as error:  # transformers' part of it raises what it likes
        raise ConversionError(f"config.json: {in_words(error)}") from error


# --- tensors --------------------------------------------------------------------------------------


_START = Table("embedding.", "model.", (
    Row("word_embeddings.weight", {"embed_tokens.weight": "vocab hidden"}),
    Row("position_embeddings.weight", {"embed_positions.weight": "positions hidden"},
        when="positions"),
))  # fmt: skip

_ATTENTION = Table("decoder.layers.{block}.", "model.layers.{block}.", (
    Row("self_attention.linear_qkv.layer_norm_*", {"input_layernorm.*": "hidden"}, bias="layer_norm"),
    Row("self_attention.linear_qkv.*",
        {"self_attn.q_proj.*": "queries hidden",
         "self_attn.k_proj.*": "keys hidden",
         "self_attn.v_proj.*": "keys hidden"}, QKV, bias="qkv_biases"),
    Row("self_attention.linear_proj.*", {"self_attn.o_proj.*": "hidden queries"}, bias="biases"),
    Row("self_attention.q_layernorm.*", {"self_attn.q_norm.*": "head"}, when="qk_norm",
        bias="layer_norm"),
    Row("self_attention.k_layernorm.*", {"self_attn.k_norm.*": "head"}, when="qk_norm",
        bias="layer_norm"),
))  # fmt: skip

_DENSE = Table("decoder.layers.{block}.", "model.layers.{block}.", (
    Row("mlp.linear_fc1.layer_norm_*", {"post_attention_layernorm.*": "hidden"}, bias="layer_norm"),
    Row("mlp.linear_fc1.*", {"mlp.gate_proj.*": "ffn hidden", "mlp.up_proj.*": "ffn hidden"},
        GATE_UP, when="gated", bias="biases"),
    Row("mlp.linear_fc1.*", {"mlp.up_proj.*": "ffn hidden"}, when="not_gated", bias="biases"),
    Row("mlp.linear_fc2.*", {"mlp.down_proj.*": "hidden ffn"}, bias="biases"),
))  # fmt: skip

_SHARED_EXPERT = Table("decoder.layers.{block}.", "model.layers.{block}.", (
    Row("pre_mlp_layernorm.*", {"post_attention_layernorm.*": "hidden"}, bias="layer_norm"),
    Row("mlp.shared_experts.linear_fc1.*",
        {"mlp.shared_expert.gate_proj.*": "shared_ffn hidden",
         "mlp.shared_expert.up_proj.*": "shared_ffn hidden"}, GATE_UP, when="gated", bias="biases"),
    Row("mlp.shared_experts.linear_fc1.*", {"mlp.shared_expert.up_proj.*": "shared_ffn hidden"},
        when="not_gated", bias="biases"),
    Row("mlp.shared_experts.linear_fc2.*", {"mlp.shared_expert.down_proj.*": "hidden shared_ffn"},
        bias="biases"),
))  # fmt: skip

_MOE = Table("decoder.layers.{block}.mlp.", "model.layers.{block}.mlp.", (
    Row("router.*", {"router.*": "experts hidden"}, bias="biases"),
    Row("router.expert_bias", {"router.expert_bias": "experts"}, when="expert_bias"),
    Row("shared_experts.gate_weight", {"shared_expert_gate.weight": "1 hidden"}, when="cg1"),
    Row("combine_gate.weight", {"combine_gate.weight": "2 hidden"}, when="cg2"),
    Row("shortcut_layernorm.*", {"tap_norm.*": "hidden"}, when="own_norm", bias="layer_norm"),
    Row("post_layernorm.*", {"post_norm.*": "hidden"}, when="post_norm", bias="layer_norm"),
    Row("experts.experts.linear_fc1.*",
        {"experts.{expert}.gate_proj.*": "expert_ffn hidden",
         "experts.{expert}.up_proj.*": "expert_ffn hidden"}, EXPERTS, when="gated", bias="biases"),
    Row("experts.experts.linear_fc1.*", {"experts.{expert}.up_proj.*": "expert_ffn hidden"}, EXPERTS,
        when="not_gated", bias="biases"),
    Row("experts.experts.linear_fc2.*", {"experts.{expert}.down_proj.*": "hidden expert_ffn"},
        EXPERTS, bias="biases"),
))  # fmt: skip

_END = Table("", "", (
    Row("decoder.final_layernorm.*", {"model.norm.*": "hidden"}, bias="layer_norm"),
    Row("output_layer.weight", {"lm_head.weight": "vocab hidden"}, when="output_layer"),
))  # fmt: skip


def mapping(c: ScMoEConfig) -> ParamMapping:
    """The tensors of a model in both formats, in the order of computation."""
    return ParamMapping(_params(c))


def _params(c: ScMoEConfig) -> Iterator[Param]:
    sizes = _sizes(c)
    yield from _START.fill(sizes)
    for block, is_moe in enumerate(c.moe_layers):
        yield from _ATTENTION.fill(sizes, block=block)
        if not is_moe:
            yield from _DENSE.fill(sizes, block=block)
            continue
        if c.shared_expert_intermediate_size is not None:
            yield from _SHARED_EXPERT.fill(sizes, block=block)
        yield from _MOE.fill(sizes, block=block)
    yield from _END.fill(sizes)


def _sizes(c: ScMoEConfig) -> Sizes:
    return dict(
        vocab=c.vocab_size,
        hidden=c.hidden_size,
        positions=c.max_position_embeddings if c.position_embedding == "learned_absolute" else 0,
        head=c.head_dim,
        groups=c.num_key_value_heads,
        queries=c.num_attention_heads * c.head_dim,
        keys=c.num_key_value_heads * c.head_dim,
        ffn=c.intermediate_size,
        shared_ffn=c.shared_expert_intermediate_size or 0,
        expert_ffn=c.moe_intermediate_size,
        experts=c.num_experts,
        layer_norm=c.norm_type == "LayerNorm",
        biases=c.linear_bias,
        qkv_biases=c.linear_bias or c.qkv_bias,
        qk_norm=c.qk_norm,
        gated=c.gated_mlp,
        not_gated=not c.gated_mlp,
        expert_bias=c.router_expert_bias,
        cg1=c.combine == "cg1",
        cg2=c.combine == "cg2",
        own_norm=c.router_norm == "own",
        post_norm=c.post_norm,
        output_layer=not c.tie_word_embeddings,
    )
