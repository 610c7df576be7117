"""The optimizer's state, resumed on any layout.

Megatron stores the optimizer's tensors one by one and finds them again on any layout. Around them it
stores lists of parameter groups, one for each optimizer: one without expert parallelism, and two with
it (dense parameters and experts), each with as many parameters as one rank had, and more groups where
``--decoupled-lr`` sets some apart. Of all that, only the count of steps is state; the rest follows from
the flags and the model at hand.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.training import get_args
from megatron.training.checkpointing import get_checkpoint_tracker_filename

from megatron_scmoe.arguments import in_flags
from megatron_scmoe.checkpoints import locate
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.training.saved_run import SavedRun

RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")
"""Megatron's formats of the distributed optimizer's state that load on any layout."""

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
_OF_FILES: dict[str, Callable[[Any], Any]] = {
    "use_distributed_optimizer": bool,
    "bf16": bool,
    "fp16": bool,
    "decoupled_lr": lambda rate: rate is not None,  # another one is a rate of the same group
}
"""By what the state lies otherwise in the files of ranks, and what of its value matters."""

_FRESH = "--no-load-optim, which begins with a fresh optimizer and schedule"


def is_loaded(args: argparse.Namespace, saved: SavedRun) -> bool:
    """Whether the run goes on with the state of the checkpoint's optimizer and schedule."""
    omitted = args.no_load_optim or getattr(saved.args, "no_save_optim", False)
    return not (saved.begins_anew(args) or omitted)


def check(args: argparse.Namespace, saved: SavedRun) -> None:
    """Refuse files, and a state of the optimizer, that cannot be loaded into this run's.

    Raises:
        ScMoEConfigError: it names what has to be otherwise.
    """
    before = saved.args
    if before is None:
        return
    theirs = [in_flags(n, getattr(before, n)) for n in _SIZES if _differs(n, args, before)]
    mine = [in_flags(n, getattr(args, n)) for n in _SIZES if _differs(n, args, before)]
    if theirs and not saved.is_distributed:
        raise ScMoEConfigError(
            " ".join(mine),
            f"{saved.path} has a file for each rank of {' '.join(theirs)}",
            f"{' '.join(theirs)}; from these --ckpt-convert-format torch_dist converts it",
        )
    without = getattr(before, "no_save_optim", False)
    if without and not (args.no_load_optim or args.skip_train or saved.begins_anew(args)):
        raise ScMoEConfigError(
            saved.given,
            f"{saved.path} has no state of an optimizer (--no-save-optim)",
            f"{_FRESH}; --finetune begins at iteration 0",
        )
    if not args.finetune and not saved.given.startswith(locate.PRETRAINED):
        _check_as_megatron_does(args, before, saved)
    if not is_loaded(args, saved):
        return
    if getattr(before, "optimizer", args.optimizer) != args.optimizer:
        raise ScMoEConfigError(
            f"--optimizer {args.optimizer}",
            f"{saved.path} holds the state of {before.optimizer}",
            f"--optimizer {before.optimizer}, or {_FRESH}",
        )
    if not saved.is_distributed:
        _check_files_of_ranks(args, before, saved)
        return
    content = saved.state.get("content_metadata") or {}
    form = content.get("distrib_optim_sharding_type")
    if theirs and form is not None and form not in RESHARDABLE:
        raise ScMoEConfigError(
            " ".join(mine),
            f"{saved.path} holds the optimizer's state as it lay in the memory of "
            f"{' '.join(theirs)} (no --dist-ckpt-optim-fully-reshardable)",
            f"{' '.join(theirs)}, or {_FRESH}",
        )
    _check_kind(args, saved, form)
    if form in (None, *RESHARDABLE):
        _check_tensors(args, before, saved)


def load_on_any_layout() -> None:
    """Make Megatron load the optimizer's state of a checkpoint of any layout, in any groups."""
    ChainedOptimizer.load_state_dict = _load_state_dict
    ChainedOptimizer.sharded_state_dict = _sharded_state_dict


def _differs(name: str, args: argparse.Namespace, saved: argparse.Namespace) -> bool:
    return (getattr(saved, name, None) or 1) != (getattr(args, name) or 1)


def _check_as_megatron_does(
    args: argparse.Namespace, before: argparse.Namespace, saved: SavedRun
) -> None:
    """Compare what Megatron asserts when the checkpoint is loaded, but for ``--finetune``."""
    for name in ("num_layers", "hidden_size", "num_attention_heads"):
        if getattr(before, name) != getattr(args, name):  # by --scmoe-changed
            raise ScMoEConfigError(
                in_flags(name, getattr(args, name)),
                f"{saved.path} was trained with {in_flags(name, getattr(before, name))}, and Megatron "
                "goes on with that alone",
                f"{in_flags(name, getattr(before, name))}, or --finetune, which begins at iteration 0",
            )
    draws_apart, mine = getattr(before, "data_parallel_random_init", False), args.global_batch_size
    if args.data_parallel_random_init and not draws_apart:
        raise ScMoEConfigError(
            "--data-parallel-random-init",
            f"{saved.path} was trained without it, and has one state of the random generators",
            "leave the flag out, or --finetune with it",
        )
    if args.phase_transition_iterations and getattr(before, "global_batch_size", mine) != mine:
        raise ScMoEConfigError(
            f"--phase-transition-iterations with --global-batch-size {mine}",
            f"{saved.path} was trained with --global-batch-size {before.global_batch_size}, by which "
            "Megatron counts the samples of each phase",
            f"--global-batch-size {before.global_batch_size}",
        )


def _check_files_of_ranks(
    args: argparse.Namespace, before: argparse.Namespace, saved: SavedRun
) -> None:
    """Compare what a checkpoint of ``--ckpt-format torch`` holds by number, not by name."""
    for name, comes_to in _OF_FILES.items():
        theirs, mine = getattr(before, name, None), getattr(args, name)
        if comes_to(theirs) != comes_to(mine):
            raise ScMoEConfigError(
                in_flags(name, mine),
                f"{saved.path} was trained with {in_flags(name, theirs)}, and its files hold the "
                "optimizer's state for that",
                f"{in_flags(name, theirs)}, or {_FRESH}",
            )
    folder = str(saved.path.parent)
    last = locate.tracker_says(folder)
    if args.use_distributed_optimizer and args.ckpt_step and str(args.ckpt_step) != last:
        raise ScMoEConfigError(
            f"--ckpt-step {args.ckpt_step} with --use-distributed-optimizer",
            f"of --ckpt-format torch Megatron would load the weights of {saved.path}, and the "
            f"optimizer's state of iteration {last}",
            f"echo {args.ckpt_step} > {get_checkpoint_tracker_filename(folder)}, without --ckpt-step; "
            f"or {_FRESH}",
        )


def _check_kind(args: argparse.Namespace, saved: SavedRun, form: str | None) -> None:
    """Compare the kinds of tensors: main weights in fp32, and those of a distributed optimizer."""
    if args.use_distributed_optimizer and form is None:
        raise ScMoEConfigError(
            "--use-distributed-optimizer",
            f"{saved.path} was trained without it",
            f"leave the flag out, or {_FRESH}",
        )
    if not args.use_distributed_optimizer and form not in (None, *RESHARDABLE):
        raise ScMoEConfigError(
            "no --use-distributed-optimizer",
            f"{saved.path} was trained with it, and without --dist-ckpt-optim-fully-reshardable",
            f"--use-distributed-optimizer, or {_FRESH}",
        )
    has_main_weights = "fp32_param" in saved.optimizer_states() or form is not None
    needs_main_weights = args.bf16 or args.fp16 or args.use_distributed_optimizer
    if bool(needs_main_weights) != has_main_weights:
        before = next((f"--{n}" for n in ("bf16", "fp16") if getattr(saved.args, n)), "fp32")
        mine = next((f"--{n}" for n in ("bf16", "fp16") if getattr(args, n)), "fp32")
        raise ScMoEConfigError(
            mine,
            f"the optimizer's state in {saved.path} is that of a model in {before}",
            f"{before}, or {_FRESH}",
        )


def _check_tensors(args: argparse.Namespace, before: argparse.Namespace, saved: SavedRun) -> None:
    """Refuse a checkpoint without the tensors that this run's optimizer keeps for its parameters."""
    needed = {"adam": "exp_avg", "lion": "exp_avg", "sgd": "momentum_buffer"}.get(args.optimizer)
    is_needed = args.optimizer != "sgd" or args.sgd_momentum
    if args.skip_train or not is_needed or needed in {None, *saved.optimizer_states()}:
        return
    if args.optimizer == "sgd" and not before.sgd_momentum:
        raise ScMoEConfigError(
            f"--sgd-momentum {args.sgd_momentum}",
            f"{saved.path} was trained with --sgd-momentum {before.sgd_momentum}",
            f"--sgd-momentum {before.sgd_momentum}, or {_FRESH}",
        )
    raise ScMoEConfigError(
        saved.given,
        f"{saved.path} has no {needed} of {args.optimizer}: the optimizer had not taken a step, as "
        "where the loss scale was too large for each iteration so far",
        _FRESH,
    )


_KINDS = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)
_load_one_state = ChainedOptimizer.load_state_dict
_plain_sharded_state_dict = ChainedOptimizer.sharded_state_dict


def _sharded_state_dict(
    chain: ChainedOptimizer, model_sharded_state_dict: dict, is_loading: bool = False, **kwargs: Any
) -> dict:
    """In place of ``ChainedOptimizer.sharded_state_dict``: see :func:`load_on_any_layout`.

    Megatron merges what it asks for with what is stored, and lists of groups of another length do not
    merge. So none are asked for: :func:`_complete` makes them. To SGD it gives no way to make room for
    the momentum that is loaded.
    """
    optimizers = chain.chained_optimizers
    is_known = all(type(each) in _KINDS for each in optimizers)
    if is_loading and is_known:
        for optimizer in optimizers:
            if optimizer.init_state_fn is None and not optimizer.is_stub_optimizer:
                optimizer.init_state_fn = _init_momentum
    state = _plain_sharded_state_dict(chain, model_sharded_state_dict, is_loading, **kwargs)
    if is_loading and is_known:
        for part in [state] if len(optimizers) == 1 else state.values():
            _inner(part).pop("param_groups", None)
    return state


def _init_momentum(optimizer: torch.optim.SGD, config: OptimizerConfig) -> None:
    """The state of SGD before its first step: a momentum of 0, where it has one."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _load_state_dict(chain: ChainedOptimizer, state_dict: Any) -> None:
    """In place of ``ChainedOptimizer.load_state_dict``: see :func:`load_on_any_layout`.

    What comes in is merged: tensors under the optimizers of this layout, the rest under those of the
    checkpoint's, each of them by number if there are several.
    """
    optimizers = chain.chained_optimizers
    if isinstance(state_dict, dict) and all(type(each) in _KINDS for each in optimizers):
        several = [part for key, part in state_dict.items() if isinstance(key, int)]
        saved = [part for part in (state_dict, *several) if _is_of_the_checkpoint(part)]
        if saved:
            if len(optimizers) == 1:
                parts = {0: state_dict}
            else:
                parts = {i: state_dict.get(i, {}) for i in range(len(optimizers))}
            for optimizer, part in zip(optimizers, parts.values(), strict=True):
                _complete(optimizer, part, saved)
            state_dict = parts[0] if len(optimizers) == 1 else parts
    _load_one_state(chain, state_dict)


def _inner(part: dict) -> dict:
    """The state of PyTorch's optimizer in that of Megatron's."""
    return part.get("optimizer", part)


def _is_of_the_checkpoint(part: dict) -> bool:
    """Whether it has parameter groups that were stored, not those of this layout: bare lists."""
    return any("lr" in group for group in _inner(part).get("param_groups", ()))


def _complete(optimizer: MegatronOptimizer, part: dict, saved: list[dict]) -> None:
    """Give a state of this layout the parameter groups of this run and the steps of the checkpoint."""
    if optimizer.is_stub_optimizer:
        return
    inner = part if isinstance(optimizer, FP32Optimizer) else part.setdefault("optimizer", {})
    groups = [group for other in saved for group in _inner(other)["param_groups"]]
    keep = _KEPT if get_args().use_checkpoint_opt_param_scheduler else ("step",)
    found = optimizer.optimizer.state_dict()["param_groups"]
    inner.setdefault("state", {})  # SGD without momentum has none
    inner["param_groups"] = [group | _kept(group, groups, keep) for group in found]
    for group, own in zip(optimizer.optimizer.param_groups, inner["param_groups"], strict=True):
        # By these Megatron finds the stored group of each.
        group.update({name: own[name] for name in keep if name != "step" and name in own})
    if "common_step" in (state := _inner(saved[0]).get("state", {})):
        inner.setdefault("state", {})["common_step"] = state["common_step"]
    for name in ("grad_scaler", "param_state_sharding_type"):
        if name not in part and name in saved[0]:
            part[name] = saved[0][name]
    if "grad_scaler" in part and not part["grad_scaler"]:  # of --loss-scale, which never moves
        part["grad_scaler"] = optimizer.grad_scaler.state_dict()


_KEPT = ("step", "max_lr", "min_lr", "start_wd", "end_wd")
_ALIKE = ("wd_mult", "lr_mult", "default_config")
"""What tells groups apart, but for their rates; ``default_config`` is false under --decoupled-lr."""


def _kept(group: dict, saved: list[dict], names: tuple[str, ...]) -> dict:
    """What of a checkpoint's groups goes on in this group; steps are the same in all."""
    alike = [g for g in saved if all(g.get(n, group.get(n)) == group.get(n) for n in _ALIKE)]
    steps = [g for g in saved if "step" in g]
    return {n: g[n] for n in names for g in (steps if n == "step" else alike)[:1] if n in g}
