"""The flags of whole runs: of the model, of each system, and of each set of settings.

A run is called ``SYSTEM/SETTINGS``, such as ``scmoe/best+graphs``. To try another setting, give it to
train_run.py (``--flags``); to keep it, change the tables here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from shapes import Shape, size_flags

from megatron_scmoe.overlap.schedule import slot_behind_second_attention

STOCK = ("top2", "shared", "shared-overlap")
SCMOE = ("scmoe-serial", "scmoe")
SYSTEMS = (*STOCK, *SCMOE)

GRAPHS = "+graphs"
"""How the names of settings end that have CUDA graphs."""

GRAPH_WARMUP = 3
"""Iterations before graphs are captured; none of them, nor the next, is to be measured."""

TRACED = 2
"""Iterations in a trace."""

SETTINGS = ("none", "defaults", "best")
"""``none``: no flag of speed, so ScMoE chooses itself; ``defaults``: what recipes for Megatron give,
with Megatron's NaN checks and garbage collection; ``best``: the fastest known. All but ``none`` may
have graphs."""

_OF_ALL_MODELS = (
    "--tokenizer-type NullTokenizer --swiglu --disable-bias-linear --normalization RMSNorm "
    "--position-embedding-type rope --untie-embeddings-and-output-weights "
    "--attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader "
    "--moe-router-pre-softmax --moe-router-load-balancing-type aux_loss "
    "--moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32"
)
_DEFAULTS = (
    "--moe-permute-fusion --moe-router-fusion --cross-entropy-loss-fusion "
    "--cross-entropy-fusion-impl native --use-distributed-optimizer --overlap-grad-reduce "
    "--overlap-param-gather"
)
_QUIET_HOST = "--no-check-for-nan-in-loss-and-grad --manual-gc --manual-gc-interval 100"
_OF_CPU = (
    "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-rope-fusion --no-persist-layer-norm"
)

_BEST = {
    ("*", "*"): _QUIET_HOST,
    ("scmoe", "host-staged"): "--scmoe-expert-slot 2",
    ("scmoe", "native"): "--scmoe-expert-slot 2",
}
"""What ``best`` adds to ``defaults``, by patterns of system and link; those behind win."""


@dataclass(frozen=True)
class Variant:
    """A system with one of the settings."""

    system: str
    settings: str

    @property
    def name(self) -> str:
        """As it is written: ``scmoe/best+graphs``."""
        return f"{self.system}/{self.settings}"

    @property
    def graphs(self) -> bool:
        """Whether it has CUDA graphs."""
        return self.settings.endswith(GRAPHS)

    @property
    def group(self) -> str:
        """The settings without graphs: within it each system's fastest is compared."""
        return self.settings.removesuffix(GRAPHS)

    @property
    def is_stock(self) -> bool:
        """Whether it is Megatron's model, not ScMoE's."""
        return self.system in STOCK


@dataclass(frozen=True)
class Layout:
    """How a model lies on the ranks: sizes of groups, and model chunks on a pipeline stage."""

    ranks: int
    expert: int
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1

    @property
    def data(self) -> int:
        """Of the dense part; experts are data-parallel over ``data * tensor / expert`` ranks."""
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def name(self) -> str:
        """As it is written: ``EP4 x EDP2``, ``TP2 x EP4``, ``PP2 (2 chunks) x EP4``."""
        parts = [f"TP{self.tensor}"] * (self.tensor > 1)
        if self.pipeline > 1:
            chunks = f" ({self.chunks} chunks)" if self.chunks > 1 else ""
            parts.append(f"PP{self.pipeline}{chunks}")
        parts.append(f"EP{self.expert}")
        expert_data = self.ranks // (self.pipeline * self.expert)
        return " x ".join([*parts, *[f"EDP{expert_data}"] * (expert_data > 1)])

    @property
    def is_plain(self) -> bool:
        """Whether all ranks share the experts, and nothing else is split."""
        return self.expert == self.ranks


def all_settings(on_cpu: bool) -> list[str]:
    """The names that ``--settings`` takes; a CPU has no graphs."""
    graphs = [] if on_cpu else [f"{name}{GRAPHS}" for name in SETTINGS if name != "none"]
    return [*SETTINGS, *graphs]


def flags(
    variant: Variant,
    shape: Shape,
    link: str,
    layout: Layout,
    micro_batches: int,
    forced_balance: bool,
    on_cpu: bool,
    overrides: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """The words of a run's command line, but for what says how long it runs and what it logs.

    Args:
        overrides: pattern of the run's name, and flags that are added behind all others.
    """
    parts = [
        *size_flags(shape, has_shared_expert=variant.system != "top2"),
        f"--vocab-size {shape.vocab} {_OF_ALL_MODELS}",
        f"--micro-batch-size {shape.micro_batch} "
        f"--global-batch-size {shape.micro_batch * layout.data * micro_batches} "
        "--moe-token-dispatcher-type alltoall",
        _parallel(layout, shape),
        "--moe-router-force-load-balancing" if forced_balance else "",
        _OF_CPU if on_cpu else "--bf16 --transformer-impl transformer_engine --moe-grouped-gemm",
        _system(variant.system, shape),
        _speed(variant, link, on_cpu),
        _graphs(variant, shape) if variant.graphs else "",
        *(more for pattern, more in overrides if fnmatch(variant.name, pattern)),
    ]
    return [word for part in parts for word in part.split()]


def run_flags(
    iterations: int,
    data_path: str | None,
    on_cpu: bool,
    with_tail: bool = False,
    trace_into: str | None = None,
) -> list[str]:
    """How long a run is, on what data, and what it logs and traces.

    Args:
        iterations: that may be measured.
        data_path: prefix of a dataset; None for Megatron's mock data.
        with_tail: add iterations to be traced. Data and learning rates depend on the length, so
            all runs of a measurement have the tail, also those that are not traced.
        trace_into: a folder; Megatron writes ``torch_profile/rank-0.json.gz`` there.
    """
    begin = iterations + 2  # the profiler warms up in the one before
    last = begin + TRACED if with_tail or trace_into else iterations
    words = (
        f"--train-iters {last} --lr 1e-4 --lr-decay-style constant "
        "--log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 1 --seed 1234"
    ).split()
    if not on_cpu:
        words.append("--log-throughput")
    words += ["--data-path", data_path, "--split", "1,0,0"] if data_path else ["--mock-data"]
    if trace_into:
        words += ["--profile", "--use-pytorch-profiler", "--profile-ranks", "0"]
        words += ["--profile-step-start", str(begin), "--profile-step-end", str(last)]
        words += ["--tensorboard-dir", f"{trace_into}/tensorboard"]
    return words


def _parallel(layout: Layout, shape: Shape) -> str:
    parts = [f"--expert-model-parallel-size {layout.expert}"]
    if layout.tensor > 1:
        parts.append(
            f"--tensor-model-parallel-size {layout.tensor} --expert-tensor-parallel-size 1 "
            "--sequence-parallel"
        )
    if layout.pipeline > 1:
        parts.append(f"--pipeline-model-parallel-size {layout.pipeline}")
    if layout.chunks > 1:
        blocks = shape.blocks // (layout.pipeline * layout.chunks)
        parts.append(f"--num-layers-per-virtual-pipeline-stage {blocks}")
    return " ".join(parts)


def _system(system: str, shape: Shape) -> str:
    """What sets it apart from the others, beyond its experts."""
    scmoe = f"--scmoe-tap {'pos1' if shape.every_block else 'pos2'} --scmoe-combine add"
    return {
        "top2": "",
        "shared": "",
        "shared-overlap": "--moe-shared-expert-overlap",
        "scmoe-serial": f"{scmoe} --no-scmoe-overlap",
        "scmoe": scmoe,
    }[system]


def _speed(variant: Variant, link: str, on_cpu: bool) -> str:
    if variant.group == "none":
        return ""
    parts = ["--overlap-grad-reduce" if on_cpu else _DEFAULTS]
    if not variant.is_stock:
        parts.append("--scmoe-tune off")  # these flags are all there is
    if variant.group == "best":
        parts += [
            more
            for (system, of_link), more in _BEST.items()
            if fnmatch(variant.system, system) and fnmatch(link, of_link)
        ]
    return " ".join(parts)


def _graphs(variant: Variant, shape: Shape) -> str:
    """What is captured: all that the system can."""
    if variant.is_stock:
        modules = ["attn", *([] if shape.every_block else ["mlp"]), "moe_router"]
        if variant.system != "shared-overlap":  # capture runs its begin twice, which it refuses
            modules.append("moe_preprocess")
    elif shape.every_block:
        modules = ["attn"]
    else:
        modules = ["attn", "mlp", "moe_router", "moe_preprocess"]
    capture = (
        "--cuda-graph-impl transformer_engine --te-rng-tracker "
        f"--cuda-graph-warmup-steps {GRAPH_WARMUP} --cuda-graph-modules {' '.join(modules)}"
    )
    if variant.system == "scmoe" and "mlp" in modules:  # the slot that such graphs need
        capture += f" --scmoe-expert-slot {slot_behind_second_attention('pos2')}"
    return capture
