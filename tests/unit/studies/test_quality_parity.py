"""Parity and conversion of the study of quality: real runs of a few steps, and their reports."""

import json
from types import SimpleNamespace

import pytest

from megatron_scmoe.platform.command_line import UsageError
from studies.quality import parity, report, report_conversion, report_parity, run
from studies.quality.arms import SIZES
from tests.unit.studies import forked

TINY = SIZES["tiny"]


@pytest.fixture
def tokens(tmp_path):
    forked.write_tokens(tmp_path / "tokens", TINY.vocabulary)
    return tmp_path / "tokens"


# --- parity ---


def test_the_projects_training_is_that_of_a_plain_model(tokens, tmp_path, monkeypatch):
    """Six steps in fp32: equal to three roundings. Gradients not clipped, or norms that decay, give
    a difference of 2e-6 or more; no auxiliary loss 1e-5; another learning rate 1e-2."""
    processes = SimpleNamespace(run=forked.run, PIPE=None, STDOUT=None)
    monkeypatch.setattr(parity, "subprocess", processes)
    words = f"--tokens {tokens} --steps 6 --out {tmp_path / 'parity.json'}"
    parity.main([*words.split(), "--arms", "pos2", "top2", "pos2-fourfold", "pos2-sigmoid"])
    result = json.loads((tmp_path / "parity.json").read_text())
    assert set(result["arms"]) == {"pos2", "top2", "pos2-fourfold", "pos2-sigmoid"}
    for curves in result["arms"].values():
        assert len(curves["run"]) == 6
        assert curves["run"][-1] < curves["run"][0]
        assert curves["run"] == pytest.approx(curves["plain"], rel=3e-7)
        assert curves["plain"] == pytest.approx(curves["rounded"], rel=1e-5)


def test_a_run_of_other_kinds_differs_from_the_studys_in_that_alone():
    run = parity.Run("pos2", "10m", 1, 1000, 1e-3)
    usual = run.flags(on_cpu=False)
    warm_up = ["--lr-warmup-fraction", "0.05"]
    assert parity.flags(run, True, True, False, 0.05) == [*usual, *warm_up]
    fp32 = parity.flags(run, True, False, False, 0.05)
    assert fp32 == [word for word in usual if word != "--bf16"] + warm_up
    local = parity.flags(run, True, True, True, 0.3)
    assert local[-2:] == ["--lr-warmup-fraction", "0.3"]
    assert local[local.index("--transformer-impl") + 1] == "local" and "--bf16" in local
    assert not {"transformer_engine", "--moe-grouped-gemm", "--moe-permute-fusion"} & set(local)
    assert parity.flags(run, False, False, False, 0.05) == [*run.flags(on_cpu=True), *warm_up]


@pytest.mark.parametrize(
    "flag, reason",
    [
        ("--bf16", "there is no GPU"),
        ("--gpu", "there is no GPU"),
        ("--local", "on the CPU they are"),
        ("--warm-up 1", "accepted is a number between 0 and 1"),
    ],
)
def test_what_parity_cannot_do_is_refused(tokens, tmp_path, flag, reason):
    with pytest.raises(UsageError, match=reason):
        parity.main(f"--tokens {tokens} --out {tmp_path / 'a.json'} {flag}".split())


def test_every_arm_but_that_with_a_moving_bias_can_be_compared():
    assert {"dense", "top1", "shared", "pos1", "pos3", "pos2-post-norm"} < set(parity.comparable())
    assert not {"pos2-zero", "from-dense"} & set(parity.comparable())


def test_the_report_has_the_largest_difference_up_to_a_step(tmp_path):
    arm = {"plain": [4.0, 2.0, 2.0], "run": [4.0, 2.02, 2.0], "rounded": [4.04, 2.0, 2.0]}
    stored = {"size": "tiny", "precision": "fp32", "device": "cpu", "arms": {"pos2": arm}}
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "a.json").write_text(json.dumps(stored))
    assert report_parity.differences(arm["run"], arm["plain"]) == pytest.approx([0, 0.01, 0])
    words = f"--results {tmp_path} --page {tmp_path / 'page.md'} --picture {tmp_path / 'p.png'}"
    report.main(words.split())
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if "| pos2" in line]
    assert rows[0].endswith("| the project's run | 0.0e+00 |  |  |  |")
    assert rows[1].endswith("| plain, fp64 | 1.0e-02 |  |  |  |")
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "p.png").exists()


# --- conversion ---


def test_models_are_trained_converted_and_trained_on(tokens, tmp_path, monkeypatch):
    """A converted dense model begins with the dense model's loss; what exists is not done again."""
    processes = SimpleNamespace(Popen=forked.Popen, STDOUT=None)
    monkeypatch.setattr(run, "subprocess", processes)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "none")
    words = (
        f"--tokens {tokens} --size tiny --gpus 0 --jobs-per-gpu 2 --out {tmp_path / 'out'} "
        "--arms narrow-continued from-dense from-top2 --train-tokens 1024 --base-tokens 1024"
    )
    run.main(words.split())
    results = {found["arm"]: found for found in report.read(tmp_path / "out")}
    assert set(results) == {"narrow", "narrow-continued", "top2", "from-dense", "from-top2"}
    dense = results["narrow"]["validation"]["books"]["loss"]
    for name in ("narrow-continued", "from-dense"):
        assert results[name]["validation_curve"][0] == [0, pytest.approx(dense, abs=2e-5)]
        assert results[name]["iterations"] == 4
    (pair,) = report_conversion.pairs(list(results.values()))
    assert [found["arm"] for found in pair] == ["from-dense", "narrow-continued"]
    assert results["from-dense"]["parameters"] == sum(
        results["from-dense"][f"{kind}_parameters"] for kind in ("total", "embedding")
    )
    kept = sorted(path.name.split("-")[1] for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["narrow", "top2"]
    monkeypatch.setattr(run, "subprocess", None)
    run.main(words.split())


def test_the_converted_model_is_level_where_its_difference_crosses_zero_for_good():
    continued = [(0, 4.0), (10, 3.0), (20, 2.0), (30, 1.0)]

    def after(*differences) -> float | None:
        converted = [(n, loss + more) for (n, loss), more in zip(continued, differences)]
        return report_conversion.level_after(converted, continued)

    assert after(0.0, -0.1, -0.2, -0.3) == 0
    assert after(1.0, 0.75, -0.25, -0.5) == pytest.approx(17.5)
    assert after(-1.0, 1.0, 0.5, -0.5) == pytest.approx(25)
    assert after(1.0, -1.0, -1.0, 0.5) is None


def test_the_report_of_a_conversion(tmp_path):
    def stored(arm: str, seed: int, curve: list, active: float) -> None:
        result = {"arm": arm, "after": "narrow", "size": "10m", "seed": seed, "tokens": 2000000}
        more = {"base_tokens": 4000000, "tokens_asked": 2000000, "learning_rate": 1e-3}
        more |= {"active_parameters": active, "iterations": 2}
        more["validation_curve"] = [*curve, [2, 9.9]]  # the last is of the whole text
        (tmp_path / f"{arm}{seed}.json").write_text(json.dumps(result | more))

    for seed in (1, 2):
        stored("narrow-continued", seed, [[0, 3.0], [1, 3.0], [2, 3.0]], 6.3e6)
        stored("from-dense", seed, [[0, 3.0], [1, 3.0 + seed], [2, 1.5 + seed]], 8.7e6)
    words = f"--results {tmp_path} --page {tmp_path / 'page.md'} --picture {tmp_path / 'p.png'}"
    report.main(words.split())
    rows = [
        line for line in (tmp_path / "page.md").read_text().splitlines() if "from-dense" in line
    ]
    assert rows == [
        "| 10m | from-dense | 4, 2 | 6.3, 8.7 | 2 | 3.0000, 3.0000 | 3.0000, 3.0000 | "
        "1.7 (1 of 2 seeds) |"
    ]
