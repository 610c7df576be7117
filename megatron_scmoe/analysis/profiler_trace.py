"""The GPU kernels of a torch profiler's trace, and in them the pairs of ScMoE blocks.

A pair is found by its all-to-alls, which follow each other in a known order: forward, the dispatch
(tokens, then probabilities) of every chunk and the combine of every chunk; backward mirrored.
"""

import gzip
import json
import re
import statistics
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_scmoe.errors import NOT_JSON, Refusal

ATTENTION, GEMM, PERMUTATION = "attention core", "GEMM", "permutation"
COMMUNICATION, OTHER = "communication", "other"

_KINDS = {  # the first that matches; flash attention's names contain those of its GEMM library
    COMMUNICATION: "nccl",
    ATTENTION: "sdpa|flash|fmha|attn|attention|compute_dot_do_o|convert_dq",
    GEMM: "gemm|nvjet|cutlass|xmma|splitkreduce",
    PERMUTATION: "permute|sort_chunks|chunk_sort|row_id_map|indexselect|indexfunc|"
    "vectorized_gather|scatter_gather",
}
_COPIES = ("gpu_memcpy", "gpu_memset")
_TRANSFER = re.compile(r"Memcpy (?:PtoP|DtoH|HtoD)")
_STEP_ACCEPTED = (
    "a trace of whole steps, forward and backward, of the all-to-all dispatcher by NCCL "
    "(--scmoe-exchange collective), with expert parallelism and without recompute"
)


class TraceError(Refusal):
    """A trace that cannot be used; what was given is the file."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, in milliseconds from the begin of the first one of the trace.

    ``collective`` and ``elements`` (the larger of what it sends and receives) are what the
    profiler says of a NCCL kernel; None if it says nothing, as without CPU activities.
    """

    name: str
    stream: int
    begin: float
    end: float
    collective: str | None = None
    elements: int | None = None

    @property
    def kind(self) -> str:
        """Attention core, GEMM, permutation, communication or other, by the kernel's name."""
        name = self.name.lower()
        return next((kind for kind, words in _KINDS.items() if re.search(words, name)), OTHER)

    @property
    def is_all_to_all(self) -> bool:
        """Whether it is an all-to-all (NCCL's sends to neighbours have the same kernel)."""
        known = self.collective is None or self.collective.startswith("all_to_all")
        return "ncclDevKernel_SendRecv" in self.name and known

    @property
    def is_transfer(self) -> bool:
        """Whether it communicates: a kernel of NCCL, or a copy that leaves or enters the device."""
        return self.kind == COMMUNICATION or _TRANSFER.match(self.name) is not None


@dataclass(frozen=True)
class Pass:
    """The forward or the backward of one pair.

    Attributes:
        begin, end: milliseconds. Pairs are parted where the decode of one ends (in backward, begins).
        kernels: all that begin in between, in order.
        exchanges: "dispatch", "probabilities" or "combine", by kernel; among ``kernels``.
    """

    begin: float
    end: float
    kernels: list[Kernel]
    exchanges: dict[Kernel, str]


def read_trace(path: str | Path, with_copies: bool = False) -> list[Kernel]:
    """The kernels of a chrome trace as torch.profiler writes it (.json or .json.gz), by begin.

    Args:
        with_copies: also what copies and fills memory without a kernel.

    Raises:
        TraceError: if the file is anything else, is truncated, or holds no kernel.
    """
    accepted = "a trace written by torch.profiler (benchmarks/step_time.py --trace)"
    try:
        raw = Path(path).read_bytes()
        trace = json.loads(gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw)
    except OSError as error:  # BadGzipFile has no strerror
        raise TraceError(
            str(path), f"cannot be read ({error.strerror or error})", accepted
        ) from error
    except (*NOT_JSON, EOFError, zlib.error) as error:
        raise TraceError(str(path), f"not JSON, or truncated ({error})", accepted) from error
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list):
        raise TraceError(str(path), "no list 'traceEvents'", accepted)
    wanted = ("kernel", *(_COPIES if with_copies else ()))
    kernels = []
    for number, event in enumerate(events):
        if isinstance(event, dict) and event.get("cat") in wanted:
            try:
                kernels.append(_kernel(event))
            except (KeyError, TypeError, ValueError) as error:
                flaw = f"event {number} is not a kernel as the profiler writes it ({error!r})"
                raise TraceError(str(path), flaw, accepted) from error
    if not kernels:
        accepted = "a trace of a step on a GPU; on a CPU there are no kernels to be seen"
        raise TraceError(str(path), "no GPU kernel in it", accepted)
    first = min(kernel.begin for kernel in kernels)
    shifted = (replace(k, begin=k.begin - first, end=k.end - first) for k in kernels)
    return sorted(shifted, key=lambda kernel: kernel.begin)


@dataclass(frozen=True)
class GpuUse:
    """How a GPU spent the time of a trace, in milliseconds.

    Attributes:
        span: from the begin of the first to the end of the last thing it did.
        compute: in which something computes, copies on the device included.
        communication: in which something is sent or received: NCCL's kernels, and copies between the
            device and the host or another device.
        exposed: communication with no compute beside it.
        idle: neither.
        collectives: by the profiler's name of the collective, how long its kernels take together, and
            how much of it has no compute beside it.
    """

    span: float
    compute: float
    communication: float
    exposed: float
    idle: float
    collectives: dict[str, tuple[float, float]]

    def per_iteration(self, count: int) -> dict:
        """All of it divided by the number of iterations traced; ``idle_share`` is one of the span."""
        times = ("span", "compute", "communication", "exposed", "idle")
        return {f"{name}_ms": getattr(self, name) / count for name in times} | {
            "idle_share": self.idle / self.span,
            "exposed_share": self.exposed / self.span,
            "collectives": {
                name: {"ms": total / count, "exposed_ms": alone / count}
                for name, (total, alone) in self.collectives.items()
            },
        }


def gpu_use(path: str | Path) -> GpuUse:
    """How the GPU spent the time of a trace. Raises TraceError as :func:`read_trace` does."""
    work = read_trace(path, with_copies=True)
    sent = [thing for thing in work if thing.is_transfer]
    compute = [(thing.begin, thing.end) for thing in work if not thing.is_transfer]
    span = max(thing.end for thing in work) - work[0].begin
    communication, beside = time_beside(merged((t.begin, t.end) for t in sent), compute)
    collectives = {}
    for name in sorted({_title(thing) for thing in sent}):
        own = [(thing.begin, thing.end) for thing in sent if _title(thing) == name]
        total, hidden = time_beside(own, compute)
        collectives[name] = (total, total - hidden)
    busy = sum(end - begin for begin, end in merged((t.begin, t.end) for t in work))
    computing = sum(end - begin for begin, end in merged(compute))
    return GpuUse(span, computing, communication, communication - beside, span - busy, collectives)


def find_pairs(kernels: Sequence[Kernel], path: str | Path) -> list[tuple[Pass, Pass]]:
    """Forward and backward of every pair, in the order of the forward.

    Of the first pair, both also hold what lies beyond the blocks: embedding, optimizer.

    Args:
        kernels: what :func:`read_trace` gave.
        path: the file, for errors.

    Raises:
        TraceError: if there are no all-to-alls, or not those of whole pairs.
    """
    exchanges = [kernel for kernel in kernels if kernel.is_all_to_all]
    if not exchanges:
        raise TraceError(str(path), "no all-to-all (ncclDevKernel_SendRecv) in it", _STEP_ACCEPTED)
    letters = _letters(exchanges)
    forward, backward = _units(letters)
    steps = f"((?:{forward})+)((?:{backward})+)"
    runs = list(re.finditer(steps, letters))
    counts = [[len(run) // len(forward) for run in step.groups()] for step in runs]
    if not re.fullmatch(f"(?:{steps})+", letters) or any(ahead != back for ahead, back in counts):
        flaw = f"its {len(exchanges)} all-to-alls are not those of whole pairs"
        raise TraceError(str(path), flaw, _STEP_ACCEPTED)

    units = [exchanges[i : i + len(forward)] for i in range(0, len(exchanges), len(forward))]
    is_forward = [flag for n, _ in counts for flag in [True] * n + [False] * n]
    spans = [_span(kernels, units, is_forward, index) for index in range(len(units))]
    passes = [
        Pass(
            begin,
            end,
            [kernel for kernel in kernels if begin <= kernel.begin < end],
            dict(zip(unit, _names(forward if ahead else backward))),
        )
        for (begin, end), unit, ahead in zip(spans, units, is_forward)
    ]
    pairs: list[tuple[Pass, Pass]] = []
    first = 0
    for count, _ in counts:
        step = passes[first : first + 2 * count]
        pairs += zip(step[:count], reversed(step[count:]))
        first += 2 * count
    return pairs


def time_beside(
    exchanges: Iterable[tuple[float, float]], compute: Iterable[tuple[float, float]]
) -> tuple[float, float]:
    """How long the exchanges take, and for how much of it some compute runs.

    Args:
        exchanges: begin and end of each; they do not overlap.
        compute: begin and end of each; they may.
    """
    busy = merged(compute)
    total = beside = 0.0
    for begin, end in exchanges:
        total += end - begin
        beside += sum(max(0.0, min(end, b) - max(begin, a)) for a, b in busy)
    return total, beside


def merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The spans in order; those that touch or overlap are one."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _title(transfer: Kernel) -> str:
    """The collective's name; of a copy, its kind."""
    copy = _TRANSFER.match(transfer.name)
    return copy[0] if copy else transfer.collective or "NCCL"


def _kernel(event: dict) -> Kernel:
    args = event["args"]
    begin, duration = float(event["ts"]) / 1e3, float(event["dur"]) / 1e3
    sizes = [args[key] for key in ("In msg nelems", "Out msg nelems") if key in args]
    return Kernel(
        str(event["name"]),
        int(args["stream"]),
        begin,
        begin + duration,
        args.get("Collective name"),
        max(int(size) for size in sizes) if sizes else None,
    )


def _letters(exchanges: list[Kernel]) -> str:
    """One letter for each exchange: t, rows of tokens or of their gradients; p, probabilities."""
    sizes = [kernel.elements for kernel in exchanges if kernel.elements is not None]
    if len(sizes) < len(exchanges):  # one chunk and one micro-batch, for all that can be told
        count = len(exchanges)
        return ("tpt" * (count // 6) + "ttp" * (count // 6)).ljust(count, "?")
    rows = statistics.median_high(sizes)  # two of three exchange rows
    return "".join("p" if 4 * size < rows else "t" for size in sizes)


def _units(letters: str) -> tuple[str, str]:
    """The letters of one pair's forward and backward; its first dispatches tell the chunks."""
    chunks = max(1, len(re.findall("^(?:tp)*", letters)[0]) // 2)
    return "tp" * chunks + "t" * chunks, "t" * chunks + "tp" * chunks


def _names(unit: str) -> list[str]:
    """What the exchanges of a unit are: tokens sent with probabilities are a dispatch."""
    return [
        "probabilities" if letter == "p" else "dispatch" if after == "p" else "combine"
        for letter, after in zip(unit, unit[1:] + "t")
    ]


def _span(kernels, units, is_forward, index) -> tuple[float, float]:
    """Begin and end of a unit; where no neighbour tells, all up to the next one's exchanges."""
    if is_forward[index]:
        if index == 0:
            begin = kernels[0].begin
        elif is_forward[index - 1]:
            begin = _end_of_decode(kernels, units[index - 1], units[index])
        else:
            begin = units[index - 1][-1].end
        return begin, _end_of_decode(kernels, units[index], units[index + 1])
    begin = _begin_of_decode(kernels, units[index - 1], units[index])
    if index + 1 == len(units):
        return begin, max(kernel.end for kernel in kernels)
    if is_forward[index + 1]:
        return begin, units[index + 1][0].begin
    return begin, _begin_of_decode(kernels, units[index], units[index + 1])


def _end_of_decode(kernels, unit, following) -> float:
    """The decode is the first permutation that begins when the combine has ended."""
    between = _permutations(kernels, unit[-1].end, following[0].begin)
    return between[0].end if between else unit[-1].end


def _begin_of_decode(kernels, preceding, unit) -> float:
    """In backward it is the last permutation before the combine's gradient is sent."""
    between = _permutations(kernels, preceding[-1].end, unit[0].begin)
    return between[-1].begin if between else unit[0].begin


def _permutations(kernels, begin: float, end: float) -> list[Kernel]:
    return [k for k in kernels if begin <= k.begin and k.end <= end and k.kind == PERMUTATION]
