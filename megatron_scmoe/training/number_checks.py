"""What the numbers of a run may be, said before it starts: some end Megatron in its first step."""

import argparse
import math

from megatron_scmoe.arguments import flag_of, in_flags
from megatron_scmoe.errors import RunError
from megatron_scmoe.validation.settings import as_list


def check_flags(args: argparse.Namespace, has_model: bool) -> None:
    """Check parsed flags, before Megatron judges them.

    Args:
        has_model: see :func:`~megatron_scmoe.training.run_checks.check_flags`.

    Raises:
        RunError: at the first number that is missing, or outside its range.
    """
    _check_least(args, has_model)
    _check_ranges(args)


def needed(has_model: bool) -> list[tuple[str, int]]:
    """Arguments that a run cannot do without, with the least value of each."""
    return [*(_MODEL_NUMBERS if has_model else ()), *_NUMBERS]


_MODEL_NUMBERS = (
    ("num_layers", 1),
    ("hidden_size", 1),
    ("num_attention_heads", 1),
)
_NUMBERS = (
    ("seq_length", 1),
    ("micro_batch_size", 1),
    ("log_interval", 1),
    ("eval_interval", 1),
    ("eval_iters", 0),
    ("seed", 1),
)
_OPTIONAL_NUMBERS = (
    ("global_batch_size", 1),
    ("ckpt_step", 1),
    ("save_interval", 1),
    ("save_retain_interval", 1),
    ("exit_interval", 1),
    ("exit_duration_in_mins", 1),
    ("tensorboard_log_interval", 1),
    ("log_memory_interval", 1),
    ("save_params_interval", 1),
    ("save_activations_interval", 1),
    ("save_tokens_per_expert_interval", 1),
    ("save_wgrads_interval", 1),
    ("save_dgrads_interval", 1),
    ("train_sync_interval", 1),
    ("gpu_sniff_test_interval", 1),
    ("check_weight_hash_across_dp_replicas_interval", 1),
    ("distributed_timeout_minutes", 1),
    ("num_workers", 0),
    ("lr_decay_iters", 1),
    ("lr_decay_samples", 1),
    ("lr_warmup_iters", 0),
    ("lr_warmup_samples", 0),
    ("scmoe_log_overlap_interval", 0),
    ("vocab_size", 1),
    ("make_vocab_size_divisible_by", 1),
    ("max_position_embeddings", 1),
    ("rotary_base", 1),
    ("num_query_groups", 1),
    ("kv_channels", 1),
    ("ffn_hidden_size", 1),
    ("moe_ffn_hidden_size", 1),
    ("moe_shared_expert_intermediate_size", 1),
)
"""Flags with the least value that a run can go on with."""


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("lr", 0, math.inf),
    ("min_lr", 0, math.inf),
    ("decoupled_lr", 0, math.inf),
    ("decoupled_min_lr", 0, math.inf),
    ("lr_warmup_init", 0, math.inf),
    ("weight_decay", 0, math.inf),
    ("clip_grad", 0, math.inf),
    ("adam_eps", 0, math.inf),
    ("adam_beta1", 0, 1),
    ("adam_beta2", 0, 1),
    ("sgd_momentum", 0, 1),
    ("hidden_dropout", 0, 1),
    ("attention_dropout", 0, 1),
    ("init_method_std", 0, math.inf),
    ("layernorm_epsilon", 0, math.inf),
    ("moe_aux_loss_coeff", 0, math.inf),
    ("moe_z_loss_coeff", 0, math.inf),
    ("moe_router_bias_update_rate", 0, math.inf),
    ("moe_input_jitter_eps", 0, 1),
)
"""Flags with what their numbers may be: from the first on, and below the second. Outside Megatron
ends in the midst of the first step, or trains towards what nobody wants."""


def _check_least(args: argparse.Namespace, has_model: bool) -> None:
    for name, least in needed(has_model):
        if getattr(args, name) is None:
            raise RunError(f"{flag_of(name)} is not given", "a run needs it", f"{least} or more")
    for name, least in (*needed(has_model), *_OPTIONAL_NUMBERS):
        value = getattr(args, name)
        if value is not None and value < least:
            raise RunError(in_flags(name, value), "it is too small", f"{least} or more")
    if args.lr is None and not args.skip_train:
        raise RunError("--lr is not given", "a run needs it", "a learning rate, 1e-4 for example")


def _check_ranges(args: argparse.Namespace) -> None:
    for name, least, end in _RANGES:
        given = getattr(args, name)
        for value in as_list(given):
            if value is not None and not least <= value < end:
                accepted = (
                    f"{least:g} or more" if end == math.inf else f"{least:g} to below {end:g}"
                )
                raise RunError(in_flags(name, given), "it is outside its range", accepted)
    for name in ("min_lr", "lr_warmup_init"):
        value = getattr(args, name)
        if args.lr is not None and value is not None and value > args.lr:
            raise RunError(
                in_flags(name, value), f"it is above --lr {args.lr:g}", f"0 to {args.lr:g}"
            )
