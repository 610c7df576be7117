"""What the demo prints: text as it is, each iteration in one line, the reason of a failed run."""

import io

import pytest
from rich.console import Console

from tests.tools import tool

demo = tool("demo")


@pytest.fixture
def console():
    return Console(file=io.StringIO(), highlight=False, soft_wrap=True, markup=False, width=200)


def test_table_shows_the_unit_of_its_losses(console):
    losses = demo.Losses(
        {at: demo.Record(at, validation_loss=1.0) for at in (0, demo.FULL.first, demo.FULL.last)}
    )
    console.print(demo.summary(losses, demo.FULL))
    assert "loss [nats/token]" in console.file.getvalue()


def test_demo_prints_paths_with_brackets(tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise demo.RunFailed("stopped")

    monkeypatch.setattr(demo, "run", stop)
    monkeypatch.setattr(demo.Hardware, "find", lambda: demo.Hardware("GPU [red]", 1, []))
    monkeypatch.setattr(demo, "prepare", lambda folder, **_: demo.DemoData(folder))
    with pytest.raises(demo.RunFailed):
        demo.demo(tmp_path, demo.SMOKE, [])
    assert capsys.readouterr().out == "ScMoE demo on 1 ranks (GPU [red])\n"


def test_iteration_has_one_line_with_all_that_was_told_of_it(console):
    with demo._Display("train", 0, 2, console) as display:
        display.show(demo.Record(1, lm_loss=3.0))
        display.show(demo.Record(2, lm_loss=2.0))
        display.show(demo.Record(2, lm_loss=2.0, validation_loss=2.5))
    assert console.file.getvalue().splitlines() == [
        "train   1/2  loss 3.000",
        "train   2/2  loss 2.000  held-out 2.500",
    ]


TORCHRUN_REPORT = """
Root Cause (first observed failure):
[0]:
  rank      : 0 (local_rank: 0)
  error_file: /tmp/error.json
  traceback : {reason}
============================================================
"""


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("\n  pretrain_gpt_scmoe.py: error: a refusal", "pretrain_gpt_scmoe.py: error: a refusal"),
        ("To enable traceback see: https://pytorch.org", "the last words of a rank"),
        ("Signal 9 (SIGKILL) received by PID 7", "the last words of a rank"),
    ],
)
def test_failed_run_is_explained_by_its_reason(reason, expected, tmp_path):
    log = tmp_path / "train.log"
    report = "  File torch/distributed/elastic/x.py\n" + TORCHRUN_REPORT.format(reason=reason)
    log.write_text(f"x.py:1: UserWarning: y\nthe last words of a rank\n{report}")
    assert demo._last_lines(log) == expected
