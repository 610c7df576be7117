"""RESULTS.md is what the JSON files give; its names tell results apart; its commands measure them."""

import json
import shlex
import sys
import tomllib

import pytest

from tests.benchmarks import BENCHMARKS, RESULTS, benchmark, stored

NAMES = sorted(
    path.stem
    for path in RESULTS.glob("*.json")
    if not path.stem.endswith("operator-times") and "benchmark" not in json.loads(path.read_text())
)
"""Of step_time.py; test_train_run.py has the others."""


@pytest.fixture(scope="module")
def results() -> dict[str, dict]:
    """What the page shows, by file."""
    return {result["name"]: result for result in benchmark("results_page").read_all(RESULTS)}


def test_the_page_is_what_the_files_give():
    text = (BENCHMARKS / "RESULTS.md").read_text()
    assert text == benchmark("results_page").page(RESULTS), "run benchmarks/results_page.py"


def test_check_refuses_a_page_that_was_changed(tmp_path, monkeypatch):
    module = benchmark("results_page")
    monkeypatch.setattr(module, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(sys, "argv", ["results_page.py"])
    module.main()
    monkeypatch.setattr(sys, "argv", ["results_page.py", "--check"])
    module.main()
    module.PAGE.write_text(module.PAGE.read_text().replace("1.511x", "1.611x"))
    with pytest.raises(module.ScMoEError, match=r"not what .* gives; run") as refused:
        module.main()
    assert refused.value.status == 1


def test_every_file_is_on_the_page_once(results):
    assert sorted(results) == NAMES


def test_no_two_results_have_the_same_name(results):
    page, spoken = benchmark("results_page"), benchmark("spoken")
    names = [(page.title(result), spoken.variant(result)) for result in results.values()]
    assert len(set(names)) == len(names)


def test_names_can_be_said(results):
    page, spoken = benchmark("results_page"), benchmark("spoken")
    medium = results["4xh200-medium-staged"]
    assert page.title(medium) == (
        "GPT2-MoE-Medium, 24 blocks, four H200, tokens through host memory"
    )
    assert spoken.variant(medium) == (
        "Pos-3, slot 2, copy engines in backward, CUDA graphs, 16 sequences"
    )
    assert page.title(results["cpu-2hosts-400mbit"]) == (
        "Small model, 4 blocks, two CPU ranks, 400 Mbit/s"
    )
    assert page.title(results["1xh200-wide"]) == "Eight wide experts, 8 blocks, one H200"


def test_every_shape_has_a_name():
    assert benchmark("spoken").MODELS.keys() == benchmark("shapes").SHAPES.keys()


def test_notes_are_of_files_that_exist():
    notes = tomllib.loads((RESULTS / "notes.toml").read_text())
    assert notes.keys() <= set(NAMES)
    assert {key for about in notes.values() for key in about} <= {"settings", "floor", "notes"}


def test_a_table_of_round_numbers(tmp_path):
    result = json.loads(stored("4xh200-wide-staged-pos3").read_text())
    times = {
        "top2": (200, 100),
        "shared": (160, 90),
        "scmoe-serial": (150, 80),
        "scmoe": (100, 50),
        "floor": (90, 40),
    }
    result["systems"] = {
        name: {"step_ms": step, "forward_ms": forward, "peak_memory_mb": None}
        for name, (step, forward) in times.items()
    }
    result["hidden_share"] = {"step": 5 / 6, "forward": 0.75}
    (tmp_path / "round.json").write_text(json.dumps(result))
    for name, text in (("intro.md", "# Results\n\n{summary}\n"), ("notes.toml", "")):
        (tmp_path / name).write_text(text)
    operators = RESULTS / "2xh200-wide-operator-times.json"
    (tmp_path / operators.name).write_text(operators.read_text())
    lines = benchmark("results_page").page(tmp_path).splitlines()
    assert "| stock top-2 | 200.0 | 1.000x | 100.0 | 1.000x |" in lines
    assert "| **ScMoE, overlapped** | 100.0 | 2.000x | 50.0 | 2.000x |" in lines
    assert "| hidden | 0.833 | 0.750 |" in lines
    assert "| time over communication left out | 1.111 | 1.250 |" in lines
    assert "| over stock top-1 + shared expert | 1.600x | 1.800x |" in lines
    assert any(line.endswith("| 2.000x | 2.000x |  | 0.833 | 0.750 |  |") for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_measures_what_was_measured(name, results, monkeypatch):
    result = results[name]
    words = shlex.split(benchmark("rerun").command(result).replace("\\\n", ""))
    script = words.index("benchmarks/step_time.py")
    for word in words[:script]:
        if "=" in word:
            monkeypatch.setenv(*word.split("="))
    on_cpu = result["device"] == "cpu"
    options = benchmark("options").parse(on_cpu, words[script + 1 :])
    assert sorted(options.systems) == sorted(result["systems"])
    for key, value in result["sizes"].items():
        if key != "of_blocks":  # not in the oldest files
            made = getattr(options.sizes, key)
            assert (list(made) if key == "cuda_graphs" else made) == value, key
    for key in ("tap", "chunks", "exchange", "copied", "ep_channels", "ep_high_priority",
                "train_micro_batches"):  # fmt: skip
        assert getattr(options, key) == result[key], key
    for key in ("rounds", "warmup"):
        assert getattr(options, key) == result.get(key, getattr(options, key))
    assert options.slot == (benchmark("options").DEFAULT_EXPERT_SLOT[options.tap]
        if result["slot"] is None else result["slot"])  # fmt: skip
    assert bool(options.train_rounds) == any(
        "train_ms" in row for row in result["systems"].values()
    )
    assert options.operators == bool(result.get("operators"))
    if on_cpu:
        assert words[:4] == ["benchmarks/two_hosts.sh", "--rate", "400mbit", "--"]
    else:
        assert words[script - 3 : script] == [
            "torchrun",
            "--nproc-per-node",
            str(result["world_size"]),
        ]
        staged = "NCCL_P2P_DISABLE=1" in words
        assert staged == (result["link"] == "host-staged")
