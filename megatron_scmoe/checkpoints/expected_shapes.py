"""Which tensors Megatron's arguments say that a GPT has, and of which shapes."""

import argparse
from collections.abc import Iterator, Mapping

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.vocabulary import EMBEDDING, OUTPUT_LAYER
from megatron_scmoe.config import moe_pattern
from megatron_scmoe.errors import ConversionError

Shape = tuple[int, ...]

POSITIONS = "embedding.position_embeddings.weight"


def check_tensors_of(args: argparse.Namespace, tensors: Mapping[str, LazyTensor]) -> None:
    """Hold a model's tensors against its arguments.

    Not judged: attention that is latent or gated, experts in a latent space, and tensors that neither
    kind of GPT below has.

    Args:
        args: Megatron's, of a stock GPT, dense or MoE, or of a ScMoE one.
        tensors: by the names of :class:`~megatron_scmoe.checkpoints.torch_dist.MegatronCheckpoint`.

    Raises:
        ConversionError: for a tensor that is missing, of another shape, or there without its flag.
    """
    expected = dict(_shapes(args))
    for name, shape in expected.items():
        if name not in tensors:
            raise ConversionError(f"tensor {name} is missing, which the arguments ask for")
        if tuple(tensors[name].shape) != shape:
            raise ConversionError(
                f"tensor {name} has the shape {list(tensors[name].shape)}, and {list(shape)} by the "
                "arguments"
            )
    layers = {name.split(".")[2] for name in tensors if name.startswith("decoder.layers.")}
    beyond = sorted(int(i) for i in layers if int(i) >= args.num_layers)
    if beyond:
        raise ConversionError(f"block {beyond[0]} is there, and --num-layers is {args.num_layers}")
    with_all = argparse.Namespace(**vars(args) | _EVERY_FLAG)
    for name, _ in _shapes(with_all):
        if name in tensors and name not in expected:
            raise ConversionError(f"tensor {name} is there, which the arguments do not ask for")


_EVERY_FLAG = dict(
    add_bias_linear=True,
    add_qkv_bias=True,
    qk_layernorm=True,
    normalization="LayerNorm",
    untie_embeddings_and_output_weights=True,
    position_embedding_type="learned_absolute",
    moe_router_enable_expert_bias=True,
)
"""With these a model has every tensor that some model has."""


def _shapes(args: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    hidden, vocabulary = args.hidden_size, (args.padded_vocab_size, args.hidden_size)
    yield EMBEDDING, vocabulary
    if args.position_embedding_type == "learned_absolute":
        yield POSITIONS, (args.max_position_embeddings, hidden)
    pattern = moe_pattern(args.moe_layer_freq, args.num_layers) if args.num_experts else []
    for i in range(args.num_layers):
        block = f"decoder.layers.{i}."
        if not (args.multi_latent_attention or args.attention_output_gate):
            yield from _attention(args, f"{block}self_attention.")
        if pattern and pattern[i]:
            yield from _moe(args, block)
        else:
            yield from _norm(args, f"{block}mlp.linear_fc1.layer_norm_", hidden)
            yield from _mlp(args, f"{block}mlp.", args.ffn_hidden_size)
    yield from _norm(args, "decoder.final_layernorm.", hidden)
    if args.untie_embeddings_and_output_weights:
        yield OUTPUT_LAYER, vocabulary


def _attention(args: argparse.Namespace, at: str) -> Iterator[tuple[str, Shape]]:
    heads, hidden = args.num_attention_heads, args.hidden_size
    groups = args.num_query_groups if args.group_query_attention else heads
    size = args.kv_channels or hidden // heads
    yield from _norm(args, f"{at}linear_qkv.layer_norm_", hidden)
    has_bias = args.add_bias_linear or args.add_qkv_bias
    yield from _linear(f"{at}linear_qkv.", ((heads + 2 * groups) * size, hidden), has_bias)
    yield from _linear(f"{at}linear_proj.", (hidden, heads * size), args.add_bias_linear)
    if args.qk_layernorm:
        for name in "qk":
            yield from _norm(args, f"{at}{name}_layernorm.", size)


def _moe(args: argparse.Namespace, block: str) -> Iterator[tuple[str, Shape]]:
    mlp, hidden, experts = f"{block}mlp.", args.hidden_size, args.num_experts
    yield from _linear(f"{mlp}router.", (experts, hidden), args.add_bias_linear)
    if args.moe_router_enable_expert_bias:
        yield f"{mlp}router.expert_bias", (experts,)
    if not args.moe_latent_size:
        yield from _mlp(args, f"{mlp}experts.experts.", args.moe_ffn_hidden_size, (experts,))
    shared = args.moe_shared_expert_intermediate_size
    if shared is not None:
        yield from _norm(args, f"{block}pre_mlp_layernorm.", hidden)
        yield from _mlp(args, f"{mlp}shared_experts.", shared)


def _mlp(
    args: argparse.Namespace, at: str, ffn: int, stacked: Shape = ()
) -> Iterator[tuple[str, Shape]]:
    rows = 2 * ffn if args.swiglu or args.quick_geglu else ffn
    hidden, has_bias = args.hidden_size, args.add_bias_linear
    yield from _linear(f"{at}linear_fc1.", (rows, hidden), has_bias, stacked)
    yield from _linear(f"{at}linear_fc2.", (hidden, ffn), has_bias, stacked)


def _norm(args: argparse.Namespace, at: str, size: int) -> Iterator[tuple[str, Shape]]:
    yield f"{at}weight", (size,)
    if args.normalization == "LayerNorm":
        yield f"{at}bias", (size,)


def _linear(
    at: str, shape: Shape, has_bias: bool, stacked: Shape = ()
) -> Iterator[tuple[str, Shape]]:
    yield f"{at}weight", (*stacked, *shape)
    if has_bias:
        yield f"{at}bias", (*stacked, shape[0])
