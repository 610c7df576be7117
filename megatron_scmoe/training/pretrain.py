"""Megatron's training loop around a ScMoE GPT: from flags to the loop."""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from functools import partial

from megatron.core.enums import ModelType
from megatron.training import get_tokenizer, pretrain, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args

from megatron_scmoe.analysis import slot_tuner
from megatron_scmoe.arguments import (
    PREFIX,
    flag_of,
    given_on_command_line,
    scmoe_config_from_args,
)
from megatron_scmoe.checkpoints.local_norm_keys import has_local_norm_keys
from megatron_scmoe.checkpoints.torch_dist import only_safe_types
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError, ScMoEError
from megatron_scmoe.model.layer_spec import describe, stage_spec
from megatron_scmoe.platform import command_line, launch, megatron_workarounds
from megatron_scmoe.platform.megatron_flags import add_run_args, prepare_parser
from megatron_scmoe.platform.megatron_judgement import judged_by_megatron
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
    saving_checks,
    schedule_trial,
    speed_choices,
    whole_checkpoint,
)
from megatron_scmoe.training.datasets import datasets_provider
from megatron_scmoe.training.forward_step import forward_step
from megatron_scmoe.training.heartbeats import Heartbeats
from megatron_scmoe.training.iterations import Iterations
from megatron_scmoe.training.overlap_monitor import OverlapMonitor
from megatron_scmoe.training.parameter_gathers import ParameterGathers
from megatron_scmoe.training.saved_run import SavedRun
from megatron_scmoe.validation.rules import validate


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
    run_checks.check_recordings(args)
    saving_checks.check_disk(args)
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
        local_norm_keys=has_local_norm_keys(args.load, args.ckpt_step),
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
    if args.scmoe_changed:
        model_config.post_wrap_hooks.append(partial(resuming.check_tensors, args=args))
    print_rank_0(describe(scmoe))
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
        chosen |= resuming.rows_to_keep(given, words, saved)
    add_args, chosen = resuming.adding_args(given, chosen, saved)
    given = _parse_args(add_args)
    if chosen and command_line.is_first_rank():
        print(run_defaults.describe(chosen), flush=True)
    if saved_run.is_first_start(given, saved):
        given.use_checkpoint_args = False  # in what is checked here: nothing is left open to them
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
    _say_what_is_unknown(saved, args)
    resuming.settle(args, saved)
    if args.use_checkpoint_args:
        reason = "it is the checkpoint's (--use-checkpoint-args)"
        for line in resuming.overridden(given, args, reason):
            print_rank_0(line)
    _say_what_is_finished(saved, args)
    saving_checks.say_what_is_written_over(args, saved)


def _say_what_is_unknown(saved: SavedRun, args) -> None:
    known = {*vars(args), data_identity.ARGUMENT}
    unknown = [
        flag_of(name)
        for name, value in vars(saved.args or argparse.Namespace()).items()
        if name.startswith(PREFIX) and value and name not in known
    ]
    if unknown:
        print_rank_0(
            f"WARNING: {saved.given}: another version saved {saved.path}, with {', '.join(unknown)}; "
            "this one does not know that, and its model may be another"
        )


def _say_what_is_finished(saved: SavedRun, args) -> None:
    """If nothing is left to train, say so, and do not write the last checkpoint anew in its place."""
    unit, done, wanted = "iterations", saved.state.get("iteration", 0), args.train_iters
    if saved.begins_anew(args) or args.skip_train or args.ckpt_convert_format:
        return
    least = wanted
    if args.train_samples:
        unit, done = "samples", getattr(saved.args, "consumed_train_samples", 0)
        wanted = least = args.train_samples
        if not args.step_batch_size_schedule:
            least -= args.global_batch_size - 1  # Megatron leaves out what is less than a batch
    if done < least:
        return
    flag = "--train-samples" if args.train_samples else "--train-iters"
    print_rank_0(
        f"> nothing is left to train: {saved.path} has {done} {unit}, and {flag} is {wanted}"
    )
    if (
        args.save
        and not args.log_progress
        and os.path.realpath(args.save) == os.path.realpath(saved.path.parent)
    ):
        args.save = None


_FOREIGN = {
    "spec": ("--spec", "this entry point builds the ScMoE spec itself"),
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
    if args.dataloader_type == "external":
        raise ScMoEConfigError(
            "--dataloader-type external", "a loader of your own is not wired", "single or cyclic"
        )
