"""Dense Hugging Face models as Megatron's GPT: settings as flags, weights by Megatron's names.

Families: Llama, Mistral, Qwen2, Qwen3 and GPT-2. What Megatron-Core 0.19.2 cannot compute as
transformers does is refused with the name of the field in config.json.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_scmoe.checkpoints.claims import (
    HEAD,
    check_dropouts,
    check_folder,
    note_on_dtype,
    notes_on_ids,
    settle_head,
)
from megatron_scmoe.checkpoints.lazy_tensor import (
    LazyTensor,
    check_weights,
    concatenate,
    main_dtype,
    naming,
)
from megatron_scmoe.checkpoints.model_arguments import DTYPES, rope_flags
from megatron_scmoe.checkpoints.safetensors_folder import (
    read_config,
    read_generation_config,
    read_safetensors,
)
from megatron_scmoe.checkpoints.tokenizers import tokenizer_flags
from megatron_scmoe.checkpoints.vocabulary import EMBEDDING, OUTPUT_LAYER, Padding, set_rows
from megatron_scmoe.errors import ConversionError


@dataclass(frozen=True)
class DenseModel:
    """A dense GPT in Megatron's terms.

    ``flags`` are the model's flags of the pretraining script, but for ``dtype``; ``tensors`` its
    weights by the keys of a checkpoint, one key a layer; ``vocab_rows`` counts the embedding's rows,
    padding included; ``notes`` say, each in a line, where config.json and tensors differ.
    """

    flags: list[str]
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype
    vocab_rows: int
    notes: list[str] = field(default_factory=list)


def read_hugging_face(
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    padding: Padding | None = None,
) -> DenseModel:
    """A dense model from a Hugging Face folder with safetensors files.

    Args:
        dtype: of the weights; None for that of most bytes in the files.
        tokenizer: instead of the folder's: a SentencePiece model, a folder, or "none".
        padding: of the vocabulary; None for Megatron's default.

    Raises:
        ConversionError: for another architecture or a setting that Megatron does not have, and for
            tensors that are missing, left over or of another shape than config.json says.
    """
    folder = Path(folder)
    with naming(folder):
        return _read(folder, dtype, tokenizer, padding or Padding())


def _read(
    folder: Path, dtype: torch.dtype | None, tokenizer: str | None, padding: Padding
) -> DenseModel:
    fields = read_config(folder)
    check_folder(folder, fields)
    check_dropouts(fields)
    config = _read_config(folder, fields)
    flags, take_model = _FAMILIES[config.model_type]
    setting_flags = flags(config)  # settings are judged before weights
    size = config.vocab_size
    rows = padding.rows(size)
    name_flags, _ = tokenizer_flags(folder, size, sentencepiece_first=False, given=tokenizer)
    weights = _Weights(folder, config, dtype)
    tensors = set_rows(take_model(weights, config), rows)
    weights.check_left_over()
    if OUTPUT_LAYER in tensors:
        setting_flags.append("--untie-embeddings-and-output-weights")
    return DenseModel(
        [
            *setting_flags,
            *name_flags,
            *padding.flags,
            *("--vocab-size", str(size), "--padded-vocab-size", str(rows)),
        ],
        tensors,
        weights.dtype,
        rows,
        [
            *weights.notes,
            *note_on_dtype(fields, weights.dtype, dtype is not None),
            *notes_on_ids(fields, read_generation_config(folder), size),
        ],
    )


def _read_config(folder: Path, fields: dict):
    """config.json as transformers understands it, whatever version wrote it; runs no code of it."""
    file = folder / "config.json"
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
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
    """The tensors of a folder, each taken once, by name and shape.

    ``notes`` say where the files are not what config.json says.
    """

    def __init__(self, folder: Path, config, dtype: torch.dtype | None):
        self.folder = folder
        self.prefix = {"gpt2": "transformer."}.get(config.model_type, "model.")
        self.notes: list[str] = []
        self.left = {}
        for name, tensor in read_safetensors(folder).items():
            if name != HEAD and not name.startswith(self.prefix):
                name = self.prefix + name  # files of a model without its head
            if name in self.left:
                raise ConversionError(
                    f"{folder}: the tensor {name} is there with and without prefix"
                )
            self.left[name] = tensor
        self._drop_buffers(config)
        if not self.left:
            raise ConversionError(f"{folder}: its files hold no weights")
        check_weights(self.left)
        self.dtype = dtype or main_dtype(self.left)
        if self.dtype not in DTYPES.values():
            raise ConversionError(f"{folder}: weights of {self.dtype}; accepted: with --dtype")
        others = {t.dtype for t in self.left.values()} - {self.dtype}
        if others and dtype is None:
            names = " and ".join(str(d).removeprefix("torch.") for d in sorted(others, key=str))
            self.notes.append(
                f"cast to {str(self.dtype).removeprefix('torch.')}: tensors of {names}"
            )

    def take(self, name: str, *shape: int) -> LazyTensor:
        """The tensor ``name``, without the prefix; of the given shape."""
        return self._pop(self.prefix + name, shape)

    def take_ends(self, name: str, is_tied: bool, *shape: int) -> dict[str, LazyTensor]:
        """The embedding and, if it is not tied to it, the output layer, by Megatron's keys."""
        is_tied, self.left, notes = settle_head(is_tied, self.left, self.prefix + name)
        self.notes += notes
        ends = {EMBEDDING: self.take(name, *shape)}
        return ends if is_tied else ends | {OUTPUT_LAYER: self._pop(HEAD, shape)}

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

    def _drop_buffers(self, config) -> None:
        """Leave out what older files hold beside weights, and compare the rope's."""
        for name in [name for name in self.left if name.endswith(_BUFFERS)]:
            tensor = self.left.pop(name)
            if name.endswith(_ROPE_BUFFER) and not _is_rope_of(config, tensor):
                self.notes.append(
                    f"not used, as in transformers: {name}, which is another rope than that of "
                    "rope_parameters in config.json"
                )


_ROPE_BUFFER = ".rotary_emb.inv_freq"
_BUFFERS = (_ROPE_BUFFER, ".attn.bias", ".attn.masked_bias")
"""What older files hold beside weights."""


def _is_rope_of(config, inverse_frequencies: LazyTensor) -> bool:
    """Whether a buffer in the files is what transformers computes from config.json."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    expected = LlamaRotaryEmbedding(config).inv_freq
    found, limits = inverse_frequencies.load(), torch.finfo(inverse_frequencies.dtype)
    return expected.shape == found.shape and torch.allclose(
        found.float(), expected, rtol=max(1e-4, 2 * limits.eps), atol=limits.smallest_normal
    )


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


def _take_ends(weights: _Weights, config, embedding: str, norm: dict) -> dict[str, LazyTensor]:
    """Embedding, final norm and output layer."""
    tensors = weights.take_ends(
        embedding, config.tie_word_embeddings, config.vocab_size, config.hidden_size
    )
    for name, kind in norm.items():
        tensors[f"decoder.final_layernorm.{kind}"] = weights.take(name, config.hidden_size)
    return tensors


def _common_flags(config) -> list:
    positions = config.max_position_embeddings
    return [
        *("--num-layers", config.num_hidden_layers, "--hidden-size", config.hidden_size),
        *("--num-attention-heads", config.num_attention_heads),
        *("--seq-length", min(positions, 4096), "--max-position-embeddings", positions),
    ]


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
