"""What would stop a run, at once or hours later, said before it starts and by the flag's name.

Megatron meets these in the midst of a run, or with an assertion that names no flag. What has to do
with the model is in validation/, with files in input_checks.py, with saving in saving_checks.py; what
a number may be is in number_checks.py.
"""

import argparse
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_scmoe.arguments import ENVIRONMENT_VARIABLE, defaults, flag_of, in_flags
from megatron_scmoe.errors import RunError, in_words
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.command_line import is_first_rank
from megatron_scmoe.training import input_checks, number_checks, saving_checks
from megatron_scmoe.training.run_defaults import has_validation_data
from megatron_scmoe.validation.settings import as_list, kinds_with_own_choice


def check_flags(args: argparse.Namespace, has_model: bool = True) -> None:
    """Check parsed flags, before Megatron judges them.

    Args:
        has_model: whether the flags describe the model; if not, a checkpoint does, later.

    Raises:
        RunError: at the first that would stop the run.
    """
    if args.checkpoint_activations:  # Megatron ends with status 0
        raise RunError(
            "--checkpoint-activations",
            "Megatron has other names for it",
            "--recompute-activations; or --recompute-granularity full --recompute-method uniform",
        )
    _check_words(args)
    if args.load is None and args.pretrained_checkpoint is None:
        for name in ("finetune", "ckpt_step"):
            if getattr(args, name):
                raise RunError(
                    in_flags(name, getattr(args, name)),
                    "nothing is loaded, and the run would train from random weights",
                    "--load FOLDER or --pretrained-checkpoint FOLDER with it",
                )
    if args.bf16 and args.fp16:
        raise RunError("--bf16 with --fp16", "each says what the model computes in", "one of them")
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise RunError(
            "--override-opt-param-scheduler with --use-checkpoint-opt-param-scheduler",
            "the schedule is that of the flags by the first, and the checkpoint's by the second",
            "one of them",
        )
    _check_all_is_given(args, has_model)
    number_checks.check_flags(args, has_model)
    if has_model:
        _check_layout(args)
        _warn_of_balance(args)
    _check_length(args)
    _check_rate_of_embedding(args)
    _check_batch_schedule(args)
    _check_validation(args)
    _check_packages(args)
    _check_device(args)
    saving_checks.check_flags(args)
    _check_logging(args)
    _check_profile(args)
    if args.dataloader_defer_npy_index_mmap and args.data_cache_path is None:
        raise RunError(
            "--dataloader-defer-npy-index-mmap",
            "it reads the indices that an earlier run has built",
            "--data-cache-path FOLDER with it",
        )


def _check_words(args) -> None:
    """Refuse what is empty: Megatron takes --save '' for none. And say which variable is not heard."""
    standard = defaults()
    for name, value in vars(args).items():
        if value in ("", [""]) and standard.get(name) != "":
            raise RunError(
                f"{flag_of(name)} ''",
                "it is empty, as a variable of the shell is that was never set",
                "a value, or leave the flag out",
            )
    if os.environ.get(ENVIRONMENT_VARIABLE) and is_first_rank():
        print(
            f"WARNING: ${ENVIRONMENT_VARIABLE} is not read for this run's model, which the flags of "
            "the command line describe",
            flush=True,
        )


def check_recordings(args: argparse.Namespace) -> None:
    """Check flags that record what modules compute, against what the run has chosen for itself.

    Raises:
        RunError: for a recording that would stay empty, or end the run in its first iteration.
    """
    counts, gradients = args.save_tokens_per_expert_interval, args.save_dgrads_interval
    has_te = args.transformer_impl == "transformer_engine"
    if counts and not (args.moe_grouped_gemm and has_te):
        raise RunError(
            f"--save-tokens-per-expert-interval {counts}",
            "Megatron counts in Transformer Engine's grouped GEMM, which this run does not have",
            "--transformer-impl transformer_engine --moe-grouped-gemm on a GPU, or leave it out: "
            "--scmoe-log-overlap-interval logs the largest number over the mean",
        )
    if gradients and not (
        args.cross_entropy_loss_fusion and args.cross_entropy_fusion_impl == "te"
    ):
        raise RunError(
            f"--save-dgrads-interval {gradients}",
            "it hooks the output layer, whose logits Megatron's loss overwrites: autograd refuses",
            "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te on a GPU, or leave it out: "
            "--save-wgrads-interval and --save-activations-interval work",
        )


def _check_all_is_given(args, has_model: bool) -> None:
    """Name everything at once that a run needs and was not given."""
    needed = number_checks.needed(has_model)
    missing = [flag_of(name) for name, _ in needed if getattr(args, name) is None]
    if has_model and not args.num_experts:
        missing.append("--num-experts")
    if not args.skip_train:
        if args.lr is None:
            missing.append("--lr")
        if (args.train_iters, args.train_samples) == (None, None):
            missing.append("--train-iters")
    if args.tokenizer_type is None and not args.use_checkpoint_args:
        missing.append("--tokenizer-type")
    if not input_checks.names_data(args) and args.ckpt_convert_format is None:
        missing.append("--data-path (or --mock-data)")
    if len(missing) > 1:
        raise RunError(
            f"{', '.join(missing)} are not given",
            "a run needs them",
            "all of them; docs/running.md has a smallest run",
        )


def _warn_of_balance(args) -> None:
    """Megatron's default coefficient is 0: a few experts would learn, and the others starve."""
    coefficients = as_list(args.moe_aux_loss_coeff)
    biased = args.scmoe_expert_bias != "none" or args.moe_router_enable_expert_bias
    forced = args.moe_router_force_load_balancing
    chosen = kinds_with_own_choice(args.moe_router_load_balancing_type)
    if any(coefficients) or biased or forced or chosen or args.skip_train:
        return
    if args.num_experts and args.num_experts > 1 and is_first_rank():
        print(
            f"WARNING: --moe-aux-loss-coeff {coefficients[0]}: nothing balances the experts' load; "
            "0.01 is usual",
            flush=True,
        )


def _check_layout(args) -> None:
    ranks, experts = args.world_size, args.num_experts
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context, expert = args.context_parallel_size, args.expert_model_parallel_size
    expert_tensor = args.expert_tensor_parallel_size or tensor
    for part in ("tensor_model", "pipeline_model", "context", "expert_model"):
        name = f"{part}_parallel_size"
        if getattr(args, name) < 1:
            raise RunError(in_flags(name, getattr(args, name)), "it counts ranks", "1 or more")
    if experts and experts % expert:
        raise RunError(
            f"--expert-model-parallel-size {expert}",
            f"--num-experts is {experts}, and every rank has as many of them",
            " or ".join(str(n) for n in range(1, experts + 1) if experts % n == 0),
        )
    for size, product in (
        (
            tensor * pipeline * context,
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} x "
            f"--context-parallel-size {context}",
        ),
        (
            expert_tensor * expert * pipeline,
            f"--expert-model-parallel-size {expert} x --expert-tensor-parallel-size "
            f"{expert_tensor} x --pipeline-model-parallel-size {pipeline}",
        ),
    ):
        if ranks % size:
            raise RunError(
                product,
                f"{ranks} rank{'s' * (ranks != 1)} cannot be divided into groups of {size}",
                f"torchrun with a multiple of {size} ranks, or smaller sizes",
            )
    replicas = data_parallel_size(args)
    samples, micro = args.global_batch_size, args.micro_batch_size
    at_once = micro * replicas
    may_be_less = args.decrease_batch_size_if_needed and (samples or 0) >= at_once
    if samples and samples % at_once and not may_be_less:
        raise RunError(
            f"--global-batch-size {samples}",
            f"each of {replicas} data-parallel replicas takes --micro-batch-size {micro} at once",
            f"a multiple of {at_once}",
        )
    least = samples or at_once
    trained = args.train_samples
    if trained and trained < least and not (args.skip_train or args.step_batch_size_schedule):
        raise RunError(
            f"--train-samples {trained}", f"one iteration takes {least}", f"{least} or more"
        )


def data_parallel_size(args: argparse.Namespace) -> int:
    """Replicas of the dense parameters, of parsed flags: Megatron counts them later."""
    others = ("tensor_model", "pipeline_model", "context")
    return args.world_size // math.prod(getattr(args, f"{n}_parallel_size") for n in others)


def _check_length(args) -> None:
    """How long the run is, and its learning rate's warm-up."""
    if args.train_iters is not None and args.train_samples is not None:
        raise RunError(
            f"--train-iters {args.train_iters} with --train-samples {args.train_samples}",
            "each says how long the run is",
            "one of them",
        )
    for name in ("train_iters", "train_samples"):
        value, least = getattr(args, name), 0 if args.skip_train else 1
        if value is not None and value < least:
            also = "" if args.skip_train else ", or --skip-train to evaluate alone"
            raise RunError(in_flags(name, value), "it is too small", f"{least} or more{also}")
    if args.train_iters is None and args.train_samples is None:
        raise RunError(
            "neither --train-iters nor --train-samples is given",
            "a run needs its length",
            "--train-iters N",
        )
    unit, other = ("samples", "iters") if args.train_samples is not None else ("iters", "samples")
    for part in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if value := getattr(args, f"{part}_{other}"):
            raise RunError(
                in_flags(f"{part}_{other}", value),
                f"the run is counted in {unit} (--train-{unit})",
                f"{flag_of(f'{part}_{unit}')} N",
            )
    total = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    warmup = getattr(args, f"lr_warmup_{unit}")
    if total and warmup and warmup >= total:
        raise RunError(
            f"--lr-warmup-{unit} {warmup}",
            f"the learning rate has {total} {unit} in all (--lr-decay-{unit}, --train-{unit})",
            f"0 to {total - 1}",
        )
    style, name = in_flags("lr_decay_style", args.lr_decay_style), f"lr_wsd_decay_{unit}"
    last_decay = getattr(args, name)
    if args.lr_decay_style == "WSD" and last_decay is None:
        raise RunError(
            style,
            f"the length of its last decay is not given ({flag_of(name)})",
            f"{flag_of(name)} N with it",
        )
    if args.lr_decay_style != "WSD" and last_decay is not None:
        raise RunError(
            in_flags(name, last_decay),
            f"{style} has no such part",
            "--lr-decay-style WSD with it, or leave it out",
        )
    if args.phase_transition_iterations and args.train_samples is None:
        raise RunError(
            f"--phase-transition-iterations {args.phase_transition_iterations}",
            "Megatron counts the samples of each phase up to --train-samples",
            "--train-samples N in place of --train-iters, or leave it out",
        )
    fraction = args.lr_warmup_fraction
    if fraction is not None and not 0 <= fraction < 1:
        raise RunError(
            f"--lr-warmup-fraction {fraction}", "the run is longer than its warm-up", "0 to below 1"
        )


def _check_rate_of_embedding(args) -> None:
    """The learning rate that embedding and output layer may have of their own."""
    rate, least = args.decoupled_lr, args.decoupled_min_lr
    if rate is None and least is not None:
        raise RunError(
            f"--decoupled-min-lr {least}",
            "it bounds --decoupled-lr, which is not given",
            "--decoupled-lr RATE with it, or leave it out",
        )
    if rate is not None and rate == args.lr and least in (None, args.min_lr):
        raise RunError(
            f"--decoupled-lr {rate}",
            "it is --lr, by which Megatron would not tell the parameters apart when it resumes",
            "leave the flag out, or another rate",
        )


def _check_batch_schedule(args) -> None:
    """A batch that grows. Megatron counts iterations, and so data and learning rate, by its begin."""
    if args.rampup_batch_size:
        raise RunError(
            in_flags("rampup_batch_size", args.rampup_batch_size),
            "this Megatron ignores it",
            "--step-batch-size-schedule 'TOKENS:SAMPLES ...' with --train-samples",
        )
    schedule = args.step_batch_size_schedule
    if schedule is None:
        return
    try:
        StepBatchsizeNumMicroBatchesCalculator(
            args.micro_batch_size,
            data_parallel_size=1,
            decrease_batch_size_if_needed=False,
            rank=-1,  # of which it logs nothing
            schedule=schedule,
            seq_length=args.seq_length,
        )
    except (AssertionError, ValueError) as error:
        raise RunError(
            f"--step-batch-size-schedule '{schedule}'",
            f"Megatron cannot read it with --seq-length {args.seq_length}: {in_words(error)}",
            "pairs of tokens and samples, such as '0:128 250B:256', the first at 0",
        ) from error
    if args.train_samples is None and not args.skip_train:
        raise RunError(
            f"--step-batch-size-schedule '{schedule}' with --train-iters {args.train_iters}",
            "data and learning rate would be made for as many iterations of the first batch",
            "--train-samples N in place of --train-iters",
        )


def _check_validation(args) -> None:
    """Evaluation while the run trains, and of several sets."""
    whole, several = args.full_validation, args.multiple_validation_sets
    if whole and not several:
        raise RunError(
            "--full-validation",
            "Megatron goes through whole sets only where it expects several",
            "--multiple-validation-sets with it, also for one set",
        )
    if several and not whole:
        raise RunError(
            "--multiple-validation-sets",
            "Megatron evaluates several sets only if it goes through them whole",
            "--full-validation with it",
        )
    if args.skip_train and not (args.eval_iters or whole or args.ckpt_convert_format):
        raise RunError(
            "--skip-train with --eval-iters 0", "nothing is left to do", "--eval-iters 1 or more"
        )
    wants = args.eval_iters or whole
    if wants and not (args.skip_train or has_validation_data(args)):
        raise RunError(
            "--full-validation" if whole else f"--eval-iters {args.eval_iters}",
            "there is no validation data, and the first evaluation would end the run",
            f"{'leave it out' if whole else '--eval-iters 0'}, --valid-data-path PREFIX, or a --split "
            "with a second part above 0",
        )


_PACKAGES = (
    ("wandb_project", bool, "wandb"),
    ("optimizer", lambda value: "muon" in value or value == "soap", "emerging_optimizers"),
    ("adlr_autoresume", bool, "userlib"),
    ("enable_ft_package", bool, "nvidia_resiliency_ext"),
    ("non_persistent_ckpt_type", lambda value: value == "local", "nvidia_resiliency_ext"),
    ("tensorboard_dir", bool, "tensorboard"),
    ("log_device_memory_used", bool, "pynvml"),
    ("log_straggler", bool, "pynvml"),
    ("log_energy", bool, "pynvml"),
)
"""Flags that need a package which Megatron does not require."""


def _check_packages(args) -> None:
    for name, is_given, package in _PACKAGES:
        if is_given(getattr(args, name)):
            _require_package(args, name, package)
    if args.async_save and args.async_strategy == "nvrx":
        _require_package(args, "async_strategy", "nvidia_resiliency_ext")
    if args.enable_ft_package and "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ:
        raise RunError(
            "--enable-ft-package",
            "nobody watches the ranks: ft_launcher did not start them",
            "ft_launcher in place of torchrun, or leave the flag out",
        )
    if args.wandb_project and not args.wandb_exp_name:
        raise RunError(
            f"--wandb-project {args.wandb_project}",
            "the experiment has no name",
            "--wandb-exp-name NAME with it",
        )


def _require_package(args, name: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RunError(
            in_flags(name, getattr(args, name)),
            f"the Python package {package} is not installed",
            "install it, or leave the flag out",
        )


def _check_device(args) -> None:
    if args.transformer_impl == "transformer_engine" and not HAVE_TE:
        raise RunError(
            "--transformer-impl transformer_engine",
            "Transformer Engine is not installed",
            "--transformer-impl local, or leave the flag out",
        )
    for name in ("qk_clip", "log_max_attention_logit"):
        if getattr(args, name) and not HAVE_TE:
            raise RunError(
                flag_of(name),
                "Transformer Engine finds the largest logit, and is not installed",
                "leave the flag out",
            )
    if args.moe_latent_size and not HAVE_TE:
        raise RunError(
            f"--moe-latent-size {args.moe_latent_size}",
            "its projections are Transformer Engine's, which is not installed",
            "leave the flag out",
        )
    if not cpu_backend.is_enabled():
        return
    if args.distributed_backend != "gloo":
        raise RunError(
            f"--distributed-backend {args.distributed_backend}",
            "it needs GPUs, and this run is on the CPU",
            "gloo, or leave the flag out",
        )
    if args.async_save and args.async_strategy != "mcore":
        raise RunError(
            f"--async-strategy {args.async_strategy}",
            "on the CPU it would write tensors that the next step is changing",
            "mcore, or leave the flag out",
        )
    for flag in _gpu_flags(args):
        raise RunError(flag, "it needs a GPU, and this run is on the CPU", "leave the flag out")


def _gpu_flags(args) -> Iterator[str]:
    for name in (
        "log_memory_to_tensorboard",
        "log_device_memory_used",
        "log_straggler",
        "log_energy",
        "record_memory_history",
        "moe_grouped_gemm",
        "optimizer_cuda_graph",
        "tp_comm_overlap",
    ):
        if getattr(args, name):
            yield flag_of(name)
    if args.fp8:
        yield f"--fp8-format {args.fp8}"
    if args.profile and not args.use_pytorch_profiler:
        yield "--profile without --use-pytorch-profiler"


def _check_logging(args) -> None:
    if args.tensorboard_dir is None:
        for name in ("memory", "timers", "validation_ppl", "world_size"):
            name = f"log_{name}_to_tensorboard"
            if getattr(args, name):
                raise RunError(
                    flag_of(name), "nothing is written", "--tensorboard-dir FOLDER with it"
                )
    folder = args.wandb_save_dir
    if args.wandb_project and not folder and args.save is None:
        raise RunError(
            f"--wandb-project {args.wandb_project}",
            "it has no folder for its files",
            "--wandb-save-dir FOLDER, or --save FOLDER",
        )
    if folder and os.path.exists(folder) and not os.access(folder, os.W_OK):
        raise RunError(f"--wandb-save-dir {folder}", "cannot write there", "a writable folder")


def _check_profile(args) -> None:
    """Megatron writes the trace behind the last step of it, and says nothing if that never comes."""
    if not args.profile:
        return
    first, end = args.profile_step_start, args.profile_step_end
    if not 0 <= first < end:
        raise RunError(
            f"--profile-step-start {first} --profile-step-end {end}",
            "the steps from the first to before the second are profiled",
            "0 or more, and a larger number",
        )
    if args.train_iters is not None and end > args.train_iters:
        raise RunError(
            f"--profile-step-end {end}",
            f"the run ends at --train-iters {args.train_iters}, and nothing would be written",
            f"{first + 1} to {args.train_iters}"
            if first < args.train_iters
            else f"up to {args.train_iters}, and a smaller --profile-step-start than {first}",
        )
    _warn_of_traces(args)
    for rank in args.profile_ranks:
        if not 0 <= rank < args.world_size:
            raise RunError(
                in_flags("profile_ranks", args.profile_ranks),
                f"there is no rank {rank}",
                f"0 to {args.world_size - 1}",
            )
    if args.use_pytorch_profiler and args.tensorboard_dir is None:
        raise RunError(
            "--profile --use-pytorch-profiler",
            "Megatron writes the trace beside the folder for TensorBoard, and there is none",
            "--tensorboard-dir FOLDER with it",
        )


def _warn_of_traces(args) -> None:
    """Megatron's name for a trace has nothing of the run in it."""
    if not args.use_pytorch_profiler or args.tensorboard_dir is None or not is_first_rank():
        return
    folder = os.path.normpath(os.path.join(args.tensorboard_dir, os.pardir, "torch_profile"))
    if any(Path(folder).glob("rank-*.json.gz")):
        print(
            f"WARNING: --profile: {folder} has a trace, of an earlier run or of one whose "
            "--tensorboard-dir lies beside this one's; it is written over",
            flush=True,
        )
