"""Lines of a run's log that say nothing to whoever reads it, left out by their exact words.

Each has its reason. Everything else of Megatron's log stays as it is.
"""

import logging
import os
import re
import warnings

from megatron_scmoe.platform import cpu_backend


def install() -> None:
    """Leave the lines out from now on; call it before anything of Megatron is imported."""
    for message, module in (*_WARNINGS_ON_IMPORT, *_WARNINGS_OF_LOADING):
        warnings.filterwarnings("ignore", f"{re.escape(message)}$", module=module)
    if cpu_backend.is_enabled():
        for message, module in _WARNINGS_OF_A_GPU:
            warnings.filterwarnings("ignore", re.escape(message), module=f"{re.escape(module)}$")
        _have_children_leave_out(_WARNINGS_OF_A_GPU)
    for name, message, only_on_cpu in _LOGGED:
        if cpu_backend.is_enabled() or not only_on_cpu:
            logging.getLogger(name).addFilter(_LeaveOut(message))


def _have_children_leave_out(left_out: tuple[tuple[str, str], ...]) -> None:
    """`--async-save` spawns a process that imports Megatron again, in the middle of the log."""
    # Commas separate the options, so a message ends before its first one.
    options = [f"ignore:{message.split(',')[0]}::{module}" for message, module in left_out]
    given = os.environ.get("PYTHONWARNINGS", "").split(",")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, dict.fromkeys([*given, *options])))


class _LeaveOut(logging.Filter):
    """Leaves out the records whose message begins like this."""

    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


_WARNINGS_ON_IMPORT = (
    # A docstring of an inference class, compiled anew where the wheel's folder cannot be written.
    ("invalid escape sequence '\\-'", r".*\bkv_block_allocator$"),
    # Imported with the training loop, and not used.
    (
        "MimoModelConfig is experimental and still under active development. The API may change "
        "without notice in future releases.",
        r"megatron\.core\.models\.mimo\.config\.base_configs$",
    ),
)

_SHARDED = "Please use DTensor instead and we are deprecating ShardedTensor."
_WARNINGS_OF_LOADING = (
    # Said between Megatron and PyTorch, of how the one calls the other, whenever a run goes on.
    (
        "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load "
        "in a single process.",
        r"torch\.distributed\.checkpoint\.utils$",
    ),
    (
        "The argument order of load has been changed. Please check the document to avoid future "
        "breakages.",
        r"torch\.distributed\.checkpoint\.logger$",
    ),
    (_SHARDED, r"torch\.distributed\.checkpoint\.planner_helpers$"),
    (_SHARDED, r"torch\.distributed\.checkpoint\.default_planner$"),
)

_NEITHER = "Transformer Engine and Apex are not installed. Falling back to "
_WARNINGS_OF_A_GPU = (
    # What is missing are kernels of GPUs; on a GPU these warnings say why it is slow.
    (f"{_NEITHER}Torch optimizers.", "megatron.core.optimizer"),
    (f"{_NEITHER}local implementations", "megatron.core.optimizer.optimizer"),
    (f"{_NEITHER}local implementations", "megatron.core.optimizer.clip_grads"),
    (f"{_NEITHER}local implementations", "megatron.training.utils.common_utils"),
    (
        f"{_NEITHER}local implementations",
        "megatron.core.distributed.fsdp.src.megatron_fsdp.mixed_precision",
    ),
    ("Apex is not installed. Falling back to Torch Norm", "megatron.core.models.backends"),
    (
        "Apex is not installed. Falling back to Torch Norm",
        "megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs",
    ),
    (
        "Apex is not installed. Falling back to Torch Norm",
        "megatron.core.models.gpt.gpt_layer_specs",
    ),
    (
        "Only transformer-engine>=1.7.0 supports MoE experts, but your version is 0.0.0.",
        "megatron.core.extensions.transformer_engine_spec_provider",
    ),
)

_LOGGED = (
    # Logger, message, and whether it means nothing on the CPU alone.
    # There the generator of "the GPU" is that of the CPU, so of course it has changed.
    (
        "megatron.core.tensor_parallel.random",
        "CPU RNG state changed within GPU RNG context",
        True,
    ),
    # It recommends a class that has no place for ScMoE; nothing follows for the user.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED.", False),
    # It recommends another way to save while training goes on, at every save that does not, too.
    (
        "megatron.core.dist_checkpointing.strategies.torch",
        "MCore's async save is deprecated and will be removed in the future releases.",
        False,
    ),
    # Evaluation is not judged as training is: twice each time.
    ("megatron.core.rerun_state_machine", "Setting RerunStateMachine mode ", False),
)
