"""Megatron's training loop around a ScMoE GPT: data, forward step, model and entry point."""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_scmoe.analysis import slot_tuner
from megatron_scmoe.arguments import given_on_command_line, scmoe_config_from_args
from megatron_scmoe.checkpoints.torch_dist import only_safe_types
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError, ScMoEError, judged_by_megatron
from megatron_scmoe.model.layer_spec import describe, stage_spec
from megatron_scmoe.platform import command_line, launch, megatron_workarounds
from megatron_scmoe.platform.megatron_flags import add_run_args, prepare_parser
from megatron_scmoe.training import (
    async_saves,
    data_identity,
    failed_saves,
    finite_checks,
    input_checks,
    optimizer_state,
    resuming,
    run_checks,
    run_defaults,
    saved_run,
    schedule_trial,
    speed_choices,
    whole_checkpoint,
)
from megatron_scmoe.training.heartbeats import Heartbeats
from megatron_scmoe.training.iterations import Iterations
from megatron_scmoe.training.overlap_monitor import OverlapMonitor
from megatron_scmoe.training.parameter_gathers import ParameterGathers
from megatron_scmoe.training.saved_run import SavedRun
from megatron_scmoe.validation.rules import validate

BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


@only_safe_types()  # a checkpoint's objects may be anyone's
def main() -> None:
    """Train, as the flags on the command line say.

    Raises:
        ScMoEError: for settings, files and folders that cannot serve; before anything is built, or,
            of what only the ranks together or the GPU's driver can tell, as the model is built.
            Later only :class:`~megatron_scmoe.training.finite_checks.NotFiniteError`.
    """
    launch.check()
    args, scmoe = parse_settings()
    megatron_workarounds.leave_out_missing_fusions(args)
    with judged_by_megatron():
        config = megatron_workarounds.transformer_config(args)
    validate(scmoe, config)
    input_checks.check_tokens(args, get_tokenizer())
    run_checks.check_disk(args)
    tokens = args.seq_length // args.context_parallel_size
    slot_tuner.check_times(scmoe, slot_tuner.sizes_of(config, args.micro_batch_size, tokens))
    iterations = Iterations()
    before_wrapped, once_wrapped = _hear_of_iterations(iterations, args, scmoe, config)

    megatron_workarounds.apply(args)
    optimizer_state.load_on_any_layout()
    finite_checks.install(args.check_for_nan_in_loss_and_grad)
    with judged_by_megatron():
        model_config = megatron_workarounds.gpt_config(args, config)
        settings = pretrain_cfg_container_from_args(args, model_config)
    model_config.transformer_layer_spec = partial(
        stage_spec,
        scmoe=scmoe,
        local_norm_keys=megatron_workarounds.has_local_norm_keys(args.load, args.ckpt_step),
    )
    if scmoe.expert_slot == "auto":
        model_config.pre_wrap_hooks.append(
            partial(
                slot_tuner.choose_slot,
                scmoe=scmoe,
                micro_batch=args.micro_batch_size,
                sequence=tokens,
            )
        )
    model_config.pre_wrap_hooks += before_wrapped
    model_config.post_wrap_hooks += once_wrapped
    print_rank_0(describe(scmoe))
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks for it
    if args.async_save and args.async_strategy == "mcore":
        async_saves.install(args.exit_signal)
    heartbeats = Heartbeats()
    iterations.listeners.append(heartbeats.iteration_begins)
    with (
        finite_checks.told_in_one_line(),
        failed_saves.told_in_one_line(args.save),
        heartbeats.name_who_is_lost(),
    ):
        pretrain(
            settings,
            datasets_provider,
            ModelType.encoder_or_decoder,
            partial(forward_step, iterations=iterations),
        )


def _hear_of_iterations(iterations: Iterations, args, scmoe: ScMoEConfig, config) -> tuple:
    """Let all that acts once an iteration listen.

    Returns:
        Hooks of Megatron's model builder, by which these find what they act on: before it wraps the
        model, and once it has.
    """
    before, once = [], []
    schedules = schedule_trial.prepare(args, scmoe, config, given_on_command_line(), iterations)
    if schedules is not None:
        before.append(schedules.attach)
    if args.overlap_param_gather and not args.align_param_gather:
        gathers = ParameterGathers()
        once.append(gathers.attach)
        iterations.listeners.append(gathers.iteration_begins)
    monitor = OverlapMonitor(args.scmoe_log_overlap_interval, scmoe, config)
    before.append(monitor.attach)
    iterations.listeners.append(monitor.iteration_begins)
    iterations.over.append(monitor.iteration_is_over)
    return before, once


def parse_settings():
    """Parse and validate the command line.

    Returns:
        Megatron's arguments (made global, as its loop expects), and the configuration of ScMoE.

    Raises:
        ScMoEConfigError: for settings that ScMoE cannot work with.
        InputError: for files and folders that cannot serve.
        SettingsError: for settings that Megatron cannot work with.
        UsageError: for a command line that cannot be parsed.
    """
    given = _parse_args(lambda parser: run_defaults.leave_open(add_run_args(parser)))
    words = given_on_command_line()
    chosen = run_defaults.choose(given)
    saved = saved_run.find(given)
    if saved is not None:
        resuming.refuse_stock(saved)
        chosen |= whole_checkpoint.step_to_name(given, saved.path)
    add_args, chosen = resuming.adding_args(given, chosen, saved)
    given = _parse_args(add_args)
    if chosen and command_line.is_first_rank():
        print(run_defaults.describe(chosen), flush=True)
    complete = not given.use_checkpoint_args or saved is None or saved.args is not None
    scmoe = scmoe_config_from_args(given)
    run_checks.check_flags(given, has_model=complete)
    if complete:  # if not, Megatron reads the arguments, later; main() validates then
        validate(scmoe, given)
    _refuse_foreign_settings(given)
    input_checks.check_files(given)
    if saved is not None and given.rank == 0:
        data_identity.check(given, saved, input_checks.prefixes(given))
    if complete:
        fast = speed_choices.choose(given, words, saved)
        add_args, _ = resuming.adding_args(given, chosen | fast.values, saved)
        scmoe = scmoe_config_from_args(argparse.Namespace(**vars(given) | fast.values))
        os.environ |= {name: value for name, (value, _) in fast.environment.items()}
        if (fast.choices or fast.notes) and command_line.is_first_rank():
            print(speed_choices.describe(fast), flush=True)
    with _told_if_accepted():
        with judged_by_megatron():
            args = parse_and_validate_args(partial(prepare_parser, add_args))
        input_checks.make_paths_absolute(args)
        if saved is not None:
            _go_on_from(saved, args, words)
    args.spec = None  # the checkpoint's, of a run that built the same model under --spec
    if args.non_persistent_ckpt_type == "local":
        args.dist_ckpt_optim_fully_reshardable = False  # Megatron cannot
    if scmoe.combine == "cg1":
        args.moe_shared_expert_gate = True  # the spec builds it; Megatron's memory report asks here
    return args, scmoe


def _parse_args(add_args):
    with judged_by_megatron():
        return parse_args(partial(prepare_parser, add_args))


@contextlib.contextmanager
def _told_if_accepted() -> Iterator[None]:
    """Hold back what is printed, 800 lines of arguments, so that it does not bury a refusal."""
    held = io.StringIO()
    try:
        with contextlib.redirect_stdout(held):
            yield
    except ScMoEError:
        raise
    except BaseException:
        print(held.getvalue(), end="", flush=True)
        raise
    print(held.getvalue(), end="", flush=True)


def _go_on_from(saved: SavedRun, args, given: dict) -> None:
    """Compare the run with what it loads, and say what of the flags given is the checkpoint's now."""
    resuming.check(args, saved)
    resuming.check_vocabulary(args, saved, get_tokenizer().vocab_size)
    optimizer_state.check(args, saved)
    optimizer_state.settle_schedule(args, saved)
    if args.use_checkpoint_args:
        reason = "it is the checkpoint's (--use-checkpoint-args)"
        for line in resuming.overridden(given, args, reason):
            print_rank_0(line)
    _say_what_is_finished(saved, args)


def _say_what_is_finished(saved: SavedRun, args) -> None:
    """If nothing is left to train, say so, and do not write the last checkpoint anew in its place."""
    done = saved.state.get("iteration", 0)
    goes_on = not (saved.is_release or args.finetune or saved.given.startswith("--pretrained"))
    if not (goes_on and args.train_iters and done >= args.train_iters) or args.skip_train:
        return
    print_rank_0(
        f"> nothing is left to train: {saved.path} has {done} iterations, and --train-iters is "
        f"{args.train_iters}"
    )
    if (
        args.save
        and not args.log_progress
        and os.path.realpath(args.save) == os.path.realpath(saved.path.parent)
    ):
        args.save = None


def forward_step(data_iterator, model, iterations: Iterations | None = None):
    """One micro-batch through the model.

    Args:
        iterations: is told of it.

    Returns:
        The loss of each token ([b, s], last stage) or the hidden states, and the loss function.
    """
    if iterations is not None:
        iterations.micro_batch_begins(is_training=model.training)
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(
        data_iterator, get_attr_wrapped_model(model, "vp_stage")
    )
    timers("batch-generator").stop()
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    # The last stage calls it, and has a mask.
    return output, partial(loss_function, loss_mask)  # type: ignore[arg-type]


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
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    if get_args().check_for_nan_in_loss_and_grad:
        rerun = get_rerun_state_machine()
        loss_for_checks = report[0]  # a copy: the schedule scales the loss in place
        for reject, message in ((torch.isnan, "found NaN"), (torch.isinf, "found Inf")):
            rerun.validate_result(
                result=loss_for_checks,
                rejection_func=reject,
                message=f"{message} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
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
    data_identity.keep(args, input_checks.prefixes(args))
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    return BlendedMegatronDatasetBuilder(
        kind, num_samples, partial(_needs_data, vp_stage=vp_stage), config
    ).build()


def _needs_data(vp_stage: int | None) -> bool:
    """Whether this rank reads the datasets: the first TP rank of the first and last stage."""
    return is_first_or_last_pipeline_stage(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0


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
    "inprocess_restart": ("--inprocess-restart", "restarts within a process are not wired"),
    "perform_rl_step": ("--perform-rl-step", "reinforcement learning is not wired"),
    "logits_save_dir": ("--logits-save-dir", "distillation is not wired"),
    "logits_load_dir": ("--logits-load-dir", "distillation is not wired"),
}


def _refuse_foreign_settings(args) -> None:
    """Refuse flags of Megatron's parser that this entry point would otherwise ignore."""
    for name, (flag, reason) in _FOREIGN.items():
        if getattr(args, name):
            raise ScMoEConfigError(flag, reason, "leave the flag out")
