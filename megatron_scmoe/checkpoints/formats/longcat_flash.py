"""LongCat-Flash (``model_type: longcat_flash`` of transformers) and the Megatron model it is.

A layer of LongCat-Flash, with its two attentions and two dense MLPs, is a pair of Megatron blocks: the
second MLP is the shared expert, the experts tap the first MLP's norm (Pos-2, shared norm, direct add).

Tensors are only renamed, joined and split, so the way there and back is exact. Left out are those that
transformers' class holds or finds and does not use: the input projections of zero experts, which come
back as zeros, and multi-token prediction (``model.mtp.*``), which does not come back.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LongcatFlashConfig

from megatron_scmoe.checkpoints.formats.refusals import IN_NO_FORMAT, refuse
from megatron_scmoe.checkpoints.formats.registry import Format
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, Tensors
from megatron_scmoe.checkpoints.parameter_mapping import Param, ParamMapping, Row, Table
from megatron_scmoe.checkpoints.parameter_transforms import EXPERTS, FP32, GATE_UP, Sizes
from megatron_scmoe.errors import ConversionError

MODEL_TYPE = "longcat_flash"

LATENT_NORM_EPSILON = 1e-6
"""Of both norms within the attention, whatever ``rms_norm_eps`` says of the others."""

IGNORED = "model.mtp."
"""Tensors that transformers' class ignores too."""


@dataclass(frozen=True)
class LongCatShape:
    """The sizes that decide shapes of tensors, by the names of transformers' configuration."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    expert_ffn_hidden_size: int
    n_routed_experts: int
    zero_expert_num: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    router_bias: bool
    tie_word_embeddings: bool

    @staticmethod
    def of_config(config: Mapping[str, Any]) -> "LongCatShape":
        """The sizes in a ``config.json``.

        Raises:
            ConversionError: if a field is missing.
        """
        given = {**_OPTIONAL, **config}
        sizes = {}
        for name in LongCatShape.__dataclass_fields__:
            if name not in given or (given[name] is None and name not in _MAY_BE_NULL):
                raise ConversionError(f"config.json: no {name}")
            sizes[name] = given[name]
        sizes["zero_expert_num"] = sizes["zero_expert_num"] or 0
        return LongCatShape(**sizes)


def megatron_flags(config: Mapping[str, Any]) -> list[str]:
    """The flags of ``pretrain_gpt_scmoe.py`` that build the model of a ``config.json``.

    Raises:
        ConversionError: if the model cannot be what the configuration asks for; it names the field.
    """
    _refuse_other_models(config)
    shape = LongCatShape.of_config(config)
    flags = f"""
        --num-layers {2 * shape.num_layers} --moe-layer-freq [0,1]*{shape.num_layers}
        --hidden-size {shape.hidden_size} --num-attention-heads {shape.num_attention_heads}
        --ffn-hidden-size {shape.ffn_hidden_size}
        --moe-shared-expert-intermediate-size {shape.ffn_hidden_size}
        --swiglu --disable-bias-linear --normalization RMSNorm
        --norm-epsilon {config.get("rms_norm_eps", 1e-5)}
        --multi-latent-attention --qk-layernorm --kv-lora-rank {shape.kv_lora_rank}
        --qk-head-dim {shape.qk_nope_head_dim} --qk-pos-emb-head-dim {shape.qk_rope_head_dim}
        --v-head-dim {shape.v_head_dim}
        --scmoe-mla-scale --scmoe-mla-norm-epsilon {LATENT_NORM_EPSILON}
        --position-embedding-type rope --rope-type rope --no-rope-fusion
        --rotary-base {_rope_theta(config):.0f}
        --max-position-embeddings {config.get("max_position_embeddings", 131072)}
        --attention-dropout {config.get("attention_dropout", 0.0)} --hidden-dropout 0
        --init-method-std {config.get("initializer_range", 0.02)}
        --num-experts {shape.n_routed_experts} --scmoe-zero-experts {shape.zero_expert_num}
        --moe-ffn-hidden-size {shape.expert_ffn_hidden_size}
        --moe-router-topk {_required(config, "moe_topk")}
        --moe-router-score-function softmax --moe-router-pre-softmax --moe-router-dtype fp32
        --moe-router-topk-scaling-factor {config.get("routed_scaling_factor", 6.0)}
        --moe-router-load-balancing-type none --moe-aux-loss-coeff 0
        --moe-token-dispatcher-type alltoall
        --scmoe-tap pos2 --scmoe-combine add --scmoe-router-norm shared
        --scmoe-expert-bias proportional
    """.split()
    if shape.q_lora_rank is not None:
        flags += ["--q-lora-rank", str(shape.q_lora_rank)]
    if shape.router_bias:
        flags.append("--scmoe-router-bias")
    if not shape.tie_word_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    return flags


def longcat_config(args: argparse.Namespace, tokens: int, rows: int) -> dict[str, Any]:
    """The ``config.json`` of the model that Megatron's arguments describe.

    Args:
        args: the arguments in a checkpoint, of Megatron and ``scmoe_*``.
        tokens: how many tokens exist.
        rows: rows of the embedding that are written; more than the tokens with Megatron's padding.

    Raises:
        ConversionError: if the model is no LongCat-Flash; it names the flag.
    """
    refuse(args, MODEL_TYPE, IN_NO_FORMAT)
    for name, (expected, flag) in _FIXED_ARGUMENTS.items():
        if getattr(args, name, None) != expected:
            raise ConversionError(
                f"{flag} is {getattr(args, name, None)}: {MODEL_TYPE} has no other than {expected}"
            )
    layers = args.num_layers // 2
    if list(args.moe_layer_freq) != [0, 1] * layers:
        raise ConversionError(f"--moe-layer-freq is {args.moe_layer_freq}: not [0,1]*{layers}")
    if args.moe_shared_expert_intermediate_size != args.ffn_hidden_size:
        raise ConversionError(
            f"--moe-shared-expert-intermediate-size is {args.moe_shared_expert_intermediate_size}: "
            f"{MODEL_TYPE} has one size for both MLPs (--ffn-hidden-size {args.ffn_hidden_size})"
        )
    return {
        "architectures": ["LongcatFlashForCausalLM"],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": args.attention_dropout,
        "expert_ffn_hidden_size": args.moe_ffn_hidden_size,
        "ffn_hidden_size": args.ffn_hidden_size,
        "head_dim": args.qk_pos_emb_head_dim,
        "hidden_act": "silu",
        "hidden_size": args.hidden_size,
        "initializer_range": args.init_method_std,
        "kv_lora_rank": args.kv_lora_rank,
        "max_position_embeddings": args.max_position_embeddings,
        "moe_topk": args.moe_router_topk,
        "n_routed_experts": args.num_experts,
        "num_attention_heads": args.num_attention_heads,
        "num_key_value_heads": args.num_attention_heads,
        "num_layers": layers,
        "q_lora_rank": args.q_lora_rank,
        "qk_head_dim": args.qk_head_dim + args.qk_pos_emb_head_dim,
        "qk_nope_head_dim": args.qk_head_dim,
        "qk_rope_head_dim": args.qk_pos_emb_head_dim,
        "rms_norm_eps": args.layernorm_epsilon,
        "rope_parameters": {"rope_theta": float(args.rotary_base), "rope_type": "default"},
        "routed_scaling_factor": args.moe_router_topk_scaling_factor or 1.0,
        "router_bias": args.scmoe_router_bias,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
        "v_head_dim": args.v_head_dim,
        "vocab_size": rows,
        "zero_expert_num": args.scmoe_zero_experts,
        **({"unpadded_vocab_size": tokens} if tokens != rows else {}),
    }


def to_megatron(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of Megatron's model, from those of a LongCat-Flash folder."""
    unused = set(left_out(config, tensors))
    used = {name: tensor for name, tensor in tensors.items() if name not in unused}
    return mapping(LongCatShape.of_config(config)).to_megatron(used)


def left_out(config: Mapping[str, Any], tensors: Tensors) -> list[str]:
    """The tensors of a folder that transformers' class does not use, multi-token prediction first."""
    unused = dict(_unused(LongCatShape.of_config(config)))
    ignored = [name for name in tensors if name.startswith(IGNORED)]
    return ignored + [name for name in tensors if name in unused]


def to_longcat(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """The tensors of a LongCat-Flash folder, from those of Megatron's model.

    Biases that the model does without are zero.
    """
    shape = LongCatShape.of_config(config)
    params = mapping(shape)
    zeros = {
        name: LazyTensor.full(size, 0.0, torch.float32)
        for name, size in params.megatron_shapes.items()
        if name.endswith(_BIASES)
    }
    result = params.to_hf({**zeros, **tensors})
    dtype = result["model.embed_tokens.weight"].dtype
    return result | {k: LazyTensor.full(size, 0.0, dtype) for k, size in _unused(shape)}


FORMAT = Format(
    model_type=MODEL_TYPE,
    config_class=LongcatFlashConfig,
    config=longcat_config,
    to_hf=to_longcat,
    flags=megatron_flags,
    to_megatron=to_megatron,
    left_out=left_out,
)


_START = Table("", "", (
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"}),
))  # fmt: skip

_ATTENTION = Table("decoder.layers.{block}.", "model.layers.{layer}.", (
    Row("input_layernorm.weight", {"input_layernorm.{half}.weight": "hidden"}),
    Row("self_attention.linear_kv_down_proj.weight",
        {"self_attn.{half}.kv_a_proj_with_mqa.weight": "latent_and_rope hidden"}),
    Row("self_attention.linear_kv_up_proj.layer_norm_weight",
        {"self_attn.{half}.kv_a_layernorm.weight": "latent"}),
    Row("self_attention.linear_kv_up_proj.weight",
        {"self_attn.{half}.kv_b_proj.weight": "keys_and_values latent"}),
    Row("self_attention.linear_proj.weight", {"self_attn.{half}.o_proj.weight": "hidden values"}),
    Row("self_attention.linear_q_proj.weight", {"self_attn.{half}.q_proj.weight": "queries hidden"},
        when="not_compressed"),
    Row("self_attention.linear_q_down_proj.weight",
        {"self_attn.{half}.q_a_proj.weight": "q_latent hidden"}, when="q_latent"),
    Row("self_attention.linear_q_up_proj.layer_norm_weight",
        {"self_attn.{half}.q_a_layernorm.weight": "q_latent"}, when="q_latent"),
    Row("self_attention.linear_q_up_proj.weight",
        {"self_attn.{half}.q_b_proj.weight": "queries q_latent"}, when="q_latent"),
))  # fmt: skip

_DENSE = Table("decoder.layers.{block}.mlp.", "model.layers.{layer}.", (
    Row("linear_fc1.layer_norm_weight", {"post_attention_layernorm.0.weight": "hidden"}),
    Row("linear_fc2.weight", {"mlps.0.down_proj.weight": "hidden ffn"}),
    Row("linear_fc1.weight",
        {"mlps.0.gate_proj.weight": "ffn hidden", "mlps.0.up_proj.weight": "ffn hidden"}, GATE_UP),
))  # fmt: skip

_MOE = Table("decoder.layers.{block}.", "model.layers.{layer}.", (
    Row("pre_mlp_layernorm.weight", {"post_attention_layernorm.1.weight": "hidden"}),
    Row("mlp.shared_experts.linear_fc2.weight", {"mlps.1.down_proj.weight": "hidden ffn"}),
    Row("mlp.shared_experts.linear_fc1.weight",
        {"mlps.1.gate_proj.weight": "ffn hidden", "mlps.1.up_proj.weight": "ffn hidden"}, GATE_UP),
    Row("mlp.router.weight", {"mlp.router.classifier.weight": "choices hidden"}),
    Row("mlp.router.expert_bias", {"mlp.router.e_score_correction_bias": "choices"}, FP32),
    Row("mlp.router.classifier_bias", {"mlp.router.classifier.bias": "choices"}, FP32,
        when="router_bias"),
    Row("mlp.experts.experts.linear_fc1.weight",
        {"mlp.experts.{expert}.gate_proj.weight": "expert_ffn hidden",
         "mlp.experts.{expert}.up_proj.weight": "expert_ffn hidden"}, EXPERTS),
    Row("mlp.experts.experts.linear_fc2.weight",
        {"mlp.experts.{expert}.down_proj.weight": "hidden expert_ffn"}, EXPERTS),
))  # fmt: skip

_END = Table("", "", (
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}),
    Row("output_layer.weight", {"lm_head.weight": "vocab hidden"}, when="output_layer"),
))  # fmt: skip

_BIASES = (".router.expert_bias", ".router.classifier_bias")
"""What a model of Megatron may do without, and the format may not."""


def mapping(shape: LongCatShape) -> ParamMapping:
    """The tensors of a model in both formats, in the order of computation."""
    return ParamMapping(_params(shape))


def _params(shape: LongCatShape) -> Iterator[Param]:
    """Layer n is the blocks 2n, with a dense MLP, and 2n + 1, with the MoE."""
    sizes = _sizes(shape)
    yield from _START.fill(sizes)
    for layer in range(shape.num_layers):
        yield from _ATTENTION.fill(sizes, layer=layer, half=0, block=2 * layer)
        yield from _DENSE.fill(sizes, layer=layer, block=2 * layer)
        yield from _ATTENTION.fill(sizes, layer=layer, half=1, block=2 * layer + 1)
        yield from _MOE.fill(sizes, layer=layer, block=2 * layer + 1)
    yield from _END.fill(sizes)


def _sizes(shape: LongCatShape) -> Sizes:
    heads, nope, rope = shape.num_attention_heads, shape.qk_nope_head_dim, shape.qk_rope_head_dim
    return dict(
        vocab=shape.vocab_size,
        hidden=shape.hidden_size,
        latent=shape.kv_lora_rank,
        latent_and_rope=shape.kv_lora_rank + rope,
        keys_and_values=heads * (nope + shape.v_head_dim),
        values=heads * shape.v_head_dim,
        q_latent=shape.q_lora_rank or 0,
        not_compressed=shape.q_lora_rank is None,
        queries=heads * (nope + rope),
        ffn=shape.ffn_hidden_size,
        expert_ffn=shape.expert_ffn_hidden_size,
        experts=shape.n_routed_experts,
        choices=shape.n_routed_experts + shape.zero_expert_num,
        router_bias=shape.router_bias,
        output_layer=not shape.tie_word_embeddings,
    )


def _unused(shape: LongCatShape) -> Iterator[tuple[str, tuple[int, int]]]:
    """What transformers' class holds for zero experts, whose output it never computes."""
    first = shape.n_routed_experts
    for layer in range(shape.num_layers):
        for i in range(first, first + shape.zero_expert_num):
            for part in ("gate", "up"):
                name = f"model.layers.{layer}.mlp.experts.{i}.{part}_proj.weight"
                yield name, (shape.expert_ffn_hidden_size, shape.hidden_size)


_OPTIONAL = {"zero_expert_num": 0, "router_bias": False, "tie_word_embeddings": False}
_MAY_BE_NULL = ("q_lora_rank", *_OPTIONAL)

_FIXED_FIELDS: dict[str, tuple] = {
    "model_type": (MODEL_TYPE,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attention_method": ("MLA",),
    "mla_scale_q_lora": (True,),
    "mla_scale_kv_lora": (True,),
    "zero_expert_type": ("identity",),
    "norm_topk_prob": (False,),
    "rope_scaling": (None,),
}
"""Fields that may be left out, and what they may be if not."""


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    for name, accepted in _FIXED_FIELDS.items():
        if name in config and config[name] not in accepted:
            raise ConversionError(f"config.json: {name} is {config[name]}; accepted: {accepted[0]}")
    rope, nope = _required(config, "qk_rope_head_dim"), _required(config, "qk_nope_head_dim")
    heads = _required(config, "num_attention_heads")
    implied = {
        "head_dim": (rope, "qk_rope_head_dim"),
        "qk_head_dim": (nope + rope, "qk_nope_head_dim + qk_rope_head_dim"),
        "num_key_value_heads": (heads, "num_attention_heads"),
    }
    for name, (value, source) in implied.items():
        if config.get(name) not in (None, value):
            raise ConversionError(
                f"config.json: {name} is {config[name]}; accepted: {value} ({source})"
            )
    kind = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if kind != "default":
        raise ConversionError(
            f"config.json: rope_parameters has the rope_type {kind}; accepted: default"
        )
    if _required(config, "n_routed_experts") < 1:
        raise ConversionError("config.json: n_routed_experts is 0; accepted: 1 or more")


def _rope_theta(config: Mapping[str, Any]) -> float:
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta", 1e7))
    if theta != int(theta):
        raise ConversionError(f"config.json: rope_theta is {theta}; accepted: a whole number")
    return theta


def _required(config: Mapping[str, Any], name: str):
    if config.get(name) is None:
        raise ConversionError(f"config.json: no {name}")
    return config[name]


_FIXED_ARGUMENTS = {
    "multi_latent_attention": (True, "--multi-latent-attention"),
    "scmoe_tap": ("pos2", "--scmoe-tap"),
    "scmoe_combine": ("add", "--scmoe-combine"),
    "scmoe_router_norm": ("shared", "--scmoe-router-norm"),
    "scmoe_post_norm": (False, "--scmoe-post-norm"),
    "scmoe_mla_scale": (True, "--scmoe-mla-scale"),
    "scmoe_mla_norm_epsilon": (LATENT_NORM_EPSILON, "--scmoe-mla-norm-epsilon"),
    "qk_layernorm": (True, "--qk-layernorm"),
    "swiglu": (True, "--swiglu"),
    "add_bias_linear": (False, "--disable-bias-linear"),
    "normalization": ("RMSNorm", "--normalization"),
    "position_embedding_type": ("rope", "--position-embedding-type"),
    "rope_type": ("rope", "--rope-type"),
    "rotary_percent": (1.0, "--rotary-percent"),
    "moe_router_score_function": ("softmax", "--moe-router-score-function"),
    "moe_router_pre_softmax": (True, "--moe-router-pre-softmax"),
    "layernorm_zero_centered_gamma": (False, "--apply-layernorm-1p"),
    "use_rope_scaling": (False, "--use-rope-scaling"),
    "rotary_seq_len_interpolation_factor": (None, "--rotary-seq-len-interpolation-factor"),
    "moe_router_num_groups": (None, "--moe-router-num-groups"),
    "moe_router_enable_expert_bias": (False, "--moe-router-enable-expert-bias"),
    "moe_router_dtype": ("fp32", "--moe-router-dtype"),
}
