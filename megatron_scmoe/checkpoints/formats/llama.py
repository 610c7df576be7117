"""Llama, Mistral, Qwen2 and Qwen3 as Megatron's dense GPT."""

from megatron_scmoe.checkpoints.formats.refusals import refusal_of_field, require
from megatron_scmoe.checkpoints.formats.registry import DenseFormat
from megatron_scmoe.checkpoints.model_arguments import rope_flags
from megatron_scmoe.checkpoints.parameter_mapping import ParamMapping, Row, Table
from megatron_scmoe.checkpoints.parameter_transforms import GATE_UP, QKV


def megatron_flags(config) -> list[str]:
    """The model's flags of the pretraining script, from transformers' configuration.

    Raises:
        ConversionError: if Megatron cannot compute it; it names the field.
    """
    require(config, "hidden_act", "silu")
    require(config, "attention_bias", False)
    require(config, "mlp_bias", False)
    partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise refusal_of_field(config, "rope_parameters.partial_rotary_factor", partial, 1.0)
    positions = config.max_position_embeddings
    flags = [
        *("--num-layers", config.num_hidden_layers, "--hidden-size", config.hidden_size),
        *("--num-attention-heads", config.num_attention_heads),
        *("--seq-length", min(positions, 4096), "--max-position-embeddings", positions),
        *("--ffn-hidden-size", config.intermediate_size),
        *("--group-query-attention", "--num-query-groups", config.num_key_value_heads),
        *("--kv-channels", _head_dim(config)),
        *("--normalization", "RMSNorm", "--norm-epsilon", config.rms_norm_eps),
        *("--swiglu", "--disable-bias-linear"),
        *("--attention-dropout", config.attention_dropout, "--hidden-dropout", 0.0),
        *("--position-embedding-type", "rope"),
        *rope_flags(config.rope_parameters),
        *_window_flags(config),
    ]
    if config.model_type == "qwen2":
        flags.append("--add-qkv-bias")
    if config.model_type == "qwen3":
        flags.append("--qk-layernorm")
    return [str(flag) for flag in flags]


def mapping(config, is_tied: bool) -> ParamMapping:
    """The tensors of a model in both formats."""
    head = _head_dim(config)
    sizes = dict(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        head=head,
        groups=config.num_key_value_heads,
        queries=config.num_attention_heads * head,
        keys=config.num_key_value_heads * head,
        ffn=config.intermediate_size,
        qkv_biases=config.model_type == "qwen2",
        qk_norm=config.model_type == "qwen3",
        output_layer=not is_tied,
    )
    blocks = (_BLOCK.fill(sizes, block=i) for i in range(config.num_hidden_layers))
    return ParamMapping(_ENDS.fill(sizes), *blocks)


FORMAT = DenseFormat(
    prefix="model.", embedding="embed_tokens.weight", flags=megatron_flags, mapping=mapping
)

_ENDS = Table("", "", (
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"}),
    Row("output_layer.weight", {"lm_head.weight": "vocab hidden"}, when="output_layer"),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}),
))  # fmt: skip

_BLOCK = Table("decoder.layers.{block}.", "model.layers.{block}.", (
    Row("self_attention.linear_qkv.layer_norm_weight", {"input_layernorm.weight": "hidden"}),
    Row("self_attention.linear_qkv.*",
        {"self_attn.q_proj.*": "queries hidden",
         "self_attn.k_proj.*": "keys hidden",
         "self_attn.v_proj.*": "keys hidden"}, QKV, bias="qkv_biases"),
    Row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden queries"}),
    Row("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "head"}, when="qk_norm"),
    Row("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "head"}, when="qk_norm"),
    Row("mlp.linear_fc1.layer_norm_weight", {"post_attention_layernorm.weight": "hidden"}),
    Row("mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"}, GATE_UP),
    Row("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}),
))  # fmt: skip


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _window_flags(config) -> list[str]:
    """Sliding-window attention: Megatron counts the keys before a query, transformers it as well."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "llama":  # whose attention reads no such field, even if it is there
        window = None
    if window is None or window >= config.max_position_embeddings:
        return []
    flags = ["--window-size", f"({window - 1},0)"]
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        windowed = [int(kind == "sliding_attention") for kind in kinds]
        if not any(windowed):
            return []
        flags += ["--window-attn-skip-freq", str(windowed).replace(" ", "")]
    return flags
