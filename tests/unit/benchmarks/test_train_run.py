"""train_run.py: its flags, what it reads from logs, its table; one measurement on two gloo ranks."""

import json
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from megatron_scmoe.platform.command_line import UsageError
from megatron_scmoe.platform.launch import free_port
from tests import harness
from tests.benchmarks import BENCHMARKS, RESULTS, benchmark, environment

LOG = """\
> building train, validation, and test datasets for GPT ...
 [2026-11-20 10:00:00.000000] iteration        1/       3 | consumed samples:            2 | elapsed \
time per iteration (ms): 900.0 | throughput per GPU (TFLOP/s/GPU): 55.0 | learning rate: 5.0E-05 | \
global batch size:     2 | lm loss: 6.250000E+00 | loss scale: 1.0 |
 [2026-11-20 10:00:01.000000] iteration        2/       3 | consumed samples:            4 | elapsed \
time per iteration (ms): 500.5 | throughput per GPU (TFLOP/s/GPU): 99.0 | lm loss: 6.125000E+00 |
 [2026-11-20 10:00:02.000000] iteration        3/       3 | consumed samples:            6 | elapsed \
time per iteration (ms): 499.5 | throughput per GPU (TFLOP/s/GPU): 101.0 | lm loss: 6.000000E+00 |
"""


def variant(name: str):
    return benchmark("train_settings").Variant(*name.split("/"))


def flags(name: str, link: str = "native", on_cpu: bool = False, **changes) -> list[str]:
    """The flags of one run of the wide shape on two ranks."""
    settings = {"micro_batches": 4, "forced_balance": True} | changes
    layout = {"ranks": 2, "expert": 2} | settings.pop("layout", {})
    return benchmark("train_settings").flags(
        variant(name),
        benchmark("shapes").SHAPES[settings.pop("shape", "wide")],
        link,
        benchmark("train_settings").Layout(**layout),
        on_cpu=on_cpu,
        **settings,
    )


def value(words: list[str], flag: str) -> str:
    """What stands behind the last of these flags, which is what argparse takes."""
    return words[len(words) - words[::-1].index(flag)]


def found(losses: dict[str, str] | None = None, log: str = LOG, peak: float | None = 100.0) -> dict:
    """What a rank gives of a run."""
    return {
        "iterations": benchmark("train_result").parse_log(log),
        "losses": {"1": (6.25).hex(), "2": (6.125).hex(), "3": (6.0).hex()}
        if losses is None
        else losses,
        "peak_memory_mb": peak,
        "machine": {},
    }


def row(name: str, *rounds: list[dict], device: str = "NVIDIA H100 80GB HBM3") -> dict:
    measured = benchmark("train_result").Measurement(warmup=1, iterations=3)
    for ranks in rounds:
        measured.add(ranks)
    return measured.row(variant(name), tokens=1000, device=device)


def runs(**milliseconds: float) -> dict[str, dict]:
    """Rows with these times; ``top2__best_graphs`` is ``top2/best+graphs``."""
    rows = {}
    for key, took in milliseconds.items():
        system, settings = key.replace("_graphs", "+graphs").split("__")
        name = f"{system.replace('_', '-')}/{settings}"
        rows[name] = row(name, [found()]) | {"iteration_ms": took}
    return rows


# --- flags ---


def test_top2_has_the_active_experts_of_the_others_and_no_shared_one():
    top2, shared, scmoe = (flags(f"{name}/defaults") for name in ("top2", "shared", "scmoe"))
    assert value(top2, "--moe-router-topk") == "2"
    assert "--moe-shared-expert-intermediate-size" not in top2
    for words in (shared, scmoe):
        assert value(words, "--moe-router-topk") == "1"
        assert value(words, "--moe-shared-expert-intermediate-size") == "5632"


def test_serial_differs_from_scmoe_in_the_overlap_only():
    serial, overlapped = (flags(f"{name}/defaults") for name in ("scmoe-serial", "scmoe"))
    assert [word for word in serial if word not in overlapped] == ["--no-scmoe-overlap"]
    assert not any(word.startswith("--scmoe") for word in flags("shared/defaults"))


def test_settings_of_speed():
    none, defaults, best = (flags(f"scmoe/{name}") for name in ("none", "defaults", "best"))
    assert "--overlap-grad-reduce" not in none
    assert "--overlap-grad-reduce" in defaults
    assert "--manual-gc" not in defaults
    assert {"--manual-gc", "--no-check-for-nan-in-loss-and-grad"} <= set(best)
    assert value(best, "--scmoe-expert-slot") == "2"


def test_graphs_hold_what_the_system_can_capture():
    def captured(name: str, **changes) -> set[str]:
        words = flags(name, **changes)
        modules = words[words.index("--cuda-graph-modules") + 1 :]
        return {word for word in modules if not word.startswith("--")} - {"2"}

    routing = {"attn", "mlp", "moe_router", "moe_preprocess"}
    assert captured("top2/best+graphs") == captured("scmoe/best+graphs") == routing
    assert captured("shared-overlap/best+graphs") == routing - {"moe_preprocess"}
    assert captured("scmoe/best+graphs", shape="llama2") == {"attn"}
    assert value(flags("scmoe/defaults+graphs"), "--scmoe-expert-slot") == "2"


def test_routing_is_forced_or_real():
    flag = "--moe-router-force-load-balancing"
    assert flag in flags("top2/defaults")
    assert flag not in flags("top2/defaults", forced_balance=False)


def test_a_flag_given_for_a_run_wins():
    given = [("scmoe/*", "--scmoe-expert-slot 1")]
    assert value(flags("scmoe/best", overrides=given), "--scmoe-expert-slot") == "1"
    assert "--scmoe-expert-slot" not in flags("scmoe-serial/best", overrides=given)


def test_a_traced_run_trains_as_one_that_is_not(tmp_path):
    """Of the same length; what is traced lies behind what is measured."""
    run_flags = benchmark("train_settings").run_flags
    plain, traced = (run_flags(14, None, False, True, into) for into in (None, str(tmp_path)))
    assert traced[: len(plain)] == plain
    assert value(traced, "--train-iters") == value(traced, "--profile-step-end") == "18"
    assert value(traced, "--profile-step-start") == "16"
    assert value(run_flags(14, None, False), "--train-iters") == "14"


@pytest.mark.slow
@pytest.mark.parametrize("on_cpu", [False, True])
def test_megatron_knows_every_flag(on_cpu, tmp_path):
    from megatron.training.arguments import add_megatron_arguments

    from megatron_scmoe.platform.megatron_flags import add_run_args

    settings = benchmark("train_settings")
    parser = add_megatron_arguments(add_run_args(ArgumentParser(allow_abbrev=False)))
    run = settings.run_flags(14, "data", on_cpu, with_tail=True, trace_into=str(tmp_path))
    for system in settings.SYSTEMS:
        for name in settings.all_settings(on_cpu):
            words = flags(f"{system}/{name}", on_cpu=on_cpu, link="host-staged")
            args = parser.parse_args(words + run)
            assert args.moe_shared_expert_overlap == (system == "shared-overlap")
            assert bool(args.manual_gc) == name.startswith("best")


# --- the command line ---


@pytest.mark.parametrize(
    "words,message",
    [
        (["--settings", "best+graphs"], r"best\+graphs: accepted without a GPU: none, defaults"),
        (["--blocks", "3"], "--blocks 3: ScMoE pairs blocks"),
        (["--iterations", "8"], "--warmup 8 with --iterations 8: none is left"),
        (["--flags", "tops/*=--manual-gc"], r"tops/\*=...: no run has such a name; accepted: top2"),
        (["--trace", "."], "--trace: there is no GPU"),
        (["--keep-logs", "no/such"], "--keep-logs no/such: cannot be made .No such file"),
        (["--json", "x.txt"], "--json x.txt: accepted are names that end in .json"),
    ],
)
def test_what_cannot_be_done_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        benchmark("train_options").parse(True, ["--shape", "cpu", *words])


def test_graphs_need_a_warm_up_that_holds_their_capture():
    words = ["--shape", "wide", "--settings", "best+graphs", "--warmup", "3"]
    with pytest.raises(UsageError, match="--warmup 3: graphs are captured behind iteration 3"):
        benchmark("train_options").parse(False, words)


@pytest.mark.parametrize(
    "given,name,flags_of",
    [
        ([], "EP8", "--expert-model-parallel-size 8"),
        (["--expert-parallel", "4"], "EP4 x EDP2", "--expert-model-parallel-size 4"),
        (
            ["--tensor-parallel", "2", "--expert-parallel", "4"],
            "TP2 x EP4 x EDP2",
            "--expert-model-parallel-size 4 --tensor-model-parallel-size 2 "
            "--expert-tensor-parallel-size 1 --sequence-parallel",
        ),
        (
            ["--pipeline-parallel", "2", "--model-chunks", "3"],
            "PP2 (3 chunks) x EP4",
            "--expert-model-parallel-size 4 --pipeline-model-parallel-size 2 "
            "--num-layers-per-virtual-pipeline-stage 2",
        ),
    ],
)
def test_layouts(given, name, flags_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    options = benchmark("train_options").parse(False, ["--shape", "wide", *given])
    assert options.layout.name == name
    words = flags("scmoe/best", layout=asdict(options.layout))
    assert flags_of in " ".join(words)
    data = 8 // (options.tensor_parallel * options.pipeline_parallel)
    assert value(words, "--global-batch-size") == str(4 * 4 * data)
    result = result_of(scmoe__best=400) | {"layout": asdict(options.layout), "world_size": 8}
    command = shlex.split(benchmark("train_page").command(result).replace("\\\n", ""))
    assert " ".join(given) in " ".join(command)
    assert command.count("--expert-parallel") == given.count("--expert-parallel")


@pytest.mark.parametrize(
    "given,message",
    [
        (
            ["--tensor-parallel", "3"],
            "--tensor-parallel 3 --pipeline-parallel 1: they do not divide",
        ),
        (["--expert-parallel", "3"], "--expert-parallel 3: accepted: divisors of the 8 ranks"),
        (["--model-chunks", "2"], "--model-chunks 2: accepted with --pipeline-parallel"),
        (
            ["--pipeline-parallel", "4"],
            "--blocks 12: a pair of blocks is not split, and there are 4",
        ),
    ],
)
def test_layouts_that_cannot_be_are_refused(given, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UsageError, match=message):
        benchmark("train_options").parse(False, ["--shape", "wide", *given])


# --- what is read and made of it ---


def test_a_log_gives_time_rate_and_loss_of_each_iteration():
    assert benchmark("train_result").parse_log(LOG) == {
        1: {"ms": 900.0, "tflops": 55.0, "loss": 6.25},
        2: {"ms": 500.5, "tflops": 99.0, "loss": 6.125},
        3: {"ms": 499.5, "tflops": 101.0, "loss": 6.0},
    }


@pytest.mark.parametrize(
    "text,line",
    [
        ("x.py: error: --tap pos9: unknown\n", "--tap pos9: unknown"),
        ("Traceback ...\n[rank0]: torch.OutOfMemoryError: x\n", "torch.OutOfMemoryError: x"),
        ("rank 1: ValueError: no\n", "ValueError: no"),
        ("nothing said\n", None),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_found(text, line):
    assert benchmark("train_result").error_line(text) == line


def test_a_row_counts_what_is_behind_the_warm_up():
    made = row("scmoe/best", [found(losses={}, log=""), found(peak=120.0)])
    assert made["iteration_ms"] == 500.0
    assert made["tokens_per_s_per_gpu"] == 2000.0
    assert made["tflops_per_gpu"] == 100.0
    assert made["flop_utilisation"] == pytest.approx(100 / 989.4)
    assert made["peak_memory_mb"] == 120.0
    assert made["final_loss"] == 6.0


def test_a_failure_names_its_cause_and_keeps_what_was_measured():
    failed = [{"error": "another rank failed"}, {"error": "OutOfMemoryError: CUDA"}]
    assert row("top2/best", failed)["error"] == "OutOfMemoryError: CUDA"
    later = row("top2/best", [found()], failed)
    assert (later["iteration_ms"], later["error"]) == (500.0, "OutOfMemoryError: CUDA")


def test_runs_are_compared_with_the_fastest_of_their_settings():
    rows = runs(
        top2__defaults=900, top2__best=600, top2__best_graphs=500, shared__best=450,
        shared_overlap__best=440, scmoe__best_graphs=400,
    )  # fmt: skip
    speeds = benchmark("train_result").speeds(rows, rows["scmoe/best+graphs"])
    assert speeds == {"top2": 500 / 400, "shared": 440 / 400, "serial": None}


def test_what_scmoe_chooses_itself_is_compared_with_the_best_of_the_others():
    rows = runs(top2__none=900, top2__best_graphs=600, shared__best=500, scmoe__none=400)
    speeds = benchmark("train_result").speeds(rows, rows["scmoe/none"])
    assert speeds == {"top2": 900 / 400, "shared": 500 / 400, "serial": None}


def test_losses_are_compared_bit_for_bit():
    notes = benchmark("train_result").loss_notes
    rows = runs(scmoe_serial__best=500, scmoe__best=400)
    assert notes(rows) == ["best: the losses of scmoe and scmoe-serial agree bit for bit"]
    last_bit = {"1": (6.25).hex(), "2": (6.125 + 2**-40).hex(), "3": (6.0).hex()}
    rows["scmoe/best"] = row("scmoe/best", [found(losses=last_bit)])
    assert notes(rows) == [
        "best: the losses of scmoe and scmoe-serial DIFFER from iteration 2 on, "
        "by 1e-13 of it at most; one round does not tell whether a system's own losses repeat"
    ]
    rows["scmoe/best"] = row("scmoe/best", *[[found(losses=last_bit)]] * 2)
    assert notes(rows)[0].endswith("DIFFER from iteration 2 on, by 1e-13 of it at most")
    rows["scmoe/best"] = row("scmoe/best", [found()], [found(losses=last_bit)])
    assert "DIFFER, and so do rounds of one system" in notes(rows)[0]


def test_the_table_of_round_numbers():
    rows = runs(top2__best=800, shared__best=600, scmoe_serial__best=500, scmoe__best=400)
    rows["top2/none"] = row("top2/none", [{"error": "OutOfMemoryError: CUDA"}])
    rows["scmoe/best"]["trace"] = {"idle_share": 0.021, "exposed_share": 0.3}
    result = {"shape": "wide", "sizes": {}, "world_size": 2, "link": "native", "runs": rows}
    lines = benchmark("report").train_table(result).splitlines()
    scmoe = next(line for line in lines if line.startswith("scmoe/best"))
    assert scmoe.split()[:2] == ["scmoe/best", "400.0"]
    assert [word for word in scmoe.split() if word.endswith("x")] == ["2.000x", "1.500x", "1.250x"]
    assert scmoe.split()[-2:] == ["2.1%", "30.0%"]
    assert any(
        line.split() == ["top2/none", "failed:", "OutOfMemoryError:", "CUDA"] for line in lines
    )


# --- the page ---


def result_of(**milliseconds: float) -> dict:
    """A whole JSON of the CPU shape."""
    rows = runs(**milliseconds)
    for made in rows.values():
        made |= {"peak_memory_mb": None, "flop_utilisation": None}
    return {
        "benchmark": "train_run", "shape": "cpu", "sizes": asdict(benchmark("shapes").SHAPES["cpu"]),
        "selected": sorted(rows), "overrides": ["scmoe/*=--scmoe-expert-slot 1"], "micro_batches": 3,
        "routing": "real", "data": "mock", "rounds": 2, "iterations": 14, "warmup": 8,
        "versions": {"torch": "2.11.0"}, "environment": {}, "link": "gloo, two hosts at 400mbit",
        "device": "cpu", "world_size": 2, "date": "2026-11-26", "runs": rows,
    }  # fmt: skip


def test_whole_runs_are_on_the_page(tmp_path):
    result = result_of(top2__best=800, scmoe_serial__best=500, scmoe__best=400)
    (tmp_path / "whole.json").write_text(json.dumps(result))
    lines = "\n".join(benchmark("train_page").whole_runs(tmp_path)).splitlines()
    assert "### Small model, 4 blocks, two CPU ranks, 400 Mbit/s, real routing" in lines
    (scmoe,) = (line for line in lines if line.startswith("| **ScMoE, overlapped**"))
    assert "| best | 400.0 | " in scmoe
    assert "| 2.000x |  | 1.250x | 2000 |" in scmoe
    assert "- Settings best: the losses of scmoe and scmoe-serial agree bit for bit." in lines


def test_only_cards_of_one_kind_and_several_numbers_of_them_are_compared():
    two = result_of(top2__best=800, scmoe__best=400) | {"overrides": [], "link": "native"}
    again, other = dict(two), two | {"device": "another card", "world_size": 4}
    four = two | {"world_size": 4}
    growing = benchmark("train_page").growing
    assert not list(growing([two, again, other]))
    ((_, group),) = growing([four, two, other])
    assert group == [two, four]


def test_measurements_that_would_have_one_heading_say_what_sets_them_apart(tmp_path):
    result = result_of(top2__best=800, scmoe__best=400) | {"overrides": []}
    smaller = result | {"sizes": result["sizes"] | {"micro_batch": 1}}
    flags = smaller | {"overrides": ["scmoe/best=--scmoe-exchange copy-host"]}
    for name, each in (("a", result), ("b", smaller), ("c", flags)):
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    lines = "\n".join(benchmark("train_page").whole_runs(tmp_path)).splitlines()
    plain = "### Small model, 4 blocks, two CPU ranks, 400 Mbit/s, real routing, micro-batches of "
    headings = [line for line in lines if line.startswith("### Small")]
    size = result["sizes"]["micro_batch"]
    assert headings == [
        f"{plain}{size}",
        f"{plain}1",
        f"{plain}1, `--scmoe-exchange copy-host`",
    ]


def test_other_tools_refuse_a_result_of_whole_runs(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(result_of(top2__best=800)))
    with pytest.raises(UsageError, match="it is no result of step_time"):
        benchmark("result").read_result(path)


def measured_whole() -> dict[str, dict]:
    """Measurements of whole runs: the stored ones, and one made here."""
    stored = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    kept = {name: found for name, found in stored.items() if found.get("benchmark") == "train_run"}
    return kept | {"made here": result_of(top2__best=800, scmoe__best=400)}


@pytest.mark.parametrize("name,result", measured_whole().items())
def test_a_command_measures_what_was_measured(name, result, monkeypatch):
    words = shlex.split(benchmark("train_page").command(result).replace("\\\n", ""))
    given = words[words.index("benchmarks/train_run.py") + 1 :]
    given = given[: given.index("--trace")] if "--trace" in given else given
    monkeypatch.setenv("WORLD_SIZE", str(result["world_size"]))
    options = benchmark("train_options").parse(result["device"] == "cpu", given)
    assert options.layout == benchmark("train_result").layout_of(result)
    for key in ("shape", "micro_batches", "routing", "rounds", "iterations", "warmup"):
        assert getattr(options, key) == result[key], key
    assert [variant.name for variant in options.variants] == result["selected"]
    assert [f"{pattern}={words}" for pattern, words in options.flags] == result["overrides"]
    for key in ("blocks", "micro_batch"):
        assert getattr(options.sizes, key) == result["sizes"][key]


# --- a measurement ---


@pytest.mark.slow
def test_two_gloo_ranks_train_and_are_measured(tmp_path):
    """ScMoE in the smallest run: JSON, picture and table."""
    path = tmp_path / "result.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *(BENCHMARKS / "train_run.py", "--shape", "cpu", "--blocks", "2", "--micro-batch", "1"),
        *("--micro-batches", "2", "--iterations", "4", "--warmup", "2", "--rounds", "1"),
        *("--systems", "scmoe", "--json", path, "--plot", path.with_suffix(".png")),
    ]
    run = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment()
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(path.read_text())
    assert list(result["runs"]) == ["scmoe/defaults"]
    assert (result["world_size"], result["device"]) == (2, "cpu")
    made = result["runs"]["scmoe/defaults"]
    assert made["iteration_ms"] > 0
    assert made["tokens_per_s_per_gpu"] == pytest.approx(256e3 / made["iteration_ms"])
    assert list(made["losses"]) == ["1", "2", "3", "4"]
    assert 5 < made["final_loss"] < 8
    assert made["flop_utilisation"] is None
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "scmoe/defaults" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("system", ["top2", "shared-overlap"])
def test_stock_trains_through_the_same_loop(system, tmp_path):
    """One rank of a run, as train_processes.py starts it, in processes that know Megatron."""
    settings, shapes = benchmark("train_settings"), benchmark("shapes").SHAPES
    shape = replace(shapes["cpu"], blocks=2, micro_batch=1)
    layout = settings.Layout(ranks=2, expert=2)
    words = settings.flags(variant(f"{system}/defaults"), shape, "gloo", layout, 1, True, True)
    words += settings.run_flags(3, None, on_cpu=True)
    task = (2, free_port(), words, str(tmp_path / "log"))
    ranks = [
        harness._context.Process(target=_stock, args=(str(tmp_path / f"{rank}.json"), rank, *task))
        for rank in range(2)
    ]
    statuses = harness._join(ranks, harness.TIMEOUT_S)
    text = (tmp_path / "log").read_text()
    assert statuses == [0, 0], text[-3000:]
    made = json.loads((tmp_path / "1.json").read_text())
    logged = benchmark("train_result").parse_log(text)
    losses = {int(number): float.fromhex(loss) for number, loss in made["losses"].items()}
    assert sorted(logged) == sorted(losses) == [1, 2, 3]
    assert logged[1]["loss"] == pytest.approx(losses[1], rel=1e-6)
    assert logged[2]["loss"] == pytest.approx((losses[1] + losses[2]) / 2, rel=1e-6)
    assert logged[3]["loss"] == pytest.approx(losses[3], rel=1e-6)
    assert made["machine"]["world_size"] == 2


def _stock(facts: str, *task) -> None:
    """A rank, in a forked process."""
    from megatron_scmoe.training import pretrain

    pretrain.main = partial(benchmark("train_rank").main, Path(facts), "stock")
    sys.path.insert(0, str(BENCHMARKS))  # as of a script
    harness._pretrain(*task)
