"""Megatron's training loop around a ScMoE GPT: data, forward step, model and entry point."""

import time
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_scmoe import (
    command_line,
    compat,
    optimizer_state,
    preflight,
    resuming,
    saved_run,
    tuning,
)
from megatron_scmoe.arguments import given_on_command_line, scmoe_config_from_args
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import in_words
from megatron_scmoe.spec import build_block_spec, describe
from megatron_scmoe.validation import ScMoEConfigError, validate

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def main() -> None:
    """Train, as the flags on the command line say. Exits with status 2 on unusable settings."""
    try:
        args, scmoe = parse_settings()
        if args.eval_interval is None:
            raise ScMoEConfigError(
                "--eval-interval is not given",
                "Megatron counts its evaluations with it",
                "1 or more",
            )
        compat.leave_out_missing_fusions(args)
        config = compat.transformer_config(args)
        validate(scmoe, config)
        preflight.check_tokens(args, get_tokenizer())
        tokens = args.seq_length // args.context_parallel_size
        tuning.check_times(scmoe, tuning.sizes_of(config, args.micro_batch_size, tokens))
    except (ScMoEConfigError, preflight.PreflightError, AssertionError, ValueError) as error:
        fail(in_words(error))
    except BaseException:
        if not command_line.is_first_rank():
            # The first rank may be about to say it in one line.
            time.sleep(command_line.LAST_WORD_S)
        raise

    compat.apply(args)
    model_config = compat.gpt_config(args, config)
    model_config.transformer_layer_spec = partial(_block_spec, scmoe=scmoe)
    if scmoe.expert_slot == "auto":
        model_config.pre_wrap_hooks.append(
            partial(
                tuning.choose_slot, scmoe=scmoe, micro_batch=args.micro_batch_size, sequence=tokens
            )
        )
    print_rank_0(describe(scmoe))
    datasets_provider.is_distributed = True
    pretrain(
        pretrain_cfg_container_from_args(args, model_config),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )


def parse_settings():
    """Parse and validate the command line.

    Returns:
        Megatron's arguments (made global, as its loop expects), and the configuration of ScMoE.

    Raises:
        ScMoEConfigError: for settings that ScMoE cannot work with.
        PreflightError: for files and folders that cannot serve.
    """
    words = given_on_command_line()
    given = parse_args(resuming.adding_args())
    saved = saved_run.find(given)
    if saved is not None:
        resuming.refuse_stock(saved)
    add_args = resuming.adding_args(saved, given)
    given = parse_args(add_args)
    complete = not given.use_checkpoint_args or saved is None or saved.args is not None
    scmoe = scmoe_config_from_args(given)
    if complete:  # if not, Megatron reads the arguments, later; main() validates then
        validate(scmoe, given)
    _refuse_foreign_settings(given)
    preflight.check_files(given)
    args = parse_and_validate_args(add_args)
    if saved is not None:
        resuming.check(args, saved)
        resuming.check_vocabulary(args, saved, get_tokenizer().vocab_size)
        optimizer_state.check(args, saved)
        optimizer_state.settle_schedule(args, saved)
    args.spec = None  # the checkpoint's, of a run that built the same model under --spec
    if args.non_persistent_ckpt_type == "local":
        args.dist_ckpt_optim_fully_reshardable = False  # Megatron cannot
    if args.use_checkpoint_args:
        for line in resuming.overridden(
            words, args, "it is the checkpoint's (--use-checkpoint-args)"
        ):
            print_rank_0(line)
    if scmoe.combine == "cg1":
        args.moe_shared_expert_gate = True  # the spec builds it; Megatron's memory report asks here
    return args, scmoe


def fail(message: str) -> None:
    """Print one line, on the first rank, and exit with status 2."""
    command_line.end(f"pretrain_gpt_scmoe.py: error: {message}", status=2)


def forward_step(data_iterator, model):
    """One micro-batch through the model.

    Returns:
        The loss of each token ([b, s], last stage) or the hidden states, and the loss function.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(
        data_iterator, getattr(model, "vp_stage", None)
    )
    timers("batch-generator").stop()
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, partial(loss_function, loss_mask)


def get_batch(data_iterator, vp_stage: int | None = None) -> tuple[Tensor | None, ...]:
    """This rank's part of the next micro-batch.

    Returns:
        tokens [b, s], labels [b, s], loss mask [b, s], attention mask [b, 1, s, s] or None, position
        ids [b, s]; all None on the middle stages of a pipeline. With context parallelism s is
        this rank's share.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return (None,) * len(BATCH_KEYS)
    args = get_args()
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        data = next(data_iterator)
        batch = {key: data[key].cuda(non_blocking=True) for key in BATCH_KEYS if key in data}
        batch.setdefault("attention_mask", None)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(ignore_virtual=True),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(ignore_virtual=True),
    )
    batch["cu_seqlens"] = None
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    return tuple(batch.get(key) for key in BATCH_KEYS)


def loss_function(loss_mask: Tensor, output: Tensor):
    """Sum of the token losses.

    Args:
        loss_mask: [b, s], 1 where a token counts.
        output: [b, s], the cross entropy of each token in nats.

    Returns:
        The summed loss, the number of tokens counted, and both as ``lm loss`` for the log.
    """
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        rerun = get_rerun_state_machine()
        for reject, message in ((torch.isnan, "found NaN"), (torch.isinf, "found Inf")):
            rerun.validate_result(
                result=loss,
                rejection_func=reject,
                message=f"{message} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def datasets_provider(num_samples, vp_stage: int | None = None):
    """Megatron's train, validation and test datasets with ``num_samples`` samples each."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        data_parallel_size=args.data_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    return BlendedMegatronDatasetBuilder(
        kind, num_samples, partial(_needs_data, vp_stage=vp_stage), config
    ).build()


def _needs_data(vp_stage: int | None) -> bool:
    """Whether this rank reads the datasets: the first TP rank of the first and last stage."""
    return is_first_or_last_pipeline_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0


def _block_spec(model_config, vp_stage: int | None = None, *, scmoe: ScMoEConfig):
    """The callable that Megatron's model builder asks for the spec of a stage."""
    args = get_args()
    local_norm_keys = compat.has_local_norm_keys(args.load, args.ckpt_step)
    return build_block_spec(model_config.transformer, scmoe, vp_stage, local_norm_keys)


_FOREIGN = {
    "spec": ("--spec", "this entry point builds the ScMoE spec itself"),
    "yaml_cfg": ("--yaml-cfg", "settings come from flags"),
    "sft": ("--sft", "packed fine-tuning data is not wired"),
    "dataloader_inter_document_masking": (
        "--dataloader-inter-document-masking",
        "packed sequences are not wired",
    ),
    "hybrid_context_parallel": ("--hybrid-context-parallel", "packed sequences are not wired"),
    "fim_data": ("--fim-data", "fill-in-the-middle data is not wired"),
    "dataloader_fast_cache_load": (
        "--dataloader-fast-cache-load",
        "it needs per-split caches, which are not wired",
    ),
    "per_dataset_sequences_path": ("--per-dataset-sequences-path", "it is not wired"),
    "perform_rl_step": ("--perform-rl-step", "reinforcement learning is not wired"),
    "logits_save_dir": ("--logits-save-dir", "distillation is not wired"),
    "logits_load_dir": ("--logits-load-dir", "distillation is not wired"),
}


def _refuse_foreign_settings(args) -> None:
    """Refuse flags of Megatron's parser that this entry point would otherwise ignore."""
    for name, (flag, reason) in _FOREIGN.items():
        if getattr(args, name):
            raise ScMoEConfigError(flag, reason, "leave the flag out")
