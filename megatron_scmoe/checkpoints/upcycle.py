"""Upcycling: a dense model, or a stock MoE model, becomes a ScMoE model that trains on.

Of a dense model, the MLP of a MoE block becomes the shared expert, and the routed experts are made
from it. They begin with a down-projection of zero (``routed_scale`` 0): the routed output is zero, and
the shared expert, weighed by its gate, is the dense MLP, so that the logits are those of the dense
model. Their up-projections, which the inits make, shape the first gradients of the down-projections;
router and up-projections have a gradient from the second step on. See docs/upcycling.md.

- copy: the dense MLP's (Komatsuzaki et al. 2023, arXiv 2212.05055).
- drop: a random part of the intermediate dimensions of each expert is drawn anew, from a normal
  distribution with the mean and deviation of the weights (Drop-Upcycling, arXiv 2502.19261).
- noise: with normal noise of a part of the weights' deviation added.

A smaller expert takes a slice: expert i the intermediate dimensions from i * F on, round and round, so
that ffn / F experts next to each other are a whole dense MLP.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_scmoe.arguments import scmoe_config_from_args
from megatron_scmoe.checkpoints.expected_shapes import check_tensors_of
from megatron_scmoe.checkpoints.formats.dense import read_hugging_face
from megatron_scmoe.checkpoints.identify import ACCEPTED, what_is
from megatron_scmoe.checkpoints.lazy_tensor import (
    LazyTensor,
    concatenate,
    naming,
    stack,
    total_bytes,
)
from megatron_scmoe.checkpoints.model_arguments import arguments_from_flags, parse_flags
from megatron_scmoe.checkpoints.output_folder import TRACKER, new_folder
from megatron_scmoe.checkpoints.runtime_settings import settings_of_the_model
from megatron_scmoe.checkpoints.stock_checkpoint import read_stock
from megatron_scmoe.checkpoints.torch_dist_writer import write_megatron
from megatron_scmoe.checkpoints.upcycle_settings import Upcycling
from megatron_scmoe.config import moe_pattern
from megatron_scmoe.errors import ConversionError, ScMoEError
from megatron_scmoe.platform import megatron_workarounds
from megatron_scmoe.platform.megatron_judgement import judged_by_megatron
from megatron_scmoe.validation.rules import validate


def upcycle(
    source: str | os.PathLike, save: str | os.PathLike, how: Upcycling, force: bool = False
) -> list[str]:
    """Write the upcycled checkpoint: a release one, which training starts from at iteration 0.

    Args:
        source: a Hugging Face folder of a dense model, or a torch_dist checkpoint of a stock Megatron
            GPT, dense or MoE.
        save: the folder to make, for ``--load``.
        force: replace a checkpoint that is there.

    Returns:
        What was done, in lines for the user.

    Raises:
        ConversionError: for a source that cannot be upcycled, settings that do not go together, or
            a place that cannot be written; nothing is written then.
    """
    _check(how)
    try:
        args, tensors, notes = _convert(Path(source).expanduser(), how)
        _judge(args)
    except ScMoEError as error:
        raise ConversionError(str(error)) from error
    args.moe_shared_expert_gate = args.scmoe_combine == "cg1"  # as training saves it
    with new_folder(save, total_bytes(tensors), force, sources=[source]) as folder:
        write_megatron(folder, args, tensors, "upcycling")
    return [
        f"{source} -> {save}",
        f"{len(tensors)} tensors, {total_bytes(tensors) / 1e9:.2f} GB, {args.params_dtype}",
        f"vocabulary: {args.vocab_size or 'an unknown number of'} tokens, padded to "
        f"{args.padded_vocab_size} rows",
        *notes,
        f"train on: pretrain_gpt_scmoe.py --load {save} --use-checkpoint-args "
        "--moe-aux-loss-coeff 0.01 ...",
    ]


def _convert(source: Path, how: Upcycling):
    """Arguments and tensors of the ScMoE model, and notes on them."""
    if not (source / "config.json").is_file():
        if not any((source / name).is_file() for name in (TRACKER, "metadata.json")):
            raise ConversionError(f"--input {source}: {what_is(source)}; accepted: {ACCEPTED}")
        return *_upcycle_megatron(source, how), []
    dense = read_hugging_face(source, how.dtype, how.tokenizer, how.padding)
    flags = [*dense.flags, *_moe_flags(how, parse_flags(dense.flags))]
    args = arguments_from_flags(flags, dense.dtype, dense.vocab_rows)
    return args, _upcycle_dense(dense.tensors, args, how), dense.notes


def _check(how: Upcycling) -> None:
    """Refuse values that no model can have."""
    defaults = {field.name: field.default for field in fields(how)}
    for name, init in (("drop_ratio", "drop"), ("noise_scale", "noise")):
        if getattr(how, name) != defaults[name] and how.init != init:
            raise ConversionError(f"--{name.replace('_', '-')}: it goes with --init {init} only")
    if not 0 <= how.drop_ratio <= 1:
        raise ConversionError(f"--drop-ratio {how.drop_ratio}: accepted: 0 to 1")
    for name in ("noise_scale", "routed_scale"):
        if not 0 <= getattr(how, name) < float("inf"):
            raise ConversionError(
                f"--{name.replace('_', '-')} {getattr(how, name)}: accepted: 0 or more"
            )
    if how.every_block and how.tap != "pos1":
        raise ConversionError(f"--every-block with --tap {how.tap}: accepted: --tap pos1")


def _upcycle_megatron(source: Path, how: Upcycling):
    """Arguments and tensors from a stock Megatron checkpoint."""
    args, tensors = read_stock(source, how.dtype, how.tokenizer, how.padding)
    is_moe = bool(args.num_experts)
    with naming(source):
        check_tensors_of(args, tensors)
    given = vars(parse_flags(_flags_of_moe(how, args) if is_moe else _moe_flags(how, args)))
    gained = ("scmoe_",) if is_moe else ("scmoe_", "moe_", "num_experts")
    vars(args).update({name: value for name, value in given.items() if name.startswith(gained)})
    if megatron_workarounds.has_tanh_gelu(args):  # the fused kernel, which experts cannot have
        args.openai_gelu, args.bias_gelu_fusion = True, False
    if is_moe:
        return args, _upcycle_moe(tensors, args)
    return args, _upcycle_dense(tensors, args, how)


def _moe_flags(how: Upcycling, args) -> list[str]:
    """The flags that a dense model gains."""
    ffn, layers = args.ffn_hidden_size, args.num_layers
    if how.num_experts is None or how.topk is None:
        raise ConversionError("--num-experts and --topk: a dense model needs both")
    if how.num_experts < 1 or not 1 <= how.topk <= how.num_experts:
        raise ConversionError(
            f"--num-experts {how.num_experts} --topk {how.topk}: accepted: 1 <= topk <= experts"
        )
    if how.expert_ffn is not None and not 1 <= how.expert_ffn <= ffn:
        raise ConversionError(
            f"--expert-ffn {how.expert_ffn}: accepted: 1 to {ffn}, that of the dense MLP"
        )
    if layers % 2 and not how.every_block:
        raise ConversionError(
            f"the model has {layers} blocks, which are no pairs of a dense and a MoE block; accepted: "
            "--every-block --tap pos1"
        )
    flags = [
        *("--num-experts", how.num_experts, "--moe-router-topk", how.topk),
        *("--moe-layer-freq", "1" if how.every_block else f"[0,1]*{layers // 2}"),
        *("--moe-ffn-hidden-size", how.expert_ffn or ffn),
        *("--moe-shared-expert-intermediate-size", ffn),
        *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", 0.01),
        *("--moe-token-dispatcher-type", "alltoall"),
        *(["--moe-router-pre-softmax"] if how.topk == 1 else []),
        *_scmoe_flags(how, how.combine or "cg1"),
    ]
    return [str(flag) for flag in flags]


def _flags_of_moe(how: Upcycling, args) -> list[str]:
    """The flags that a stock MoE model gains."""
    unused = (
        "init",
        "expert_ffn",
        "drop_ratio",
        "noise_scale",
        "routed_scale",
        "num_experts",
        "topk",
    )
    has = {"num_experts": args.num_experts, "topk": args.moe_router_topk}
    defaults = {field.name: field.default for field in fields(how)}
    for name in unused:
        value = getattr(how, name)
        if value not in (defaults[name], has.get(name)):
            raise ConversionError(
                f"--{name.replace('_', '-')} {value}: the model has its experts already; accepted: "
                "leave it out"
            )
    if how.every_block and not all(moe_pattern(args.moe_layer_freq, args.num_layers)):
        raise ConversionError("--every-block: the model has dense blocks; accepted: leave it out")
    gated = args.moe_shared_expert_gate
    combine = how.combine or ("cg1" if gated else "add")
    if gated and combine != "cg1":
        raise ConversionError(
            f"--combine {combine}: the model has a gate on its shared expert; accepted: cg1"
        )
    return _scmoe_flags(how, combine)


def _scmoe_flags(how: Upcycling, combine: str) -> list[str]:
    flags = ("--scmoe-tap", how.tap, "--scmoe-combine", combine)
    return [*flags, "--scmoe-router-norm", how.router_norm]


def _judge(args) -> None:
    """Have Megatron and this package judge the model, as training would; not its source's run."""
    trial = settings_of_the_model(args)
    scmoe = scmoe_config_from_args(args)
    validate(scmoe, trial)
    with judged_by_megatron():
        config = megatron_workarounds.transformer_config(trial)
    validate(scmoe, config)


def _upcycle_dense(tensors: dict[str, LazyTensor], args, how: Upcycling) -> dict[str, LazyTensor]:
    """The tensors of the ScMoE model from those of the dense one."""
    tensors = dict(tensors)
    pattern = moe_pattern(args.moe_layer_freq, args.num_layers)
    for layer in (i for i, is_moe in enumerate(pattern) if is_moe):
        block = f"decoder.layers.{layer}."
        mlp = {
            key.removeprefix(f"{block}mlp."): tensors.pop(key)
            for key in list(tensors)
            if key.startswith(f"{block}mlp.")
        }
        tensors |= {block + key: value for key, value in _moe_block(mlp, layer, args, how).items()}
    return tensors


def _moe_block(
    mlp: dict[str, LazyTensor], layer: int, args, how: Upcycling
) -> dict[str, LazyTensor]:
    """The MoE block's tensors from those of its dense MLP, without their prefixes."""
    experts = [_Expert(how, layer, i, args) for i in range(args.num_experts)]
    kinds = ["weight", "bias"] if args.add_bias_linear else ["weight"]
    gain = 1.0 if args.scmoe_combine == "add" else 2.0  # the gates begin at one half; exact
    block = {}
    for kind in ("weight", "bias") if args.normalization == "LayerNorm" else ("weight",):
        norm = _pop(mlp, f"linear_fc1.layer_norm_{kind}", layer)
        block[f"pre_mlp_layernorm.{kind}"] = norm
        if args.scmoe_router_norm == "own":
            block[f"mlp.shortcut_layernorm.{kind}"] = norm
    for kind in kinds:
        up, down = (_pop(mlp, f"linear_fc{i}.{kind}", layer) for i in (1, 2))
        block |= {
            f"mlp.shared_experts.linear_fc1.{kind}": up,
            f"mlp.shared_experts.linear_fc2.{kind}": _scale(down, gain),
            f"mlp.experts.experts.linear_fc1.{kind}": stack([e.up(up) for e in experts]),
            f"mlp.experts.experts.linear_fc2.{kind}": stack(
                [e.down(down, gain if args.scmoe_combine == "cg2" else 1.0) for e in experts]
            ),
        }
        dtype = up.dtype
    if mlp:
        raise ConversionError(
            f"the tensor decoder.layers.{layer}.mlp.{sorted(mlp)[0]} has no place in a MoE block"
        )
    block["mlp.router.weight"] = _normal(
        (args.num_experts, args.hidden_size), args.init_method_std, dtype, how.seed, layer
    )
    if args.add_bias_linear:
        block["mlp.router.bias"] = LazyTensor.full((args.num_experts,), 0.0, dtype)
    return block | _gates(args.scmoe_combine, args.hidden_size, dtype)


def _gates(combine: str, hidden: int, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """Gates of zero: sigmoid and softmax give one half whatever the input is."""
    return {
        "add": {},
        "cg1": {"mlp.shared_experts.gate_weight": LazyTensor.full((1, hidden), 0.0, dtype)},
        "cg2": {"mlp.combine_gate.weight": LazyTensor.full((2, hidden), 0.0, dtype)},
    }[combine]


@dataclass(frozen=True)
class _Expert:
    """How one routed expert of one block is made from the dense MLP."""

    how: Upcycling
    layer: int
    index: int
    args: argparse.Namespace

    def up(self, weight: LazyTensor) -> LazyTensor:
        """Rows of the up-projection, gate and up if gated: [(2) ffn, h] -> [(2) F, h]; or a bias."""
        halves = weight.chunk(2) if self.args.swiglu or self.args.quick_geglu else [weight]
        return concatenate([self._vary(self._slice(h), 0, n) for n, h in enumerate(halves)])

    def down(self, weight: LazyTensor, gain: float) -> LazyTensor:
        """Columns of the down-projection, scaled: [h, ffn] -> [h, F]; or its bias [h], zero."""
        if len(weight.shape) == 1 or self.how.routed_scale == 0:
            width = (self.args.moe_ffn_hidden_size,) if len(weight.shape) == 2 else ()
            return LazyTensor.full((weight.shape[0], *width), 0.0, weight.dtype)
        return _scale(self._vary(self._slice(weight, 1), 1, 2), gain * self.how.routed_scale)

    def _slice(self, weight: LazyTensor, dim: int = 0) -> LazyTensor:
        """This expert's intermediate dimensions, from index * F on, around the end."""
        whole, size = weight.shape[dim], self.args.moe_ffn_hidden_size
        start = self.index * size % whole
        head = min(size, whole - start)
        parts = [weight.narrow(dim, start, head)]
        if head < size:
            parts.append(weight.narrow(dim, 0, size - head))
        return concatenate(parts, dim)

    def _vary(self, weight: LazyTensor, dim: int, number: int) -> LazyTensor:
        """What the init makes of a slice; ``dim`` is the one of the intermediate dimensions."""
        change: Callable[[Tensor], Tensor] | None = {
            "copy": None,
            "drop": lambda tensor: self._drop(tensor, dim, number),
            "noise": lambda tensor: self._add_noise(tensor, number),
        }[self.how.init]
        return weight if change is None else weight.apply(change)

    def _drop(self, weight: Tensor, dim: int, number: int) -> Tensor:
        size = weight.shape[dim]
        count = round(self.how.drop_ratio * size)
        chosen = torch.randperm(size, generator=self._generator(-1))[:count]  # in all projections
        values, old = weight.float().transpose(0, dim).clone(), weight.float()
        fresh = torch.randn(values[chosen].shape, generator=self._generator(number))
        values[chosen] = old.mean() + old.std(correction=0) * fresh
        return values.transpose(0, dim).to(weight.dtype)

    def _add_noise(self, weight: Tensor, number: int) -> Tensor:
        scale = self.how.noise_scale * weight.float().std(correction=0)
        noise = torch.randn(weight.shape, generator=self._generator(number))
        return (weight.float() + scale * noise).to(weight.dtype)

    def _generator(self, number: int) -> torch.Generator:
        return _generator(self.how.seed, self.layer, self.index, number + 1)


def _upcycle_moe(tensors: dict[str, LazyTensor], args) -> dict[str, LazyTensor]:
    """The tensors of the ScMoE model from those of a stock MoE one: norms and gates are added."""
    tensors = dict(tensors)
    has_shared = args.moe_shared_expert_intermediate_size is not None
    if args.scmoe_combine != "add" and not has_shared:
        raise ConversionError(
            f"--combine {args.scmoe_combine}: the model has no shared expert; accepted: add"
        )
    has_gate = args.moe_shared_expert_gate
    new_gate = args.scmoe_combine != "add" and not has_gate
    pattern = moe_pattern(args.moe_layer_freq, args.num_layers)
    for layer in (i for i, is_moe in enumerate(pattern) if is_moe):
        block = f"decoder.layers.{layer}."
        for kind in ("weight", "bias") if args.normalization == "LayerNorm" else ("weight",):
            norm = _pop(tensors, f"{block}pre_mlp_layernorm.{kind}", layer)
            if has_shared:  # it has no other reader in a ScMoE block
                tensors[f"{block}pre_mlp_layernorm.{kind}"] = norm
            if args.scmoe_router_norm == "own":
                tensors[f"{block}mlp.shortcut_layernorm.{kind}"] = norm
        if new_gate:
            shared = f"{block}mlp.shared_experts.linear_fc2.weight"
            down = _pop(tensors, shared, layer)
            tensors[shared] = _scale(down, 2.0)
            if args.scmoe_combine == "cg2":
                routed = f"{block}mlp.experts.experts.linear_fc2.weight"
                tensors[routed] = _scale(_pop(tensors, routed, layer), 2.0)
            gates = _gates(args.scmoe_combine, args.hidden_size, down.dtype)
            tensors |= {block + key: value for key, value in gates.items()}
    return tensors


def _pop(tensors: dict[str, LazyTensor], name: str, layer: int) -> LazyTensor:
    if name not in tensors:
        raise ConversionError(f"block {layer} of the model has no tensor {name}")
    return tensors.pop(name)


def _scale(tensor: LazyTensor, factor: float) -> LazyTensor:
    return tensor if factor == 1 else tensor.apply(lambda values: values * factor)


def _normal(shape, std: float, dtype: torch.dtype, *seed: int) -> LazyTensor:
    whole = LazyTensor.full(shape, 0.0, dtype)
    return whole.apply(
        lambda zeros: (std * torch.randn(zeros.shape, generator=_generator(*seed))).to(dtype)
    )


def _generator(*seed: int) -> torch.Generator:
    """A random stream of its own for each part of the model, whatever the order of reading."""
    (state,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
