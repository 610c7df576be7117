"""Gaps of Megatron-Core 0.19.2, closed in one place; each with the reason and when it applies."""

import copy
import functools
import importlib.util
import inspect
import os
import queue
import shutil
import sys
import sysconfig

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.utils import warn_rank_0
from torch.optim.adam import adam

from megatron_scmoe.platform import cpu_backend, fused_accumulation
from megatron_scmoe.platform.command_line import UsageError


def leave_out_missing_fusions(args) -> None:
    """Turn off the fused kernels that Megatron asks for by default and does not have here.

    No installed package has them, or Megatron has none for such experts. Megatron stops instead.
    What Apex has and Transformer Engine can do is supplied and stays on.
    """
    if args.apply_rope_fusion and not HAVE_TE:
        args.apply_rope_fusion = False
        warn_rank_0("no Transformer Engine: RoPE is not fused (--no-rope-fusion)")
    have_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    if args.gradient_accumulation_fusion and not have_apex and _can_accumulate(args):
        fused_accumulation.supply()
    elif args.gradient_accumulation_fusion and not have_apex:
        args.gradient_accumulation_fusion = False
        warn_rank_0("no Apex: no fused accumulation (--no-gradient-accumulation-fusion)")
    if args.masked_softmax_fusion and not importlib.util.find_spec("scaled_masked_softmax_cuda"):
        args.masked_softmax_fusion = False
        if args.transformer_impl == "local":
            warn_rank_0("no fused softmax kernels: PyTorch's are used (--no-masked-softmax-fusion)")
    if args.num_experts and _is_gelu(args) and args.bias_gelu_fusion:
        args.bias_gelu_fusion = False
        warn_rank_0("experts with gelu: not fused with the bias (--no-bias-gelu-fusion)")
    if args.num_experts and args.add_bias_linear and args.bias_dropout_fusion:
        args.bias_dropout_fusion = False
        warn_rank_0("experts with biases: not fused with dropout (--no-bias-dropout-fusion)")


def _can_accumulate(args) -> bool:
    """Whether Transformer Engine can stand in for Apex; a deferred weight gradient imports Apex."""
    has_kernels = HAVE_TE and not cpu_backend.is_enabled()
    deferred = getattr(args, "defer_embedding_wgrad_compute", False)
    return has_kernels and args.transformer_impl == "transformer_engine" and not deferred


def has_tanh_gelu(args) -> bool:
    """Whether the MLPs of these arguments compute gelu's tanh form; the fused kernel does, too."""
    is_fused = args.bias_gelu_fusion and args.add_bias_linear
    return _is_gelu(args) and bool(args.openai_gelu or is_fused)


def transformer_config(args):
    """Megatron's ``TransformerConfig`` of parsed flags, with those that do not get there.

    ``--openai-gelu``: GPT-2's tanh in place of the exact gelu. ``--init-method-xavier-uniform``:
    weights uniform within sqrt(6 / (inputs + outputs)), in place of normal ones; of the part of a
    weight that is made at once, which with tensor parallelism on GPUs is a rank's.
    """
    others = copy.copy(args)
    others.init_method_xavier_uniform = False
    config = core_transformer_config_from_args(others)
    if args.openai_gelu and not config.gated_linear_unit:
        config.activation_func = tanh_gelu
    if args.init_method_xavier_uniform:
        config.init_method = functools.partial(_xavier_uniform, std=config.init_method_std)
        config.output_layer_init_method = config.init_method
        if config.embedding_init_method_std == config.init_method_std:  # so Megatron's default
            config.embedding_init_method = config.init_method
    return config


def _xavier_uniform(weight: torch.Tensor, std: float) -> torch.Tensor:
    """Of a matrix. A vector, such as a router's bias, stays normal: it has no number of outputs."""
    if weight.dim() < 2:
        return torch.nn.init.normal_(weight, std=std)
    return torch.nn.init.xavier_uniform_(weight)


def gpt_config(args, config):
    """Megatron's ``GPTModelConfig``, with what it does not take from the arguments.

    ``--rope-scaling-factor`` would stay 8, and with CUDA graphs it asks for the generators that
    ``--te-rng-tracker`` has chosen already.
    """
    model_config = gpt_config_from_args(args, config=config)
    model_config.rope_scaling_factor = args.rope_scaling_factor
    config.use_te_rng_tracker = args.te_rng_tracker
    return model_config


def _is_gelu(args) -> bool:
    return not (args.swiglu or args.quick_geglu or args.squared_relu)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def apply(args) -> None:
    """Close the gaps that need a change in Megatron itself."""
    _use_built_dataset_helper()
    _end_intervals_of_the_first_iteration()
    if getattr(args, "profile", False) and args.use_pytorch_profiler:
        _profile_the_runs_iterations()
    if not HAVE_TE:
        _know_linear_modules_by_types_alone()
    if cpu_backend.is_enabled():
        _use_adam_with_group_steps()
        if not args.async_save:
            _keep_write_results_in_process()


def call_specs() -> None:
    """For a checkout's own script, which may give the model what ``--spec`` names as it is.

    The model knows no function there. Scripts that call it before, as the installed version does, get
    what they got.
    """
    from megatron.core.transformer import transformer_block

    submodules = transformer_block._get_block_submodules

    @functools.wraps(submodules)
    def of_what_a_function_gives(config, spec, vp_stage=None, *others):
        if inspect.isfunction(spec):
            spec = spec(config, vp_stage)
        return submodules(config, spec, vp_stage, *others)

    transformer_block._get_block_submodules = of_what_a_function_gives


def _use_built_dataset_helper() -> None:
    """``compile_helpers`` runs make, for which the wheel has no Makefile, and exits the first rank.

    The wheel has the built helper. A source checkout's Makefile builds it for the first ``python3`` on
    the path, which need not be this one: it is told which one runs.

    Raises:
        UsageError: if it has to be built, and what its Makefile asks for is missing.
    """
    from megatron.core.datasets import utils

    folder = os.path.dirname(utils.__file__)
    makefile = os.path.exists(os.path.join(folder, "Makefile"))
    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if not makefile:
        if built:
            utils.compile_helpers = lambda: None
        return
    missing = [name for name in ("make", "g++") if shutil.which(name) is None]
    missing += ["pybind11"] * (importlib.util.find_spec("pybind11") is None)
    if missing and not built:
        raise UsageError(
            f"{folder}: its helpers.cpp has to be compiled, and there is no {', no '.join(missing)}; "
            "accepted: a machine that has make and g++, and pip install pybind11"
        )
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    os.environ["MAKEFLAGS"] = f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"


def _end_intervals_of_the_first_iteration() -> None:
    """With ``--log-interval 1`` the second line after a start gives means over two iterations.

    Megatron logs the first iteration whatever the interval is, and goes on adding up, for the line at
    the interval's end. Where that is the same line, nothing ends the interval. Scripts of a checkout
    without such a first line are left alone.
    """
    from megatron.training import training
    from megatron.training.global_vars import get_args

    log = training.training_log
    names = list(inspect.signature(log).parameters)
    if "is_first_iteration" not in names:
        return
    place = names.index("iteration")

    @functools.wraps(log)
    def log_and_end(*values, is_first_iteration=False, **others):
        iteration = others["iteration"] if "iteration" in others else values[place]
        is_due = iteration % get_args().log_interval == 0
        return log(*values, is_first_iteration=is_first_iteration and not is_due, **others)

    training.training_log = log_and_end


def _profile_the_runs_iterations() -> None:
    """In a run that goes on from a checkpoint PyTorch's profiler counts from its own start.

    Megatron ends it at ``--profile-step-end`` of the whole run, before it has begun, and no trace is
    written. Steps that are done already are taken off.
    """
    from megatron.training.global_vars import get_args

    schedule = torch.profiler.schedule

    @functools.wraps(schedule)
    def from_here(*, wait, warmup, active, **others):
        left = wait + warmup - get_args().iteration
        warmup = max(min(warmup, left), 0)
        active = max(active + min(left, 0), 1)
        return schedule(wait=max(left - warmup, 0), warmup=warmup, active=active, **others)

    torch.profiler.schedule = from_here


def _know_linear_modules_by_types_alone() -> None:
    """Without Transformer Engine mocks stand for its modules, and ``isinstance`` refuses these.

    ``--save-activations-interval`` would end the run. Not every checkout has it.
    """
    if importlib.util.find_spec("megatron.training.activation_logging") is not None:
        from megatron.training import activation_logging as recorder

        recorder.LINEAR_TYPES = tuple(
            kind for kind in recorder.LINEAR_TYPES if isinstance(kind, type)
        )


def _use_adam_with_group_steps() -> None:
    """``DistributedOptimizer`` over PyTorch's Adam loads ``step`` as 0, and asserts on the way.

    PyTorch counts steps per parameter, Apex and Transformer Engine per group, and only the latter
    finds its way through a checkpoint. So on the CPU Megatron gets an Adam of Apex's kind.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    # In fp32 the main parameters are the model's own leaves: loading writes to them in place.
    kind = distrib_optimizer.DistributedOptimizer
    kind._set_main_param_and_optimizer_states = torch.no_grad()(
        kind._set_main_param_and_optimizer_states
    )
    optimizer.Adam = AdamWithGroupSteps
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _keep_write_results_in_process() -> None:
    """A synchronous save hands its results to itself through a server process.

    That costs seconds of the first save and half a gigabyte on every rank, and if the rank is killed
    it stays and keeps the rank's output open: ``torchrun ... | tee log`` never ends.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()


class AdamWithGroupSteps(torch.optim.Optimizer):
    """PyTorch's Adam and AdamW with the step count of Apex's FusedAdam: one per group.

    Args:
        adam_w_mode: decoupled weight decay (AdamW) instead of L2 regularisation (Adam).
    """

    def __init__(self, params, lr, weight_decay, betas, eps, capturable=False, adam_w_mode=True):
        if capturable:
            raise ValueError("--optimizer-cuda-graph: there are no CUDA graphs on the CPU")
        defaults = dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no caller has one
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            done = group.get("step", 0)
            beta1, beta2 = group["betas"]
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(done)) for _ in params],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )
            group["step"] = done + 1
