"""GPT-2 as Megatron's dense GPT."""

from megatron_scmoe.checkpoints.formats.refusals import require
from megatron_scmoe.checkpoints.formats.registry import DenseFormat
from megatron_scmoe.checkpoints.parameter_mapping import ParamMapping, Row, Table
from megatron_scmoe.checkpoints.parameter_transforms import FUSED_QKV_TRANSPOSED, TRANSPOSED


def megatron_flags(config) -> list[str]:
    """The model's flags of the pretraining script, from transformers' configuration.

    Megatron's own gelu is the exact one, ``--openai-gelu`` the tanh of GPT-2.

    Raises:
        ConversionError: if Megatron cannot compute it; it names the field.
    """
    require(config, "activation_function", *_TANH_GELU, "gelu")
    require(config, "scale_attn_weights", True)
    require(config, "scale_attn_by_inverse_layer_idx", False)
    require(config, "add_cross_attention", False)
    positions = config.max_position_embeddings
    flags = [
        *("--num-layers", config.num_hidden_layers, "--hidden-size", config.hidden_size),
        *("--num-attention-heads", config.num_attention_heads),
        *("--seq-length", min(positions, 4096), "--max-position-embeddings", positions),
        *("--ffn-hidden-size", _ffn(config)),
        *("--normalization", "LayerNorm", "--norm-epsilon", config.layer_norm_epsilon),
        *("--attention-dropout", config.attn_pdrop, "--hidden-dropout", config.resid_pdrop),
        *("--position-embedding-type", "learned_absolute", "--no-bias-gelu-fusion"),
    ]
    if config.activation_function in _TANH_GELU:
        flags.append("--openai-gelu")
    return [str(flag) for flag in flags]


def mapping(config, is_tied: bool) -> ParamMapping:
    """The tensors of a model in both formats."""
    sizes = dict(
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        positions=config.max_position_embeddings,
        head=config.hidden_size // config.num_attention_heads,
        groups=config.num_attention_heads,
        qkv=3 * config.hidden_size,
        ffn=_ffn(config),
        biases=True,
        output_layer=not is_tied,
    )
    blocks = (_BLOCK.fill(sizes, block=i) for i in range(config.num_hidden_layers))
    return ParamMapping(_ENDS.fill(sizes), *blocks)


FORMAT = DenseFormat(
    prefix="transformer.", embedding="wte.weight", flags=megatron_flags, mapping=mapping
)

_ENDS = Table("", "", (
    Row("embedding.word_embeddings.weight", {"transformer.wte.weight": "vocab hidden"}),
    Row("output_layer.weight", {"lm_head.weight": "vocab hidden"}, when="output_layer"),
    Row("decoder.final_layernorm.*", {"transformer.ln_f.*": "hidden"}, bias="biases"),
    Row("embedding.position_embeddings.weight", {"transformer.wpe.weight": "positions hidden"}),
))  # fmt: skip

_BLOCK = Table("decoder.layers.{block}.", "transformer.h.{block}.", (
    Row("self_attention.linear_qkv.weight", {"attn.c_attn.weight": "hidden qkv"},
        FUSED_QKV_TRANSPOSED),
    Row("self_attention.linear_qkv.bias", {"attn.c_attn.bias": "qkv"}, FUSED_QKV_TRANSPOSED),
    Row("self_attention.linear_proj.weight", {"attn.c_proj.weight": "hidden hidden"}, TRANSPOSED),
    Row("self_attention.linear_proj.bias", {"attn.c_proj.bias": "hidden"}),
    Row("mlp.linear_fc1.weight", {"mlp.c_fc.weight": "hidden ffn"}, TRANSPOSED),
    Row("mlp.linear_fc1.bias", {"mlp.c_fc.bias": "ffn"}),
    Row("mlp.linear_fc2.weight", {"mlp.c_proj.weight": "ffn hidden"}, TRANSPOSED),
    Row("mlp.linear_fc2.bias", {"mlp.c_proj.bias": "hidden"}),
    Row("self_attention.linear_qkv.layer_norm_*", {"ln_1.*": "hidden"}, bias="biases"),
    Row("mlp.linear_fc1.layer_norm_*", {"ln_2.*": "hidden"}, bias="biases"),
))  # fmt: skip

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _ffn(config) -> int:
    return config.n_inner or 4 * config.hidden_size
