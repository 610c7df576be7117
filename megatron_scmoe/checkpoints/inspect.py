"""What a checkpoint or a model folder is, in lines for people."""

import argparse
import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_scmoe.checkpoints.checksums import find_damage
from megatron_scmoe.checkpoints.formats.registry import NAMES, find_format
from megatron_scmoe.checkpoints.identify import ACCEPTED, what_is
from megatron_scmoe.checkpoints.lazy_tensor import Tensors, total_bytes
from megatron_scmoe.checkpoints.model_arguments import built_by_spec, with_megatron_defaults
from megatron_scmoe.checkpoints.output_folder import TRACKER
from megatron_scmoe.checkpoints.safetensors_folder import read_config, read_safetensors
from megatron_scmoe.checkpoints.torch_dist import find_iteration, read_megatron
from megatron_scmoe.checkpoints.vocabulary import EMBEDDING, count_tokens, set_rows
from megatron_scmoe.errors import ConversionError

ROUTED = (".mlp.experts.", ".block_sparse_moe.experts.")
"""In the names of weights of routed experts; the second is Mixtral's."""
BUFFERS = (
    *(".expert_bias", ".qb_beta", ".classifier_bias"),
    *(".e_score_correction_bias", ".classifier.bias"),  # LongCat-Flash's names
)


def describe(path: str | os.PathLike, keys: bool = False, verify: bool = False) -> list[str]:
    """Architecture, sizes, layout and parameter counts of a Megatron checkpoint or a model folder.

    Args:
        path: either of the two.
        keys: list every tensor too.
        verify: compare the bytes of a Megatron checkpoint with their checksums.

    Raises:
        ConversionError: if it is neither, or damaged.
    """
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        if verify:
            raise ConversionError(
                f"--verify {path}: a model folder has no checksums; accepted: a Megatron checkpoint"
            )
        rows, tensors = _describe_folder(path)
    elif (path / TRACKER).is_file() or (path / "metadata.json").is_file():
        rows, tensors = _describe_megatron(path)
        if verify:
            rows.append(("checksums", _verified(find_iteration(path))))
    else:
        raise ConversionError(f"{path}: {what_is(path)}; accepted: {ACCEPTED}")
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    if keys:
        width = max(map(len, tensors))
        lines += ["", *(f"{key:{width}}  {_shape(tensors[key])}" for key in sorted(tensors))]
    return lines


def count_parameters(tensors: Tensors, args: argparse.Namespace) -> tuple[int, int]:
    """All parameters of Megatron's tensors, and those that one token uses (with zero experts: on
    average, if all experts are chosen alike). Rows that pad the vocabulary count where nobody says
    how many tokens there are."""
    if EMBEDDING in tensors:
        declared = getattr(args, "vocab_size", None)
        tensors = set_rows(tensors, count_tokens(tensors[EMBEDDING].shape[0], declared))
    sizes = {
        name: tensor.shape.numel() for name, tensor in tensors.items() if not name.endswith(BUFFERS)
    }
    total = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if any(r in name for r in ROUTED))
    experts = (getattr(args, "num_experts", None) or 0) + getattr(args, "scmoe_zero_experts", 0)
    share = args.moe_router_topk / experts if experts else 1
    return total, round(total - routed * (1 - share))


def millions(count: int) -> str:
    """A parameter count for people: 1.70 B, 323 M, 45.3 K."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _describe_megatron(path: Path) -> tuple[list[tuple[str, str]], Tensors]:
    checkpoint = read_megatron(path)
    args, tensors = checkpoint.args, checkpoint.tensors
    rows = [("checkpoint", f"Megatron torch_dist, {checkpoint.path}")]
    rows.append(("iteration", str(checkpoint.iteration)))
    if args is None:
        rows.append(("arguments", "none were saved with it"))
        total = sum(tensor.shape.numel() for tensor in tensors.values())
        return [*rows, ("parameters", f"{total:,}"), ("dtypes", _dtypes(tensors))], tensors
    args = with_megatron_defaults(args)
    if args.vocab_size is None:  # as training saves it, where its tokenizer has said so
        from megatron_scmoe.checkpoints.tokenizers import find_tokenizer  # it imports transformers

        with contextlib.suppress(ConversionError):
            args.vocab_size = find_tokenizer(args).tokens
    total, active = count_parameters(tensors, args)
    sizes = {
        "blocks": args.num_layers,
        "hidden": args.hidden_size,
        "heads": args.num_attention_heads,
        "ffn": args.ffn_hidden_size,
        "tokens": args.vocab_size,
        "embedding rows": tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None,
        "positions": args.max_position_embeddings,
    }
    rows.append(("architecture", _architecture(args)))
    known = {name: value for name, value in sizes.items() if value is not None}
    rows.append(("sizes", ", ".join(f"{name} {value}" for name, value in known.items())))
    if args.num_experts:
        shared = args.moe_shared_expert_intermediate_size
        rows.append(
            (
                "experts",
                f"{args.num_experts}, {args.moe_router_topk} for a token, ffn "
                f"{args.moe_ffn_hidden_size}; shared expert {shared or 'none'}; "
                f"moe_layer_freq {args.moe_layer_freq}",
            )
        )
    rows += [
        ("parameters", _parameters(total, active)),
        ("dtypes", _dtypes(tensors)),
        ("saved at", _layout(checkpoint.layout)),
        ("tokenizer", f"{args.tokenizer_type} {args.tokenizer_model or ''}".strip()),
    ]
    return rows, tensors


def _verified(folder: Path) -> str:
    damage = find_damage(folder)
    if damage is not None:
        raise ConversionError(damage)
    return "those of every tensor hold"


def _describe_folder(path: Path) -> tuple[list[tuple[str, str]], Tensors]:
    config, tensors = read_config(path), read_safetensors(path)
    model_type = config.get("model_type")
    unused = find_format(model_type).left_out(config, tensors) if model_type in NAMES else []
    used = {name: tensors[name] for name in tensors.keys() - set(unused)}
    total, active = count_parameters(used, _experts(config))
    sizes = {name: config[name] for name in _SIZES if config.get(name) is not None}
    rows = [
        ("model", f"Hugging Face folder, {path}"),
        ("architecture", f"{model_type} {config.get('architectures') or ''}".strip()),
        ("sizes", ", ".join(f"{name} {value}" for name, value in sizes.items())),
        ("parameters", _parameters(total, active)),
        ("bytes", f"{total_bytes(tensors):,}"),
        ("dtypes", _dtypes(tensors)),
    ]
    if unused:
        rows.append(("not used", f"{len(unused)} tensors, such as {unused[0]}"))
    return rows, tensors


_SIZES = (
    "num_hidden_layers",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "vocab_size",
    "unpadded_vocab_size",
    "max_position_embeddings",
    "tap",
    "combine",
)

_LAYOUT_NAMES = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
    "context_parallel_size": "CP",
    "data_parallel_size": "DP",
    "world_size": "ranks",
}


def _architecture(args: argparse.Namespace) -> str:
    if not args.num_experts:
        return "dense GPT"
    if not hasattr(args, "scmoe_tap"):
        if built_by_spec(args):
            return (
                "ScMoE GPT; an older version saved none of its --scmoe-* ($SCMOE_ARGS gives them)"
            )
        return "stock MoE GPT"
    norm = f"router norm {args.scmoe_router_norm}"
    post = ", post norm" if args.scmoe_post_norm else ""
    return f"ScMoE GPT: tap {args.scmoe_tap}, combine {args.scmoe_combine}, {norm}{post}"


def _experts(config: Mapping[str, Any]) -> argparse.Namespace:
    """What a ``config.json`` says of experts, by Megatron's names."""

    def first(*names):
        return next((config[name] for name in names if config.get(name)), 0)

    return argparse.Namespace(
        num_experts=first("num_experts", "n_routed_experts", "num_local_experts"),
        moe_router_topk=first("num_experts_per_tok", "moe_topk"),
        scmoe_zero_experts=first("zero_expert_num"),
    )


def _parameters(total: int, active: int) -> str:
    return f"{total:,} ({millions(total)}), active {active:,} ({millions(active)})"


def _layout(layout: dict[str, int]) -> str:
    return ", ".join(f"{_LAYOUT_NAMES[name]} {size}" for name, size in layout.items())


def _dtypes(tensors: Tensors) -> str:
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    return ", ".join(f"{name} ({count} tensors)" for name, count in counts.most_common())


def _shape(tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
