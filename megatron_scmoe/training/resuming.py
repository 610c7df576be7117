"""A run compared with the checkpoint that it loads, before a process group or a model exists.

Only where settings change on purpose are the tensors compared as well, once there is a model.

Megatron compares few of the arguments that define a model. The others, and all of ScMoE's, would be
those of the command line: the weights load, and another model goes on.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.utils import unwrap_model
from megatron.training import get_tokenizer
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_scmoe.arguments import (
    PREFIX,
    defaults,
    flag_of,
    in_flags,
    name_of_flag,
)
from megatron_scmoe.checkpoints.dcp_metadata import read_metadata
from megatron_scmoe.checkpoints.model_arguments import MODEL_ARGUMENTS, is_scmoe, model_arguments
from megatron_scmoe.config import moe_pattern
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.platform.megatron_flags import add_run_args
from megatron_scmoe.training import lr_schedule, optimizer_state
from megatron_scmoe.training.run_defaults import leave_out_one_logger
from megatron_scmoe.training.saved_run import SavedRun, find
from megatron_scmoe.validation.settings import as_list, kinds_with_own_choice

FREE = (
    "vocab_size",  # of the tokenizer: see check_vocabulary
    "padded_vocab_size",  # depends on the tensor-parallel size
    "max_position_embeddings",  # compared where positions are learned
    "moe_router_dtype",
    "scmoe_active_experts",  # what the moving biases aim at
)
"""Arguments of the model that another run may change as it likes: dtypes and how it is trained."""

COMPARED = (
    *(name for name in MODEL_ARGUMENTS if name not in FREE),
    "moe_router_load_balancing_type",
)
"""The arguments that have to be the checkpoint's, or named by ``--scmoe-changed``."""

OF_TRAINING = (
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
    "hidden_dropout",
    "attention_dropout",
    "eod_mask_loss",
    "reset_position_ids",
    "reset_attention_mask",
)
"""What a run that goes on trains for, which is that of its own flags; a line says what is new."""


def adding_args(
    given: argparse.Namespace, chosen: Mapping[str, Any], saved: SavedRun | None
) -> tuple[Callable, dict[str, Any]]:
    """An ``extra_args_provider`` for Megatron's parser, of a run that loads ``saved``.

    With ``--use-checkpoint-args`` what defines the model is the checkpoint's, whatever the command line
    says; :func:`overridden` tells the user. Megatron does that for some of it alone (not for the norms'
    epsilon, the rope's scaling, the router's groups), and knows nothing of ``--scmoe-*``.

    Args:
        given: the parsed flags.
        chosen: what the run chooses where no flag is given.

    Returns:
        The provider, and what of ``chosen`` it takes.
    """
    free: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    if saved is not None and saved.args is not None and given.use_checkpoint_args:
        free_too = changed(given)
        for name, value in model_arguments(saved.args).items():
            (free if name in FREE or name in free_too else fixed)[name] = value
        if (length := getattr(saved.args, "seq_length", None)) is not None:
            free["seq_length"] = length  # no setting of the model: a flag may say another one
    taken = {name: value for name, value in chosen.items() if name not in {*free, *fixed}}
    return partial(_add_args, defaults=taken | free, fixed=fixed), taken


def changed(args: argparse.Namespace) -> set[str]:
    """What ``--scmoe-changed`` names, by the arguments' names."""
    accepted = {*COMPARED, *FREE, "tokenizer_type", "tokenizer_model", "data_path"}
    names = set()
    for word in args.scmoe_changed or ():
        name = name_of_flag(word)
        if name not in accepted:
            raise ScMoEConfigError(
                f"--scmoe-changed {word}",
                "it is no setting of the model",
                "flags without the dashes in front: rotary-base, moe-router-topk, scmoe-tap, ...",
            )
        names.add(name)
    return names


def rows_to_keep(given: argparse.Namespace, words: Mapping[str, Any], saved: SavedRun) -> dict:
    """``padded_vocab_size`` of the checkpoint, for a run that does not say another one.

    Megatron pads the vocabulary by the number of tensor-parallel ranks. On another layout it would cut
    rows of the embedding off, or add rows of zeros, which its loss counts.

    Args:
        given: the parsed flags.
        words: what the command line says and leaves to no default.
    """
    rows = getattr(saved.args, "padded_vocab_size", None)
    unit = getattr(saved.args, "make_vocab_size_divisible_by", None)
    says_so = words.get("make_vocab_size_divisible_by", unit) != unit
    if given.padded_vocab_size is not None or says_so or given.use_checkpoint_args:
        return {}
    if not rows or _OF_VOCABULARY & changed(given):
        return {}
    return {} if rows % given.tensor_model_parallel_size else {"padded_vocab_size": rows}


_OF_VOCABULARY = {"vocab_size", "tokenizer_type", "tokenizer_model"}


def settle(args: argparse.Namespace, saved: SavedRun, where: str = "") -> None:
    """Compare a run with what it loads, let it go on where it may, and say what is new.

    Args: as of :func:`check`.

    Raises:
        ScMoEConfigError: if it cannot go on.
    """
    check(args, saved, where)
    check_vocabulary(args, saved, get_tokenizer().vocab_size)
    optimizer_state.check(args, saved)
    lr_schedule.settle(args, saved)
    lr_schedule.go_on_from(saved, args)
    say_what_is_trained_for(args, saved)


def check(args: argparse.Namespace, saved: SavedRun, where: str = "") -> None:
    """Refuse to go on from a checkpoint of another model.

    Args:
        args: of this run, validated by Megatron.
        saved: what it loads.
        where: before flags of ScMoE, in what is recommended: "$SCMOE_ARGS with ".

    Raises:
        ScMoEConfigError: at all settings of the model that differ, by flag, saved and given value.
    """
    before, free_too = saved.args, changed(args)
    if before is None:
        print_rank_0(
            f"WARNING: {saved.given}: {saved.path} says nothing of its model that could be compared "
            "with the flags"
        )
        return
    refuse_stock(saved)
    if not hasattr(before, f"{PREFIX}tap"):
        print_rank_0(
            f"WARNING: {saved.given}: an older version saved {saved.path} under --spec without its "
            "--scmoe-* flags; they are taken to be those of this run"
        )
    found = {n: value for n, value in differences(args, before).items() if n not in free_too}
    if found:
        mine = ", ".join(in_flags(name, getattr(args, name)) for name in found)
        theirs = ", ".join(in_flags(name, value) for name, value in found.items())
        words = " ".join(flag_of(name).removeprefix("--") for name in found)
        advice = ", ".join(
            (where if name.startswith(PREFIX) else "") + in_flags(name, value)
            for name, value in found.items()
        )
        restored = "" if args.use_checkpoint_args else "--use-checkpoint-args; "  # as far as it can
        raise ScMoEConfigError(
            mine,
            f"{saved.path} was trained with {theirs}",
            f"{advice}; {restored}or, for another model on purpose, {where}--scmoe-changed {words}",
        )


def refuse_stock(saved: SavedRun) -> None:
    """Raise ScMoEConfigError if the checkpoint is of a model without a tap."""
    if saved.args is not None and not is_scmoe(saved.args):
        raise ScMoEConfigError(
            saved.given,
            f"{saved.path} is of a stock Megatron model: it was not trained with a tap",
            "a ScMoE model made of it: scmoe convert upcycle --input "
            f"{saved.given.split()[1]} --save FOLDER",
        )


def differences(args: argparse.Namespace, saved: argparse.Namespace) -> dict[str, Any]:
    """The arguments in :data:`COMPARED` by which another model would go on, and their saved values.

    An argument that Megatron or this package did not have yet when it was saved had the value that is
    the default now. What the model does not use does not count.
    """
    standard = {
        name: value
        for name, value in defaults().items()
        if value is not None and not name.startswith(PREFIX)  # with_defaults knows these
    }
    older = argparse.Namespace(**standard | vars(saved))
    names = [name for name in COMPARED if hasattr(older, name) and hasattr(args, name)]
    if args.position_embedding_type == "learned_absolute":
        names.append("max_position_embeddings")
    return {
        name: getattr(older, name)
        for name in names
        if _is_used(name, args) and _meaning(name, args) != _meaning(name, older)
    }


def check_tensors(chunks: list, args: argparse.Namespace) -> list:
    """Compare the tensors of a model that departs from its checkpoint; all ranks call this together.

    A hook of Megatron's model builder: it is the model at hand that knows its tensors.

    Returns:
        ``chunks``, as such hooks do.

    Raises:
        ScMoEConfigError: on every rank, at the first tensor that Megatron could not load on one.
    """
    saved = find(args)
    if saved is None or not saved.is_distributed:
        return chunks
    found: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, _first_misfit(chunks, saved))
    reason = next((each for each in found if each), None)
    if reason is not None:
        raise ScMoEConfigError(
            f"--scmoe-changed {' '.join(args.scmoe_changed)}",
            reason,
            "settings under which each tensor keeps its name and shape",
        )
    return chunks


def _first_misfit(chunks: list, saved: SavedRun) -> str | None:
    """What keeps Megatron from loading these parts of a model, in words."""
    there = read_metadata(saved.path).state_dict_metadata
    form = saved.state.get("content_metadata")
    for chunk in unwrap_model(chunks):
        wanted = chunk.sharded_state_dict(metadata=form and dict(form))
        apply_factories(wanted)
        for tensor in nested_values(wanted):
            if not isinstance(tensor, ShardedTensor):
                continue
            stored = there.get(tensor.key)
            if not isinstance(stored, TensorStorageMetadata):
                return f"{saved.path} has no {tensor.key}, which the model has"
            size, shape = tuple(stored.size), tuple(tensor.global_shape)
            if size != shape and not tensor.allow_shape_mismatch:
                return f"{tensor.key} is of {size} in {saved.path}, and of {shape} in the model"
    return None


def say_what_is_trained_for(args: argparse.Namespace, saved: SavedRun) -> None:
    """Name what of :data:`OF_TRAINING` is not as it was, as a flag that was left out would be."""
    before = saved.args
    if before is None or saved.begins_anew(args) or args.skip_train:
        return
    if not getattr(before, "consumed_train_samples", 0):  # converted, or not begun
        return
    found = [
        name
        for name in OF_TRAINING
        if hasattr(before, name) and as_list(getattr(before, name)) != as_list(getattr(args, name))
    ]
    if found:
        mine = ", ".join(in_flags(name, getattr(args, name)) for name in found)
        theirs = ", ".join(in_flags(name, getattr(before, name)) for name in found)
        print_rank_0(f"WARNING: {mine}: {saved.path} was trained with {theirs} so far")


def overridden(given: dict[str, Any], args: argparse.Namespace, reason: str) -> list[str]:
    """A line for each argument that was given and has another value now.

    Args:
        given: what the command line says and leaves to no default.
        args: what the run has.
        reason: who decided.
    """
    shown = {name: (in_flags(name, value), in_flags(name, getattr(args, name)))
             for name, value in given.items()}  # fmt: skip
    return [
        f"WARNING: {words} was given, and {used} is used: {reason}"
        for words, used in shown.values()
        if words != used
    ]


def check_vocabulary(args: argparse.Namespace, saved: SavedRun, tokens: int) -> None:
    """Refuse a tokenizer of another size: Megatron cuts or fills up the embedding without a word.

    Of another padding it is said that there is one.

    Args:
        tokens: of this run's tokenizer.

    Raises:
        ScMoEConfigError: if the checkpoint's embedding has fewer rows, or more than padding explains.
    """
    before = saved.args
    rows = getattr(before, "padded_vocab_size", None)
    if not rows or _OF_VOCABULARY & changed(args):
        return
    known = getattr(before, "vocab_size", None)
    unit = getattr(before, "make_vocab_size_divisible_by", 1)
    unit *= getattr(before, "tensor_model_parallel_size", 1)
    has_flag_alone = known and getattr(before, "tokenizer_type", None) == "NullTokenizer"
    explained = tokens == known or (not has_flag_alone and tokens + unit > rows)
    if tokens > rows or not explained:
        was = f"{known} tokens and " if known else ""
        raise ScMoEConfigError(
            f"a tokenizer of {tokens} tokens ({args.tokenizer_type} {args.tokenizer_model or ''})",
            f"{saved.path} was trained with {was}an embedding of {rows} rows",
            "its tokenizer, or --scmoe-changed tokenizer-type for another one on purpose",
        )
    if args.padded_vocab_size != rows:
        print_rank_0(
            f"WARNING: the embedding has {args.padded_vocab_size} rows, and {rows} in {saved.path}: "
            f"the loss changes, as it counts padding rows (--padded-vocab-size {rows} keeps them, "
            f"where --tensor-model-parallel-size divides it)"
        )


def _add_args(parser, *, defaults: dict[str, Any], fixed: dict[str, Any]):
    """Add the flags of a run; ``fixed`` holds whatever flag is given, ``defaults`` where none is."""
    parser = leave_out_one_logger(add_run_args(parser))
    parser.set_defaults(**defaults)
    parse = parser.parse_known_args

    def parse_and_fix(*args, **kwargs):
        found, rest = parse(*args, **kwargs)
        vars(found).update(fixed)
        return found, rest

    parser.parse_known_args = parse_and_fix
    return parser


_ROPE = ("rope", "yarn", "mrope")
_OF_MLA = {
    "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type",
    "rotary_scaling_factor", "mscale", "mscale_all_dim", "scmoe_mla_scale", "scmoe_mla_norm_epsilon",
}  # fmt: skip


def _is_used(name: str, args: argparse.Namespace) -> bool:
    """Whether a model of these arguments computes anything with this one."""
    if name in _OF_MLA:
        return bool(args.multi_latent_attention)
    if name.startswith("yarn_"):
        return args.position_embedding_type == "yarn"
    if name == "rope_scaling_factor":
        return bool(args.use_rope_scaling)
    if "rotary" in name or "rope" in name:
        return bool(args.multi_latent_attention or args.position_embedding_type in _ROPE)
    if name.startswith("mup_"):
        return bool(args.use_mup)
    if name == "openai_gelu":
        return not args.swiglu
    return name != "group_query_attention"  # the number of groups says it


def _meaning(name: str, args: argparse.Namespace) -> Any:
    """What an argument's value comes to, in one form for all ways to say it."""
    value = getattr(args, name)
    if name == "moe_layer_freq":
        return moe_pattern(value, args.num_layers) if args.num_experts else None
    if name == "add_qkv_bias":  # a converted checkpoint's was not derived by Megatron
        return bool(value or args.add_bias_linear)
    if name == "num_query_groups":
        return value if args.group_query_attention else args.num_attention_heads
    if name == "scmoe_mla_norm_epsilon":
        return args.layernorm_epsilon if value is None else value
    if name == "scmoe_expert_bias":
        return value != "none"  # the rule by which it moves is a matter of training
    if name == "moe_router_load_balancing_type":  # the other kinds add a loss
        return kinds_with_own_choice(value)
    return list(value) if isinstance(value, tuple) else value
