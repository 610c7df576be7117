"""A process knows its rank, or is the only one; anything else is one line."""

import os

import pytest
import torch

from megatron_scmoe.cli.process import initialise_ranks
from megatron_scmoe.platform import cpu_backend, launch
from megatron_scmoe.platform.command_line import UsageError

RANK = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """None of a launcher; what a test sets is taken back."""
    also = ("LOCAL_WORLD_SIZE", "CUDA_DEVICE_MAX_CONNECTIONS")
    for name in (*RANK, *launch._OTHER_LAUNCHERS, *also):
        monkeypatch.setenv(name, "")  # remembered, to be restored
        monkeypatch.delenv(name)


def test_a_process_started_alone_is_the_only_rank(capsys):
    launch.check()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert int(os.environ["MASTER_PORT"]) > 1024
    assert capsys.readouterr().out == "> one rank; for more: torchrun --nproc-per-node N ...\n"


def test_a_launched_rank_is_left_as_it_is(monkeypatch, capsys):
    os.environ |= RANK
    monkeypatch.setattr(cpu_backend, "is_enabled", lambda: True)
    launch.check()
    assert {name: os.environ[name] for name in RANK} == RANK
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"  # Megatron asks for it with TP
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", RANK)
def test_half_an_environment(missing):
    os.environ |= {name: value for name, value in RANK.items() if name != missing}
    with pytest.raises(UsageError, match=f"the environment has no {missing}: .*accepted: torchrun"):
        launch.check()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "x", "-1", "1.0"])
def test_what_is_no_number(name, value):
    os.environ |= RANK | {name: value}
    with pytest.raises(
        UsageError, match=f"^{name}={value} in the environment: accepted is a whole"
    ):
        launch.check()


def test_a_rank_that_nobody_waits_for():
    """It would wait for the others until the time is over."""
    os.environ |= RANK | {"RANK": "2"}
    with pytest.raises(
        UsageError, match=r"^RANK=2 in the environment, with WORLD_SIZE=2: accepted"
    ):
        launch.check()


def test_tools_do_not_start_on_half_an_environment(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(UsageError, match=r"^the environment has no RANK: "):
        initialise_ranks()


@pytest.mark.parametrize("name", launch._OTHER_LAUNCHERS)
def test_launchers_that_would_train_many_times(name):
    os.environ[name] = "4"
    with pytest.raises(UsageError, match="with 4 tasks, and no RANK in the environment"):
        launch.check()
    os.environ[name] = "1"
    launch.check()


def test_more_ranks_than_gpus(monkeypatch):
    os.environ |= RANK | {"LOCAL_WORLD_SIZE": "2"}
    monkeypatch.setattr(cpu_backend, "is_enabled", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"--nproc-per-node 2: PyTorch sees 1 GPU here; accepted"):
        launch.check()
