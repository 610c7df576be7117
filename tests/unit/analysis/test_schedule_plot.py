"""Schedules drawn: what stands in the figure against the simulation and against real kernels."""

import gzip
import json
import random
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_scmoe.analysis import schedule_plot
from megatron_scmoe.analysis.profiler_trace import TraceError, find_pairs, read_trace, time_beside
from megatron_scmoe.analysis.simulator import (
    COMMUNICATION,
    COMPUTE,
    OPERATORS,
    OperatorTimes,
    block_time,
    simulate,
)
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, build_schedule, num_slots
from megatron_scmoe.platform.command_line import run_tool
from tests.unit.cli.test_data_commands import tool

pytestmark = pytest.mark.slow

TRACE = Path(__file__).parents[2] / "data" / "trace-wide.json"
"""The kernels of two neighbouring pairs, forward and backward, cut out of a trace of the benchmark's
shape "wide" (2 x H200, Pos-2, slot 2, overlapped); names shortened."""


@pytest.fixture
def times() -> OperatorTimes:
    generator = random.Random(5)
    return OperatorTimes(
        *({name: generator.uniform(0.1, 3.0) for name in OPERATORS} for _ in range(2))
    )


@pytest.fixture
def times_file(times, tmp_path) -> Path:
    times.write(tmp_path / "times.json")
    return tmp_path / "times.json"


def plot(*argv) -> None:
    tool("plot_schedule").main([str(word) for word in argv])


def plot_and_exit(monkeypatch, *argv) -> int:
    """The exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["plot_schedule.py", *map(str, argv)])
    with pytest.raises(SystemExit) as caught:
        run_tool(tool("plot_schedule").main)
    return caught.value.code


# --- predicted ---


@pytest.mark.parametrize("chunks,overlap", [(1, True), (3, True), (2, False)])
@pytest.mark.parametrize("tap", TAP_BOUNDARY)
def test_bars_in_the_figure_are_the_simulated_intervals(tap, chunks, overlap, times):
    schedule = build_schedule(tap, 1, overlap, chunks=chunks)
    panels = schedule_plot.simulated_panels(schedule, times)
    figure = schedule_plot.draw([panels], "title")
    for backward, axes in zip((False, True), figure.axes, strict=True):
        rails = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert rails == [COMPUTE, COMMUNICATION]
        drawn = sorted(
            (round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_width())
            for bar in axes.patches
        )
        expected = sorted(
            ((COMPUTE, COMMUNICATION).index(i.rail), i.begin, i.end - i.begin)
            for i in simulate(schedule, times, backward)
        )
        np.testing.assert_allclose(drawn, expected)
    assert sum(panel.length for panel in panels) == pytest.approx(block_time(schedule, times))


def test_serial_communication_has_no_compute_beside_it(times):
    for overlap in (False, True):
        panels = schedule_plot.simulated_panels(build_schedule("pos3", 2, overlap), times)
        assert (schedule_plot.share_beside(panels) > 0) == overlap


def test_hidden_time_is_the_sum_less_the_block_time(times):
    """With one chunk, time is saved exactly where communication lies beside compute."""
    serial = block_time(build_schedule("pos2", 1, False), times)
    schedule = build_schedule("pos2", 1, True)
    panels = schedule_plot.simulated_panels(schedule, times)
    saved = serial - block_time(schedule, times)
    assert sum(panel.beside for panel in panels) == pytest.approx(saved)


def test_labels_stand_only_in_bars_that_hold_them():
    short = dict.fromkeys(OPERATORS, 5.0) | {"permute": 0.05}
    times = OperatorTimes(short, short)
    panels = schedule_plot.simulated_panels(build_schedule("pos2", 1, True), times)
    figure = schedule_plot.draw([panels], "title")
    for axes in figure.axes:
        labels = {text.get_text().replace("\n", " ") for text in axes.texts}
        assert {"experts", "dispatch", "second attention"} <= labels and "permute" not in labels
        for text in axes.texts:
            box = text.get_window_extent()
            middle = (box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2
            (bar,) = [b for b in axes.patches if b.get_window_extent().contains(*middle)]
            assert bar.get_window_extent().x0 <= box.x0 and box.x1 <= bar.get_window_extent().x1
    (legend,) = figure.legends
    assert "gate, encode, decode" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("tap", TAP_BOUNDARY)
def test_all_slots_stand_under_each_other_best_first(tap, times, times_file, tmp_path, capsys):
    plot("--times", times_file, "--tap", tap, "--all-slots", "--output", tmp_path / "slots.svg")
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if "slot " in line]
    cost = {s: block_time(build_schedule(tap, s, True), times) for s in range(num_slots(tap))}
    assert [int(words[1]) for words in printed] == sorted(cost, key=cost.get)
    assert ["(best)" in words for words in printed] == [True] + [False] * (len(cost) - 1)
    text = "".join(ElementTree.parse(tmp_path / "slots.svg").getroot().itertext())
    assert all(f"{time:.2f} ms" in text for time in cost.values())
    assert text.count("(best)") == 1


def test_serial_and_overlapped_stand_under_each_other(times, times_file, tmp_path, capsys):
    plot("--times", times_file, "--slot", "2", "--compare", "--output", tmp_path / "two.svg")
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[2:4]]
    cost = [block_time(build_schedule("pos2", 2, overlap), times) for overlap in (False, True)]
    assert [words[:2] for words in printed] == [
        [name, f"{time:.3f}"] for name, time in zip(("serial", "overlapped"), cost)
    ]
    text = "".join(ElementTree.parse(tmp_path / "two.svg").getroot().itertext())
    assert all(f"{time:.2f} ms" in text for time in cost)


def test_flags_choose_the_schedule(times, times_file, tmp_path, capsys):
    argv = ["--tap", "pos1", "--slot", "2", "--chunks", "2", "--no-overlap"]
    plot("--times", times_file, *argv, "--output", tmp_path / "one.svg")
    expected = block_time(build_schedule("pos1", 2, False, chunks=2), times)
    assert f"{expected:.3f}" in capsys.readouterr().out


# --- from a trace ---


def synthetic_trace(path: Path, *kernels: tuple[str, int, float, float]) -> Path:
    """A trace in the profiler's format; kernels: name, stream, begin, duration, in µs."""
    events = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}]
    for name, stream, begin, duration in kernels:
        event = dict(ph="X", cat="kernel", name=name, pid=0, tid=stream, ts=begin, dur=duration)
        events.append(event | {"args": {"stream": stream}})
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return path


SEND = "ncclDevKernel_SendRecv(x)"
ONE_PAIR = [
    # Forward: 100 + 10 + 80 of communication, of which 60 + 0 + 40 beside the two GEMMs.
    ("nvjet_sm90", 7, 1000, 50),
    (SEND, 26, 1060, 100),
    ("nvjet_sm90", 7, 1100, 60),
    (SEND, 26, 1160, 10),
    ("void cutlass::Kernel2<gemm>", 163, 1200, 40),
    (SEND, 26, 1200, 80),
    ("_unpermute_kernel", 7, 1280, 20),
    # Backward: 100 + 100 + 10, all of the first one and nothing of the others.
    ("loss", 7, 1500, 100),
    ("_permute_kernel", 7, 1990, 10),
    (SEND, 26, 2000, 100),
    ("nvjet_sm90", 7, 2000, 150),
    (SEND, 26, 2200, 100),
    (SEND, 26, 2300, 10),
    ("sdpa_sm90_flash_bprop", 7, 2310, 90),
]


def test_a_pair_by_hand(tmp_path):
    path = synthetic_trace(tmp_path / "trace.json", *ONE_PAIR)
    (pair,) = find_pairs(read_trace(path), path)
    forward, backward = schedule_plot.traced_panels(pair)
    assert [round(panel.length, 6) for panel in (forward, backward)] == [0.300, 0.410]
    assert [round(panel.communication, 6) for panel in (forward, backward)] == [0.190, 0.210]
    assert [round(panel.beside, 6) for panel in (forward, backward)] == [0.100, 0.100]
    assert schedule_plot.share_beside([forward, backward]) == pytest.approx(0.5)
    assert forward.rails == ("compute, stream 7", "compute, stream 163", "communication, stream 26")
    assert [bar.label for bar in forward.bars if bar.rail == forward.rails[2]] == [
        "dispatch",
        "probabilities",
        "combine",
    ]
    assert [bar.kind for bar in backward.bars if bar.rail == "compute, stream 7"] == [
        "permutation",
        "GEMM",
        "attention core",
    ]


@pytest.mark.parametrize("chunks,micro_batches,blocks", [(1, 2, 3), (2, 1, 2), (4, 2, 1)])
def test_pairs_of_chunks_and_micro_batches(tmp_path, chunks, micro_batches, blocks):
    tokens, probabilities = 4096, 4
    forward = [tokens, probabilities] * chunks + [tokens] * chunks
    backward = [tokens] * chunks + [tokens, probabilities] * chunks
    sizes = (forward * blocks + backward * blocks) * micro_batches
    path = synthetic_trace(
        tmp_path / "trace.json", *((SEND, 26, 10.0 * n, 10.0) for n in range(len(sizes)))
    )
    trace = json.loads(path.read_text())
    for event, size in zip(trace["traceEvents"][1:], sizes, strict=True):
        event["args"] |= {"Collective name": "all_to_allv", "In msg nelems": size}
    path.write_text(json.dumps(trace))
    pairs = find_pairs(read_trace(path), path)
    assert len(pairs) == blocks * micro_batches
    first = [begun.exchanges for begun in pairs[0]]
    assert list(first[0].values()) == ["dispatch", "probabilities"] * chunks + ["combine"] * chunks
    assert list(first[1].values()) == ["combine"] * chunks + ["dispatch", "probabilities"] * chunks
    place = {kernel: number for number, kernel in enumerate(read_trace(path))}
    begins = [[min(place[k] for k in half.exchanges) for half in pair] for pair in pairs[:blocks]]
    unit = 3 * chunks  # the backward runs from the last pair to the first
    assert begins == [[unit * n, unit * (2 * blocks - 1 - n)] for n in range(blocks)]


def test_real_kernels_of_a_pair():
    pairs = find_pairs(read_trace(TRACE), TRACE)
    assert len(pairs) == 2
    forward, backward = pairs[1]
    for half in pairs[1]:
        core = [kernel for kernel in half.kernels if "sdpa" in kernel.name]
        assert len(core) == 2 and {kernel.kind for kernel in core} == {"attention core"}
        assert sum(kernel.is_all_to_all for kernel in half.kernels) == len(half.exchanges) == 3
    assert "_unpermute_kernel" in forward.kernels[-1].name
    assert "_permute_kernel" in backward.kernels[0].name
    # The experts: two GEMMs forward, four backward, for each of four local experts.
    grouped = [{k.stream for k in half.kernels} - {7, 26} for half in (forward, backward)]
    assert grouped == [{163, 164, 165, 166}] * 2


def test_share_of_real_kernels_is_that_of_samples():
    for panel, half in zip(
        schedule_plot.traced_panels(find_pairs(read_trace(TRACE), TRACE)[1]),
        find_pairs(read_trace(TRACE), TRACE)[1],
    ):
        at = np.arange(half.begin, half.end, 1e-3)[:, None]
        runs = np.array([(k.begin, k.end) for k in half.kernels])
        covered = (runs[:, 0] <= at) & (at < runs[:, 1])
        sends = np.array([kernel in half.exchanges for kernel in half.kernels])
        computes = np.array(["nccl" not in kernel.name for kernel in half.kernels])
        during, beside = covered[:, sends].any(1), covered[:, computes].any(1)
        assert panel.beside / panel.communication == pytest.approx(
            (during & beside).sum() / during.sum(), abs=5e-3
        )


def test_pairs_are_found_without_sizes_too():
    """A trace without CPU activities says nothing of collectives."""
    kernels = read_trace(TRACE)
    silent = [type(k)(k.name, k.stream, k.begin, k.end) for k in kernels]
    spans = [
        [(half.begin, half.end) for pair in find_pairs(found, TRACE) for half in pair]
        for found in (kernels, silent)
    ]
    assert spans[0] == spans[1]


def test_compute_that_overlaps_counts_once():
    total, beside = time_beside([(0, 4), (6, 10)], [(1, 3), (2, 5), (2, 3), (9, 12)])
    assert (total, beside) == (8, 4)


def test_a_compressed_trace_draws_the_same(tmp_path):
    packed = tmp_path / TRACE.with_suffix(".json.gz").name
    packed.write_bytes(gzip.compress(TRACE.read_bytes()))
    assert read_trace(packed) == read_trace(TRACE)


# --- files ---


@pytest.mark.parametrize("source", ["times", "trace"])
def test_figures_are_valid_and_the_same_each_time(source, times_file, tmp_path):
    given = ["--times", times_file] if source == "times" else ["--trace", TRACE]
    for name in ("a.svg", "b.svg", "a.png"):
        plot(*given, "--output", tmp_path / "figures" / name)
    first, second, picture = (tmp_path / "figures" / n for n in ("a.svg", "b.svg", "a.png"))
    assert first.read_bytes() == second.read_bytes()
    root = ElementTree.parse(first).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "of the all-to-all time beside compute" in "".join(root.itertext())
    with Image.open(picture) as image:
        image.verify()
        assert image.format == "PNG" and image.width > 1000
    assert len(list((tmp_path / "figures").iterdir())) == 3  # nothing staged is left


def test_a_figure_is_overwritten_only_when_told_and_only_when_whole(
    times_file, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "figure.svg"
    output.write_text("mine")
    argv = ["--times", times_file, "--output", output]
    assert plot_and_exit(monkeypatch, *argv) == 2
    assert "--force" in capsys.readouterr().err and output.read_text() == "mine"

    def fail(figure, path):
        path.write_text("<svg")
        raise OSError("no space left")

    with monkeypatch.context() as context:
        context.setattr(schedule_plot, "save", fail)
        assert plot_and_exit(context, *argv, "--force") == 1
    assert output.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"figure.svg", "times.json"}
    assert plot_and_exit(monkeypatch, *argv, "--force") == 0
    ElementTree.parse(output)


def cpu_trace(path: Path) -> bytes:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(4) + 1
    profile.export_chrome_trace(str(path))
    return path.read_bytes()


BROKEN = {
    "truncated": (lambda path: TRACE.read_bytes()[:5000], "not JSON, or truncated"),
    "truncated gzip": (lambda path: gzip.compress(TRACE.read_bytes())[:900], "truncated"),
    "foreign": (lambda path: b'{"forward": {}}', "no list 'traceEvents'"),
    "nested": (lambda path: b"[" * 100_000, "not JSON, or truncated"),
    "binary": (lambda path: b"\x80\x81\xff", "not JSON, or truncated"),
    "of the CPU": (cpu_trace, "no GPU kernel in it"),
    "no communication": (
        lambda path: synthetic_trace(path, ("gemm", 7, 0, 1)).read_bytes(),
        "no all-to-all",
    ),
    "half a pair": (
        lambda path: synthetic_trace(path, *ONE_PAIR[:-3]).read_bytes(),
        "its 4 all-to-alls are not those of whole pairs",
    ),
    "a kernel without duration": (
        lambda path: b'{"traceEvents": [{"cat": "kernel", "name": "k", "ts": 1, "args": {}}]}',
        "event 0 is not a kernel",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_traces_that_cannot_serve(case, tmp_path, monkeypatch, capsys):
    content, flaw = BROKEN[case]
    path = tmp_path / "given.json"
    path.write_bytes(content(path))
    output = tmp_path / "figure.svg"
    assert plot_and_exit(monkeypatch, "--trace", path, "--output", output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--trace {path}: " in line and flaw in line and "accepted: " in line
    assert not output.exists()


def test_a_trace_that_is_not_there(tmp_path):
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    "argv,message",
    [
        ([], "--times: not given; accepted: a file written by --scmoe-operator-times"),
        (["--times", "TIMES", "--trace", TRACE], "accepted is one of them"),
        (["--times", TRACE], f"--times {TRACE}: no object 'forward'"),
        (["--times", "nothing.json"], "nothing.json"),
        (["--times", "TIMES", "--slot", "4"], "--slot 4: with --tap pos2 accepted are 0 to 3"),
        (["--times", "TIMES", "--slot", "1", "--all-slots"], "--slot 1: --all-slots"),
        (["--times", "TIMES", "--compare", "--all-slots"], "leave --all-slots out"),
        (["--times", "TIMES", "--compare", "--no-overlap"], "leave --overlap out"),
        (["--times", "TIMES", "--chunks", "0"], "--chunks 0: accepted is 1 to 64"),
        (["--times", "TIMES", "--tap", "pos4"], "invalid choice: 'pos4'"),
        (["--times", "TIMES", "--pair", "1"], "--pair: works with --trace only"),
        (["--trace", TRACE, "--no-overlap"], "--overlap: works with --times only"),
        (["--trace", TRACE, "--all-slots"], "--all-slots: works with --times only"),
        (["--trace", TRACE, "--pair", "3"], "has the pairs 1 to 2"),
        (["--times", "TIMES", "--output", "x.pdf"], "x.pdf: accepted are names that end in .svg"),
    ],
)
def test_requests_that_cannot_be_met(argv, message, times_file, tmp_path, monkeypatch, capsys):
    argv = [times_file if word == "TIMES" else word for word in argv]
    output = tmp_path / "figure.svg"
    assert plot_and_exit(monkeypatch, "--output", output, *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not output.exists()
