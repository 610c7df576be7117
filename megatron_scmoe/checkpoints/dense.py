"""Dense Hugging Face models as Megatron's GPT: settings as flags, weights by Megatron's names.

Families: Llama, Mistral, Qwen2, Qwen3 and GPT-2. What Megatron-Core 0.19.2 cannot compute as
transformers does is refused with the name of the field in config.json.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_scmoe.checkpoints.arguments import DTYPES, rope_flags
from megatron_scmoe.checkpoints.safetensors_folder import read_config
from megatron_scmoe.checkpoints.store import (
    ConversionError,
    LazyTensor,
    check_weights,
    concatenate,
    naming,
    read_safetensors,
)
from megatron_scmoe.checkpoints.tokenizers import tokenizer_flags

VOCAB_MULTIPLE = 128
"""Megatron's default of --make-vocab-size-divisible-by."""


@dataclass(frozen=True)
class DenseModel:
    """A dense GPT in Megatron's terms.

    ``flags`` are the model's flags of the pretraining script, but for ``dtype``; ``tensors`` its
    weights by the keys of a checkpoint, one key a layer; ``vocab_rows`` counts the embedding's rows,
    padding included.
    """

    flags: list[str]
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype
    vocab_rows: int


def read_hugging_face(folder: str | os.PathLike, dtype: torch.dtype | None = None) -> DenseModel:
    """A dense model from a Hugging Face folder with safetensors files.

    Args:
        dtype: of the weights; None for that of the embeddings in the files.

    Raises:
        ConversionError: for another architecture or a setting that Megatron does not have, and for
            tensors that are missing, left over or of another shape than config.json says.
    """
    folder = Path(folder)
    config = _read_config(folder)
    flags, take_model = _FAMILIES[config.model_type]
    weights = _Weights(folder, config, dtype)
    setting_flags = flags(config)  # settings are judged before weights
    tensors = take_model(weights, config)
    weights.check_left_over()
    size = config.vocab_size
    rows = padded_vocab_size(size)
    return DenseModel(
        [
            *setting_flags,
            *tokenizer_flags(folder, size, size, sentencepiece_first=False),
            *("--vocab-size", str(size), "--padded-vocab-size", str(rows)),
        ],
        tensors,
        weights.dtype,
        rows,
    )


def _read_config(folder: Path):
    """config.json as transformers understands it, whatever version wrote it; runs no code of it."""
    file = folder / "config.json"
    kind = read_config(folder).get("model_type")
    if kind not in _FAMILIES:
        raise ConversionError(
            f"{file}: model_type is {kind}; accepted: {', '.join(sorted(_FAMILIES))}"
        )
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # its checks raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(f"{file}: transformers refuses it ({reason})") from error


class _Weights:
    """The tensors of a folder, each taken once, by name and shape."""

    def __init__(self, folder: Path, config, dtype: torch.dtype | None):
        self.folder = folder
        self.prefix = {"gpt2": "transformer."}.get(config.model_type, "model.")
        self.left = {}
        for name, tensor in read_safetensors(folder).items():
            if name != "lm_head.weight" and not name.startswith(self.prefix):
                name = self.prefix + name  # files of a model without its head
            if not name.endswith(_BUFFERS):
                self.left[name] = tensor
        with naming(folder):
            check_weights(self.left)
        self.dtype = dtype or self._dtype_of_embedding()
        self.given: dict[str, LazyTensor] = {}

    def take(self, name: str, *shape: int) -> LazyTensor:
        """The tensor ``name``, without the prefix; of the given shape."""
        return self._pop(self.prefix + name, shape)

    def take_head(self, embedding: LazyTensor, is_tied: bool) -> LazyTensor | None:
        """The output layer; None if it is tied to the embedding (a copy in the files is dropped)."""
        if is_tied:
            self.left.pop("lm_head.weight", None)
            return None
        return self._pop("lm_head.weight", tuple(embedding.shape))

    def check_left_over(self) -> None:
        """Refuse tensors that no part of the model has taken."""
        if self.left:
            names = sorted(self.left)
            raise ConversionError(
                f"{self.folder}: the tensor {names[0]} has no place in the model "
                f"({len(names)} left over)"
            )

    def _pop(self, name: str, shape: tuple[int, ...]) -> LazyTensor:
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise ConversionError(f"{self.folder}: there is no tensor {name}")
        if tuple(tensor.shape) != shape:
            raise ConversionError(
                f"{self.folder}: the tensor {name} has the shape {list(tensor.shape)}, and "
                f"{list(shape)} by config.json"
            )
        return tensor.cast(self.dtype)

    def _dtype_of_embedding(self) -> torch.dtype:
        for name in ("embed_tokens.weight", "wte.weight"):
            if self.prefix + name in self.left:
                dtype = self.left[self.prefix + name].dtype
                if dtype in DTYPES.values():
                    return dtype
                raise ConversionError(f"{self.folder}: {name} is {dtype}; accepted: with --dtype")
        raise ConversionError(f"{self.folder}: there is no tensor {self.prefix}embed_tokens.weight")


_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""What older files hold beside weights."""


def _llama_flags(config) -> list[str]:
    """Flags of Llama, Mistral, Qwen2 and Qwen3."""
    _require(config, "hidden_act", "silu")
    _require(config, "attention_bias", False)
    _require(config, "mlp_bias", False)
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        partial = config.rope_parameters["partial_rotary_factor"]
        raise _refusal(config, "rope_parameters.partial_rotary_factor", partial, 1.0)
    flags = [
        *_common_flags(config),
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


def _take_llama(weights: _Weights, config) -> dict[str, LazyTensor]:
    hidden, ffn, head = config.hidden_size, config.intermediate_size, _head_dim(config)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    tensors = _take_ends(weights, config, "embed_tokens.weight", {"norm.weight": "weight"})
    for i in range(config.num_hidden_layers):
        layer, target = f"layers.{i}.", f"decoder.layers.{i}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        sizes = {"q": heads * head, "k": groups * head, "v": groups * head}

        def qkv(kind, *shape, attention=attention, sizes=sizes):
            parts = [
                weights.take(f"{attention}{n}_proj.{kind}", r, *shape) for n, r in sizes.items()
            ]
            return interleave_qkv(*parts, groups)

        tensors |= {
            f"{target}self_attention.linear_qkv.layer_norm_weight": weights.take(
                f"{layer}input_layernorm.weight", hidden
            ),
            f"{target}self_attention.linear_qkv.weight": qkv("weight", hidden),
            f"{target}self_attention.linear_proj.weight": weights.take(
                f"{attention}o_proj.weight", hidden, heads * head
            ),
            f"{target}mlp.linear_fc1.layer_norm_weight": weights.take(
                f"{layer}post_attention_layernorm.weight", hidden
            ),
            f"{target}mlp.linear_fc1.weight": concatenate(
                [weights.take(f"{mlp}{name}_proj.weight", ffn, hidden) for name in ("gate", "up")]
            ),
            f"{target}mlp.linear_fc2.weight": weights.take(f"{mlp}down_proj.weight", hidden, ffn),
        }
        if config.model_type == "qwen2":
            tensors[f"{target}self_attention.linear_qkv.bias"] = qkv("bias")
        if config.model_type == "qwen3":
            for name in ("q", "k"):
                tensors[f"{target}self_attention.{name}_layernorm.weight"] = weights.take(
                    f"{attention}{name}_norm.weight", head
                )
    return tensors


def _gpt2_flags(config) -> list[str]:
    """Flags of GPT-2; Megatron's own gelu is the exact one, --openai-gelu the tanh of GPT-2."""
    _require(config, "activation_function", *_TANH_GELU, "gelu")
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    _require(config, "add_cross_attention", False)
    flags = [
        *_common_flags(config),
        *("--ffn-hidden-size", _gpt2_ffn(config)),
        *("--normalization", "LayerNorm", "--norm-epsilon", config.layer_norm_epsilon),
        *("--attention-dropout", config.attn_pdrop, "--hidden-dropout", config.resid_pdrop),
        *("--position-embedding-type", "learned_absolute", "--no-bias-gelu-fusion"),
    ]
    if config.activation_function in _TANH_GELU:
        flags.append("--openai-gelu")
    return [str(flag) for flag in flags]


_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _take_gpt2(weights: _Weights, config) -> dict[str, LazyTensor]:
    hidden, ffn, heads = config.hidden_size, _gpt2_ffn(config), config.num_attention_heads
    final = {"ln_f.weight": "weight", "ln_f.bias": "bias"}
    tensors = _take_ends(weights, config, "wte.weight", final)
    tensors["embedding.position_embeddings.weight"] = weights.take(
        "wpe.weight", config.max_position_embeddings, hidden
    )
    for i in range(config.num_hidden_layers):
        layer, target = f"h.{i}.", f"decoder.layers.{i}."
        # Conv1D stores [in, out].
        for name, key, columns, rows in (
            ("attn.c_attn", "self_attention.linear_qkv", 3 * hidden, hidden),
            ("attn.c_proj", "self_attention.linear_proj", hidden, hidden),
            ("mlp.c_fc", "mlp.linear_fc1", ffn, hidden),
            ("mlp.c_proj", "mlp.linear_fc2", hidden, ffn),
        ):
            weight = weights.take(f"{layer}{name}.weight", rows, columns).transpose()
            bias = weights.take(f"{layer}{name}.bias", columns)
            if name == "attn.c_attn":
                weight, bias = (interleave_qkv(*part.chunk(3), heads) for part in (weight, bias))
            tensors[f"{target}{key}.weight"], tensors[f"{target}{key}.bias"] = weight, bias
        for norm, key in (("ln_1", "self_attention.linear_qkv"), ("ln_2", "mlp.linear_fc1")):
            for kind in ("weight", "bias"):
                tensors[f"{target}{key}.layer_norm_{kind}"] = weights.take(
                    f"{layer}{norm}.{kind}", hidden
                )
    return tensors


_FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "llama": (_llama_flags, _take_llama),
    "mistral": (_llama_flags, _take_llama),
    "qwen2": (_llama_flags, _take_llama),
    "qwen3": (_llama_flags, _take_llama),
    "gpt2": (_gpt2_flags, _take_gpt2),
}


def interleave_qkv(
    query: LazyTensor, key: LazyTensor, value: LazyTensor, groups: int
) -> LazyTensor:
    """Megatron's order of the QKV projection's rows: by query group, its queries, key and value.

    Args:
        query: [heads * head_dim, ...], in order of heads.
        key, value: [groups * head_dim, ...].
        groups: number of key and value heads.
    """
    parts = zip(query.chunk(groups), key.chunk(groups), value.chunk(groups))
    return concatenate([part for group in parts for part in group])


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding in the checkpoint."""
    return math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def pad_vocabulary(tensor: LazyTensor) -> LazyTensor:
    """A [vocabulary, hidden] tensor with rows of zeros up to Megatron's padded size."""
    missing = padded_vocab_size(tensor.shape[0]) - tensor.shape[0]
    if not missing:
        return tensor
    return concatenate([tensor, LazyTensor.full((missing, tensor.shape[1]), 0.0, tensor.dtype)])


def _take_ends(weights: _Weights, config, embedding: str, norm: dict) -> dict[str, LazyTensor]:
    """Embedding, final norm and output layer."""
    words = weights.take(embedding, config.vocab_size, config.hidden_size)
    tensors = {"embedding.word_embeddings.weight": pad_vocabulary(words)}
    for name, kind in norm.items():
        tensors[f"decoder.final_layernorm.{kind}"] = weights.take(name, config.hidden_size)
    head = weights.take_head(words, config.tie_word_embeddings)
    if head is not None:
        tensors["output_layer.weight"] = pad_vocabulary(head)
    return tensors


def _common_flags(config) -> list:
    positions = config.max_position_embeddings
    flags = [
        *("--num-layers", config.num_hidden_layers, "--hidden-size", config.hidden_size),
        *("--num-attention-heads", config.num_attention_heads),
        *("--seq-length", min(positions, 4096), "--max-position-embeddings", positions),
        *("--make-vocab-size-divisible-by", VOCAB_MULTIPLE),
    ]
    if not config.tie_word_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    return flags


def _window_flags(config) -> list:
    """Sliding-window attention: Megatron counts the keys before a query, transformers it as well."""
    window = getattr(config, "sliding_window", None)
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


def _require(config, name: str, *accepted) -> None:
    value = getattr(config, name, accepted[0])
    if value not in accepted:
        raise _refusal(config, name, value, " or ".join(map(str, accepted)))


def _refusal(config, name: str, value, accepted) -> ConversionError:
    return ConversionError(
        f"config.json of a {config.model_type} model: {name} is {value}, which Megatron-Core 0.19.2 "
        f"cannot compute; accepted: {accepted}"
    )


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gpt2_ffn(config) -> int:
    return config.n_inner or 4 * config.hidden_size
