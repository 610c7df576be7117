"""ScMoE's own Hugging Face format: ``config.json`` and names of tensors, both ways and exact.

Names and shapes of a folder's tensors are those of the modelling code (hf/modeling_scmoe.py), built
without memory. Every tensor of either side is used exactly once.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_scmoe.checkpoints import hf
from megatron_scmoe.checkpoints.formats.refusals import IN_NO_FORMAT, Refusal, one_of, refuse
from megatron_scmoe.checkpoints.formats.registry import Format, Tensors
from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import ScMoEForCausalLM
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, check_tensors, concatenate, stack
from megatron_scmoe.checkpoints.model_arguments import LLAMA3_ROPE, rope_flags
from megatron_scmoe.errors import ConversionError, in_words
from megatron_scmoe.validation.rules import moe_pattern

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
    config = _config(config)
    shapes = _shapes(config)
    rules = list(_rules(config))
    check_tensors(tensors, _megatron_shapes(rules, shapes))
    result: Tensors = {}
    for rule in rules:
        result.update(zip(rule.hf, rule.split(tensors[rule.megatron])))
    check_tensors(result, shapes)
    return result


def to_megatron(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Megatron's tensors from those of a folder."""
    config = _config(config)
    check_tensors(tensors, _shapes(config))
    return {
        rule.megatron: rule.join([tensors[name] for name in rule.hf]) for rule in _rules(config)
    }


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


@dataclass(frozen=True)
class _Rule:
    """One tensor of Megatron and the tensors of the folder it consists of."""

    megatron: str
    hf: list[str]
    split: Callable[[LazyTensor], list[LazyTensor]] = lambda tensor: [tensor]
    join: Callable[[list[LazyTensor]], LazyTensor] = lambda parts: parts[0]


def _shapes(config: ScMoEConfig) -> dict[str, torch.Size]:
    """Shapes of the folder's tensors by name, from the modelling code."""
    try:
        with torch.device("meta"):
            model = ScMoEForCausalLM(config)
    except RuntimeError as error:  # sizes that overflow
        raise ConversionError(
            f"config.json: no model has these sizes ({in_words(error)})"
        ) from error
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tensor.shape for name, tensor in state.items()}


def _megatron_shapes(rules: list[_Rule], shapes: dict[str, torch.Size]) -> dict[str, torch.Size]:
    def nothing(box):
        raise AssertionError("only shapes are wanted")

    return {
        rule.megatron: rule.join(
            [LazyTensor(shapes[name], torch.float32, nothing) for name in rule.hf]
        ).shape
        for rule in rules
    }


def _rules(config: ScMoEConfig) -> Iterator[_Rule]:
    yield _Rule("embedding.word_embeddings.weight", ["model.embed_tokens.weight"])
    if config.position_embedding == "learned_absolute":
        yield _Rule("embedding.position_embeddings.weight", ["model.embed_positions.weight"])
    for i, is_moe in enumerate(config.moe_layers):
        yield from _layer_rules(config, f"decoder.layers.{i}", f"model.layers.{i}", is_moe)
    yield from _norm_rules(config, "decoder.final_layernorm.", "model.norm.")
    if not config.tie_word_embeddings:
        yield _Rule("output_layer.weight", ["lm_head.weight"])


def _layer_rules(config: ScMoEConfig, m: str, h: str, is_moe: int) -> Iterator[_Rule]:
    attention = f"{m}.self_attention"
    yield from _norm_rules(config, f"{attention}.linear_qkv.layer_norm_", f"{h}.input_layernorm.")
    parts = [f"{h}.self_attn.{name}_proj" for name in "qkv"]
    for kind in _kinds(config.linear_bias or config.qkv_bias):
        yield _Rule(
            f"{attention}.linear_qkv.{kind}",
            [f"{part}.{kind}" for part in parts],
            functools.partial(_split_qkv, config),
            functools.partial(_join_qkv, config),
        )
    for kind in _kinds(config.linear_bias):
        yield _Rule(f"{attention}.linear_proj.{kind}", [f"{h}.self_attn.o_proj.{kind}"])
    if config.qk_norm:
        for name in "qk":
            yield from _norm_rules(
                config, f"{attention}.{name}_layernorm.", f"{h}.self_attn.{name}_norm."
            )
    if not is_moe:
        norm = f"{m}.mlp.linear_fc1.layer_norm_"
        yield from _norm_rules(config, norm, f"{h}.post_attention_layernorm.")
        yield from _mlp_rules(config, f"{m}.mlp", f"{h}.mlp", config.linear_bias)
        return
    if config.shared_expert_intermediate_size is not None:
        norm = f"{m}.pre_mlp_layernorm."
        yield from _norm_rules(config, norm, f"{h}.post_attention_layernorm.")
        yield from _mlp_rules(
            config, f"{m}.mlp.shared_experts", f"{h}.mlp.shared_expert", config.linear_bias
        )
    yield from _moe_rules(config, f"{m}.mlp", f"{h}.mlp")


def _moe_rules(config: ScMoEConfig, m: str, h: str) -> Iterator[_Rule]:
    for kind in _kinds(config.linear_bias):
        yield _Rule(f"{m}.router.{kind}", [f"{h}.router.{kind}"])
    if config.router_expert_bias:
        yield _Rule(f"{m}.router.expert_bias", [f"{h}.router.expert_bias"])
    if config.combine == "cg1":
        yield _Rule(f"{m}.shared_experts.gate_weight", [f"{h}.shared_expert_gate.weight"])
    elif config.combine == "cg2":
        yield _Rule(f"{m}.combine_gate.weight", [f"{h}.combine_gate.weight"])
    if config.router_norm == "own":
        yield from _norm_rules(config, f"{m}.shortcut_layernorm.", f"{h}.tap_norm.")
    if config.post_norm:
        yield from _norm_rules(config, f"{m}.post_layernorm.", f"{h}.post_norm.")
    experts = [f"{h}.experts.{i}" for i in range(config.num_experts)]
    inner = ["gate_proj", "up_proj"] if config.gated_mlp else ["up_proj"]
    for kind in _kinds(config.linear_bias):
        yield _Rule(
            f"{m}.experts.experts.linear_fc1.{kind}",
            [f"{expert}.{name}.{kind}" for expert in experts for name in inner],
            functools.partial(_split_experts, len(experts), len(inner)),
            functools.partial(_join_experts, len(inner)),
        )
        yield _Rule(
            f"{m}.experts.experts.linear_fc2.{kind}",
            [f"{expert}.down_proj.{kind}" for expert in experts],
            functools.partial(_split_experts, len(experts), 1),
            functools.partial(_join_experts, 1),
        )


def _mlp_rules(config: ScMoEConfig, m: str, h: str, bias: bool) -> Iterator[_Rule]:
    for kind in _kinds(bias):
        if config.gated_mlp:
            yield _Rule(
                f"{m}.linear_fc1.{kind}",
                [f"{h}.gate_proj.{kind}", f"{h}.up_proj.{kind}"],
                lambda tensor: tensor.chunk(2),
                concatenate,
            )
        else:
            yield _Rule(f"{m}.linear_fc1.{kind}", [f"{h}.up_proj.{kind}"])
        yield _Rule(f"{m}.linear_fc2.{kind}", [f"{h}.down_proj.{kind}"])


def _norm_rules(config: ScMoEConfig, m: str, h: str) -> Iterator[_Rule]:
    for kind in _kinds(config.norm_type == "LayerNorm"):
        yield _Rule(f"{m}{kind}", [f"{h}{kind}"])


def _kinds(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _split_qkv(config: ScMoEConfig, tensor: LazyTensor) -> list[LazyTensor]:
    """Megatron keeps a group's queries, its key and its value together."""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    queries = heads // groups
    rest = tensor.shape[1:]

    def part(start, count):
        def function(whole):
            grouped = whole.reshape(groups, queries + 2, size, *rest)
            return grouped[:, start : start + count].reshape(-1, *rest)

        return tensor.apply(function, (groups * count * size, *rest))

    return [part(0, queries), part(queries, 1), part(queries + 1, 1)]


def _join_qkv(config: ScMoEConfig, parts: list[LazyTensor]) -> LazyTensor:
    groups = config.num_key_value_heads
    grouped = [part.reshape(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
    rows = sum(part.shape[0] for part in parts)
    return concatenate(grouped, dim=1).reshape(rows, *parts[0].shape[1:])


def _split_experts(count: int, inner: int, tensor: LazyTensor) -> list[LazyTensor]:
    """A stack of experts into the parts of each."""
    return [part for i in range(count) for part in tensor.index(i).chunk(inner)]


def _join_experts(inner: int, parts: list[LazyTensor]) -> LazyTensor:
    return stack([concatenate(parts[i : i + inner]) for i in range(0, len(parts), inner)])
