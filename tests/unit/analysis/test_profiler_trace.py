"""How a GPU spent a trace: compute, communication with and without compute beside it, idle."""

import json
from pathlib import Path

import pytest

from megatron_scmoe.analysis.profiler_trace import TraceError, find_pairs, gpu_use, read_trace

TRACE = Path(__file__).parents[2] / "data" / "trace-wide.json"


def event(name: str, begin: float, end: float, category: str = "kernel", **args) -> dict:
    """An event of a trace; milliseconds."""
    args = {"stream": 7} | args
    return {
        "cat": category,
        "name": name,
        "ts": begin * 1e3,
        "dur": (end - begin) * 1e3,
        "args": args,
    }


def trace(folder: Path, events: list[dict]) -> Path:
    path = folder / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_every_millisecond_is_compute_communication_alone_or_idle(tmp_path):
    reduce = {"Collective name": "reduce_scatter"}
    use = gpu_use(
        trace(
            tmp_path,
            [
                event("gemm", 10, 14),
                event("gemm", 12, 15, stream=8),
                event("Memset (Device)", 15, 16, "gpu_memset"),
                event("ncclDevKernel_SendRecv", 13, 18, **{"Collective name": "all_to_allv"}),
                event("ncclDevKernel_ReduceScatter", 17, 19, **reduce),
                event("Memcpy DtoD (Device -> Device)", 20, 21, "gpu_memcpy"),
                event("Memcpy PtoP (Device -> Device)", 21, 22, "gpu_memcpy"),
                event("aten::mm", 0, 30, "cpu_op"),
            ],
        )
    )
    assert (use.span, use.compute, use.communication, use.exposed, use.idle) == (12, 7, 7, 4, 1)
    assert use.collectives == {
        "all_to_allv": (5, 2),
        "reduce_scatter": (2, 2),
        "Memcpy PtoP": (1, 1),
    }


def test_figures_of_an_iteration(tmp_path):
    found = gpu_use(trace(tmp_path, [event("gemm", 0, 6), event("gemm", 8, 10)])).per_iteration(2)
    assert (found["span_ms"], found["compute_ms"], found["idle_ms"]) == (5, 4, 1)
    assert (found["idle_share"], found["exposed_share"]) == (0.2, 0)


def test_parts_of_a_stored_trace_add_up():
    use = gpu_use(TRACE)
    assert use.compute + use.exposed + use.idle == pytest.approx(use.span)
    exchanges = [end for pair in find_pairs(read_trace(TRACE), TRACE) for end in pair]
    taken = sum(kernel.end - kernel.begin for half in exchanges for kernel in half.exchanges)
    named = sum(total for total, _ in use.collectives.values())
    assert use.exposed < use.communication <= named
    assert named >= taken > 0.5 * named


def test_a_trace_without_a_kernel_is_refused(tmp_path):
    with pytest.raises(TraceError, match="no GPU kernel in it"):
        gpu_use(trace(tmp_path, [event("aten::mm", 0, 1, "cpu_op")]))
