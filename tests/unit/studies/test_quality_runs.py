"""Arms, runner and report of the study of quality."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_scmoe.platform.command_line import UsageError
from studies.quality import arms, report, report_hours, report_seeds, run
from studies.quality.arms import ARMS, SIZES
from studies.quality.watch import has_been
from tests.benchmarks import environment
from tests.tools import REPOSITORY

TINY = SIZES["tiny"]


COUNT = """
import contextlib, io, json, sys
from megatron_scmoe.platform import cpu_backend
cpu_backend.enable()
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import destroy_global_vars
from megatron_scmoe.model.layer_spec import build_block_spec
from megatron_scmoe.platform import megatron_workarounds
from megatron_scmoe.training.pretrain import parse_settings
from studies.quality.arms import ARMS, SIZES, model_flags, training_flags

torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
size, counts = SIZES["tiny"], {}
for name, arm in ARMS.items():
    flags = [*model_flags(arm, size, True), *training_flags(size, 1, 4000, 1e-3), "--mock-data"]
    sys.argv = ["count", *(flag for flag in flags)]
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    with contextlib.redirect_stdout(io.StringIO()):
        args, scmoe = (parse_and_validate_args(), None) if arm.stock else parse_settings()
    megatron_workarounds.leave_out_missing_fusions(args)
    config = core_transformer_config_from_args(args)
    spec = build_block_spec(config, scmoe) if scmoe else get_gpt_decoder_block_spec(
        config, False, normalization="RMSNorm"
    )
    model = GPTModel(
        config, spec, size.vocabulary, size.sequence, position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    counts[name] = sum(parameter.numel() for parameter in model.parameters())
print(json.dumps(counts))
"""
"""Builds every arm's model of the smallest size, in a process that parses many command lines."""


# --- arms ---


def test_the_flags_build_models_with_the_parameters_that_are_reported():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNT],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    embedding = TINY.vocabulary * TINY.hidden
    assert json.loads(done.stdout.split("\n")[-2]) == {
        name: arms.total_parameters(arm, TINY) + embedding for name, arm in ARMS.items()
    }


@pytest.mark.parametrize("size", ["10m", "30m", "90m"])
def test_all_arms_of_a_size_have_as_many_active_parameters(size):
    counts = {
        name: arms.active_parameters(arm, SIZES[size])
        for name, arm in ARMS.items()
        if not name.startswith("narrow")  # a dense model that becomes one of that size
    }
    assert max(counts.values()) < 1.01 * min(counts.values())
    millions = int(size.removesuffix("m"))
    assert 0.9 * millions < counts["top2"] / 1e6 < 1.1 * millions


def test_seven_routed_experts_and_a_shared_one_are_as_many_as_top2_has():
    totals = {name: arms.total_parameters(ARMS[name], SIZES["10m"]) for name in ("top2", "pos2-7")}
    assert totals["pos2-7"] == pytest.approx(totals["top2"], rel=0.001)
    pos2 = arms.total_parameters(ARMS["pos2"], SIZES["10m"])
    assert pos2 - totals["pos2-7"] == pytest.approx(4 * 9 * 256**2, rel=0.01)


def test_a_run_gets_one_of_the_gpus_that_may_be_seen(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.environment(3)["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert run.environment(1)["CUDA_VISIBLE_DEVICES"] == "3"
    (tmp_path / "train_text_document.idx").touch()
    flags = f"--tokens {tmp_path} --arms top2 --gpus 3 --out {tmp_path}".split()
    with pytest.raises(UsageError, match=r"--gpus 3: CUDA_VISIBLE_DEVICES names 2$"):
        run.main(flags)


def test_arms_of_a_seed_are_trained_alike():
    words = arms.training_flags(SIZES["10m"], 3, 10**6, 1e-3)
    for name in ARMS:
        assert run.Run(name, "10m", 3, 10**6, 1e-3).flags(on_cpu=False)[-len(words) :] == words


def test_converted_and_continued_models_see_the_same_text_in_a_new_order():
    for converted, continued in arms.CONTINUED.items():
        runs = [run.Run(name, "10m", 3, 10**6, 1e-3, 10**6) for name in (converted, continued)]
        assert runs[0].base == runs[1].base
        words = arms.training_flags(SIZES["10m"], 1003, 10**6, 1e-3)
        assert all(each.flags(on_cpu=False)[-len(words) :] == words for each in runs)


def test_an_epoch_is_rounded_up_to_whole_steps():
    assert arms.iterations(SIZES["10m"], 32 * 512) == 1
    assert arms.iterations(SIZES["10m"], 32 * 512 + 1) == 2


# --- runner ---

STAND_IN = """
import json, os, sys, time
facts, tokens, kind, *flags = sys.argv[1:]
seed = int(flags[flags.index("--seed") + 1])
open(os.path.join(tokens, "started"), "a").write(f"{seed} {kind}\\n")
if seed == 7:
    print("no memory"); sys.exit(3)
if seed == 9:
    time.sleep(60)
if "--save" in flags:
    os.makedirs(flags[flags.index("--save") + 1])
if "--load" in flags:
    assert os.path.isdir(flags[flags.index("--load") + 1])
json.dump({"validation": {"a": {"loss": 3.0 + seed}}, "tokens_per_second": 1}, open(facts, "w"))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The runner with a stand-in for training; gives a function that calls it, and its folders."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "train_text_document.idx").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run, "TRAIN", "stand_in")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "stored")

    def call(words: str) -> None:
        run.main(f"--tokens {tmp_path} --out {tmp_path / 'out'} --size tiny {words}".split())

    def started() -> list[str]:
        file = tmp_path / "started"
        return file.read_text().splitlines() if file.exists() else []

    return SimpleNamespace(call=call, started=started, out=tmp_path / "out", folder=tmp_path)


def test_runs_that_have_a_result_are_not_done_again(study):
    study.call("--arms top2 pos2 --seeds 1 2 --gpus 2")
    assert sorted(study.started()) == ["1 scmoe", "1 stock", "2 scmoe", "2 stock"]
    (study.out / "tiny-pos2-0.02M-lr0.002-seed2.json").unlink()
    study.call("--arms top2 pos2 --seeds 1 2 --gpus 2")
    assert study.started()[4:] == ["2 scmoe"]


def test_results_in_the_repository_count_as_done(study, capsys):
    study.call("--arms top2")
    study.out.rename(study.folder / "stored")
    study.call("--arms top2 dense --dry-run")
    assert capsys.readouterr().out.splitlines()[-1] == "tiny-dense-0.02M-lr0.002-seed1"


def test_a_result_says_what_was_run(study):
    study.call("--arms pos2 --seeds 4 --lr 1e-3 --train-tokens 1000")
    (file,) = study.out.iterdir()
    result = json.loads(file.read_text())
    assert file.name == "tiny-pos2-0.001M-lr0.001-seed4.json"
    assert result["validation"] == {"a": {"loss": 7.0}}
    assert result["flags"] == run.Run("pos2", "tiny", 4, 1000, 1e-3).flags(on_cpu=False)
    assert result["active_parameters"] == arms.active_parameters(ARMS["pos2"], TINY)


def test_what_others_start_from_is_trained_before_them_and_kept(study, capsys):
    study.call("--arms top2-continued narrow-continued --gpus 2 --base-tokens 300")
    assert sorted(study.started()[:2]) == ["1 stock", "1 stock"]
    assert sorted(study.started()[2:]) == ["1001 stock", "1001 stock"]
    kept = {file.name for file in (study.out / "checkpoints").iterdir()}
    assert kept == {f"tiny-{arm}-0.0003M-lr0.002-seed1" for arm in ("top2", "narrow")}
    (study.out / "tiny-top2-continued-0.01M-after-0.0003M-lr0.002-seed1.json").unlink()
    study.call("--arms top2-continued narrow-continued --gpus 2 --base-tokens 300")
    assert study.started()[4:] == ["1001 stock"]


def test_what_the_time_limit_cuts_off_leaves_nothing(study, capsys):
    study.call("--arms top2 --seeds 1 9 2 --gpus 2 --time-limit 4")
    names = {file.name for file in study.out.iterdir()}
    assert names == {f"tiny-top2-0.02M-lr0.002-seed{seed}.json" for seed in (1, 2)}
    assert "done: 2, failed: 0, left: 1" in capsys.readouterr().out


def test_a_run_that_fails_shows_its_last_lines_and_the_others_go_on(study, capsys):
    with pytest.raises(UsageError, match=r"failed: tiny-top2-0\.02M-lr0\.002-seed7"):
        study.call("--arms top2 --seeds 7 1 --gpus 1")
    assert "no memory" in capsys.readouterr().out
    assert [file.name for file in study.out.iterdir()] == ["tiny-top2-0.02M-lr0.002-seed1.json"]


# --- report ---


def result(arm: str, seed: int, a: float, b: float, **changes) -> dict:
    sizes = {"active_parameters": 10**6, "total_parameters": 2 * 10**6}
    return {
        "arm": arm,
        "size": "10m",
        "seed": seed,
        "tokens_asked": 10**8,
        "tokens": 10**8,
        "iterations": 100,
        "learning_rate": SIZES["10m"].learning_rate,
        "validation": {"books": {"loss": a}, "manuals": {"loss": b}},
        "validation_curve": [[50, a + 1], [99, a + 0.1], [100, (a + b) / 2]],
        "routers": {"1": {"load_max": 1.25, "entropy": 0.5}},
        "tokens_per_second": 1000,
        **sizes,
        **changes,
    }


def test_the_interval_of_three_values_by_hand():
    """1, 2, 3: deviation 1, t(2) = 4.303, so half the width is 4.303 / sqrt(3)."""
    middle, half = report.interval([1.0, 2.0, 3.0])
    assert middle == 2.0
    assert half == pytest.approx(2.4843, abs=1e-4)
    assert report.interval([1.5]) == (1.5, None)


def test_differences_are_between_runs_of_one_seed():
    base = [result("top2", 1, 3.0, 4.0), result("top2", 2, 2.0, 3.0), result("top2", 3, 0.0, 0.0)]
    ours = [result("pos2", 2, 1.5, 3.0), result("pos2", 1, 2.9, 4.0)]
    assert report.paired_differences(ours, base) == pytest.approx([-0.25, -0.05])
    assert report.paired_differences(ours, base, "books") == pytest.approx([-0.5, -0.1])


def test_the_page_and_the_picture_come_from_the_files(tmp_path):
    stored = tmp_path / "results"
    stored.mkdir()
    half = {"tokens_asked": 5 * 10**7}
    for n, (arm, seed, a, more) in enumerate(
        [
            ("top2", 1, 3.0, {}),
            ("top2", 2, 3.2, {}),
            ("pos2", 1, 2.9, {}),
            ("pos2", 2, 3.1, {}),
            ("dense", 1, 3.5, {"routers": {}}),
            ("pos2", 1, 2.5, {"learning_rate": 1.0}),
            *((arm, seed, 4.0, half) for arm in ("top2", "pos2") for seed in (1, 2)),
        ]
    ):
        (stored / f"{n}.json").write_text(json.dumps(result(arm, seed, a, a, **more)))
    page, picture = tmp_path / "page.md", tmp_path / "p.png"
    report.main(f"--results {stored} --page {page} --picture {picture}".split())
    rows = [line for line in page.read_text().splitlines() if line.startswith("| pos2")][2:]
    assert rows[0] == "| pos2 | 1.0, 2.0 | 2 | 3.0000 | -0.1000 ± 0.0000 | 1.25 | 0.50 | 1,000 |"
    assert rows[1] == "| pos2 | -0.1000 ± 0.0000 | -0.1000 ± 0.0000 |"
    assert rows[2] == "| pos2 | 3.0000 | 2.5000 |"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| 10m, 100 | pos2 | NVLink, 4 GPUs, fine |" in page.read_text()
    assert picture.with_stem("hours").read_bytes().startswith(b"\x89PNG")


def test_an_arm_is_sooner_by_fewer_tokens_and_by_shorter_steps(tmp_path, monkeypatch):
    """Its loss falls from 4 to 2 as the tokens double, so it is at 3 with 2^-0.5 = 71 % of them; its
    steps take 2/3 of the time: 2.12x."""
    runs = {
        "top2/a": 300.0,
        "top2/b": 310.0,
        "scmoe/a": 250.0,
        "scmoe/b": 200.0,
        "scmoe-serial/a": 9.0,
    }
    file = tmp_path / "link.json"
    file.write_text(json.dumps({"runs": {name: {"iteration_ms": ms} for name, ms in runs.items()}}))
    assert report_hours.step_times("link", tmp_path) == {"top2": 300.0, "pos2": 200.0}
    monkeypatch.setattr(report_hours, "LINKS", {"a link": "link"})
    times = report_hours.step_times
    monkeypatch.setattr(report_hours, "step_times", lambda name: times(name, tmp_path))
    full = {"top2": [result("top2", 1, 3.0, 3.0)], "pos2": [result("pos2", 1, 2.0, 2.0)]}
    groups = {("10m", 10**8): full}
    assert not list(report_hours._rows(groups))  # of one length there is no line
    groups["10m", 5 * 10**7] = {"pos2": [result("pos2", 1, 4.0, 4.0)]}
    (row,) = report_hours._rows(groups)
    assert row == "| 10m, 100 | pos2 | a link | 0.667 | 71% | 2.12x | 2.12x |"
    full["pos2"].append(result("pos2", 2, 1.0, 1.0))  # the others have no second seed
    (again,) = report_hours._rows(groups)
    assert again == row
    full["top2"][0] = result("top2", 1, 1.0, 1.0)
    full["pos2"].pop()
    (row,) = report_hours._rows(groups)
    assert row.endswith("| 141% | 1.06x | 1.06x |")


def test_arms_that_no_benchmark_has_give_no_picture_of_time(tmp_path):
    arms = {name: [result(name, seed, 3.0, 3.0) for seed in (1, 2)] for name in ("top2", "dense")}
    report_hours.draw({("10m", 10**8): arms}, tmp_path / "hours.png")
    assert report_hours.section({("10m", 10**8): arms}, "hours.png") == ""
    assert not list(tmp_path.iterdir())


def test_curves_of_one_arm_are_of_the_same_iterations():
    curve = {"tokens": 100, "iterations": 100, "size": "10m", "arm": "pos2"}
    points = [[[50, 5.0], [100, 3.0], [100, 9.9]], [[60, 4.0], [100, 1.0], [100, 9.9]]]
    with pytest.raises(UsageError, match="10m-pos2 was evaluated at other iterations"):
        report_hours.mean_curve([curve | {"validation_curve": each} for each in points])


def test_the_step_at_which_copying_begins_and_what_it_goes_with():
    """Losses 1 to 5; the first run passes 3.75 a quarter of the way from step 10 to 20."""
    results = [
        result("top2", seed, seed, seed, tokens=100, iterations=100,
               validation_curve=[[10, 4.0], [20 + seed, 3.0], [100, 9.9]],
               guesses={"repeated": {"right": -seed}, "bracket": {"right": seed},
                        "name": {"right": seed**2}})
        for seed in range(1, 6)
    ]  # fmt: skip
    assert report_seeds.onset(results[0]) == pytest.approx(10 + 11 / 4)
    (row,) = report_seeds._rows({("10m", 10**8): results})
    assert row == "| 10m, 100 | 5 | 1.00 | 1 | -1.00 | 1.00 | 0.98 |"
    assert report_seeds.section({("10m", 100): results[:4]}) == ""


# --- what is counted in a model ---


def test_a_pair_of_tokens_has_been_if_it_stands_earlier_in_the_row():
    before, label = torch.tensor([[1, 2, 1, 2, 1]]), torch.tensor([[2, 1, 2, 1, 3]])
    assert has_been(before, label).tolist() == [[False, False, True, True, False]]
