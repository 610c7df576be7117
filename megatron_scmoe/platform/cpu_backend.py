"""Run Megatron-Core 0.19 on a machine without a GPU.

Megatron asks for CUDA in many places (streams, events, ``device="cuda"``, ``tensor.is_cuda``).
:func:`enable` maps these requests to the CPU, so that the whole training loop, its optimizers and
its checkpoints run over gloo. The entry points call it when there is no GPU; nothing else does, and
on a machine with a GPU it is never active.

Kernels stay PyTorch's own CPU kernels: nothing here changes a number.
"""

import contextlib
import functools
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_scmoe.platform.command_line import UsageError

FLAG = "--scmoe-cpu"
"""On the command line of a run: train on the CPU, whatever GPUs there are."""

VARIABLE = "SCMOE_CPU"
"""The same, as an environment variable: 1."""

GPU_PACKAGES = (
    *("transformer_engine", "transformer_engine_torch", "apex", "amp_C"),
    *("fused_weight_gradient_mlp_cuda", "flash_attn", "flash_attn_3", "deep_ep"),
)
"""Kernels for GPUs alone, which Megatron uses wherever it can import them."""

_enabled = False


def is_enabled() -> bool:
    """Whether CUDA requests are mapped to the CPU in this process."""
    return _enabled


def choose() -> bool:
    """As :func:`enable_if_no_gpu`, where a GPU that is there but cannot be used is to be missed.

    Raises:
        UsageError: if there is one; ``--scmoe-cpu`` and ``$SCMOE_CPU`` take the CPU all the same.
    """
    if not (is_asked_for() or torch.cuda.is_available()):
        trace = _trace_of_a_gpu()
        if trace is not None:
            raise UsageError(
                f"this machine has a GPU ({trace}), and {_why_unusable()}; accepted: a GPU that "
                f"PyTorch sees, or {FLAG} (or {VARIABLE}=1), which takes the CPU"
            )
    return enable_if_no_gpu()


def is_asked_for() -> bool:
    """Whether command line or environment ask for the CPU.

    Raises:
        UsageError: if the variable is neither 0 nor 1: ``no`` would be taken for yes.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise UsageError(f"{VARIABLE}={value} in the environment: accepted are 0 and 1")
    return FLAG in sys.argv[1:] or value == "1"


def enable_if_no_gpu() -> bool:
    """Call :func:`enable` if PyTorch sees no GPU or is not to use it. Returns whether it was called."""
    if not (_enabled or is_asked_for()) and torch.cuda.is_available():
        return False
    enable()
    return True


def enable() -> None:
    """Map Megatron's CUDA requests to the CPU for the rest of this process. Idempotent.

    Call it before anything of ``megatron`` is imported: some of its modules look for a GPU then.
    """
    global _enabled
    if _enabled:
        return
    _enabled = True
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile on two cores costs more than it gives
    torch._dynamo.config.disable = True
    hide_gpu_packages()
    _map_cuda_module()
    _map_factories()
    _map_tensor_methods()
    _map_data_loader()
    _map_uneven_collectives()


def hide_gpu_packages() -> None:
    """Let their import fail as if they were not installed.

    Megatron would take their optimizers, which have no CPU kernels. Without a driver some do not even
    load, with an OSError, for which Megatron is not prepared. :func:`enable` calls it; alone it is for
    a process that needs no device. Call it before anything of ``megatron`` is imported.
    """
    for name in GPU_PACKAGES:
        sys.modules[name] = None


def _trace_of_a_gpu(root: Path = Path("/")) -> str | None:
    """A file that only NVIDIA's driver, or Windows below Linux, makes for a GPU; None without one."""
    for pattern in ("dev/nvidia[0-9]*", "proc/driver/nvidia/gpus/*", "dev/dxg"):
        for found in sorted(root.glob(pattern)):
            return str(found)
    return None


def _why_unusable() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip(" -1,"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides it"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return "PyTorch cannot use it (does nvidia-smi work?)"


class _Stream:
    """The one CPU "stream": work is done when the call returns."""

    def __init__(self, *args, **kwargs):
        self.cuda_stream = 0
        self.device = torch.device("cpu")

    def synchronize(self):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event if event is not None else _Event()

    def query(self):
        return True

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False


class _Event:
    """An event that has happened; timing by the wall clock."""

    def __init__(self, *args, **kwargs):
        self._time = None

    def record(self, stream=None):
        self._time = time.perf_counter()

    def synchronize(self):
        pass

    def wait(self, stream=None):
        pass

    def query(self):
        return True

    def elapsed_time(self, end) -> float:
        """Milliseconds from this event to ``end``."""
        return (end._time - self._time) * 1e3


def _map_cuda_module() -> None:
    stream = _Stream()
    memory = SimpleNamespace(
        name="CPU", major=0, minor=0, total_memory=0, multi_processor_count=os.cpu_count()
    )
    replacements = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: memory,
        "get_device_capability": lambda device=None: (0, 0),
        "get_device_name": lambda device=None: "CPU",
        "_lazy_call": lambda callable, **kwargs: callable(),
        "_lazy_init": lambda: None,
        "default_generators": (torch.default_generator,),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "get_rng_state": lambda device=None: torch.default_generator.get_state(),
        "set_rng_state": lambda state, device=None: torch.default_generator.set_state(state),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(stream),
        "device": lambda device: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "memory_stats": lambda device=None: {},
        "reset_peak_memory_stats": lambda device=None: None,
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        replacements[name] = lambda device=None: 0
    replacements["max_memory_reserved"] = lambda device=None: 0
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, value)
    # PyTorch's own code (pinned memory, data loaders) must not believe in an accelerator.
    torch.accelerator.is_available = lambda: False


def _to_cpu(device):
    """``device`` with every CUDA device, by whatever name, replaced by the CPU."""
    if isinstance(device, bool):  # an argument of Tensor.to that is no device
        return device
    if isinstance(device, int) or str(device).startswith("cuda"):
        return torch.device("cpu")
    return device


def _with_cpu_device(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapper


def _map_factories() -> None:
    from torch.utils._device import _device_constructors

    factories = set(_device_constructors())
    for name in dir(torch):
        function = getattr(torch, name)
        try:
            is_factory = function in factories
        except TypeError:  # unhashable attributes are no factories
            continue
        if is_factory or name.endswith("_like"):
            setattr(torch, name, _with_cpu_device(function))


def _map_tensor_methods() -> None:
    tensor = torch.Tensor
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        setattr(tensor, name, _with_cpu_device(getattr(tensor, name)))

    to = tensor.to

    @functools.wraps(to)
    def to_cpu(self, *args, **kwargs):
        args = tuple(_to_cpu(a) if isinstance(a, (str, int, torch.device)) else a for a in args)
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        return to(self, *args, **kwargs)

    type_ = tensor.type

    @functools.wraps(type_)
    def type_of(self, dtype=None, *args, **kwargs):
        if dtype is None:  # Megatron's optimizers recognise 'torch.cuda.FloatTensor' and the like
            return type_(self).replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return type_(self, dtype, *args, **kwargs)

    tensor.to = to_cpu
    tensor.type = type_of
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    tensor.is_cuda = property(lambda self: True)
    tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, device=None: self


def _map_data_loader() -> None:
    """Give each data loader a generator of its own.

    With none, every iterator draws its base seed from the default CPU generator, which here is also
    the generator of dropout: a resumed run, which makes one more iterator, would shift its masks.
    """
    from torch.utils.data import DataLoader

    init = DataLoader.__init__

    @functools.wraps(init)
    def init_with_generator(self, *args, **kwargs):
        if kwargs.get("generator") is None:
            kwargs["generator"] = torch.Generator()
        kwargs["pin_memory"] = False
        init(self, *args, **kwargs)

    DataLoader.__init__ = init_with_generator


def _map_uneven_collectives() -> None:
    """Collectives of tensors of unequal length, which expert tensor parallelism uses; gloo has none.

    all-gather: pad to the longest. reduce-scatter: a sum of each part on all ranks.
    """
    from torch import distributed

    all_gather, reduce_scatter = distributed.all_gather, distributed.reduce_scatter

    @functools.wraps(all_gather)
    def all_gather_uneven(tensor_list, tensor, group=None, async_op=False):
        lengths = [output.shape[0] for output in tensor_list]
        if len(set(lengths)) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in lengths]
        work = all_gather(gathered, padded, group=group)
        for output, part, length in zip(tensor_list, gathered, lengths):
            output.copy_(part[:length])
        return work

    @functools.wraps(reduce_scatter)
    def reduce_scatter_uneven(
        output, input_list, op=distributed.ReduceOp.SUM, group=None, **kwargs
    ):
        if len({part.shape[0] for part in input_list}) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, **kwargs)
        rank = distributed.get_rank(group)
        for index, part in enumerate(input_list):
            total = part.clone()
            distributed.all_reduce(total, op=op, group=group)
            if index == rank:
                output.copy_(total)

    distributed.all_gather = all_gather_uneven
    distributed.reduce_scatter = reduce_scatter_uneven
