"""Whether a run takes the CPU: only where there is no GPU, or where it is asked for."""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.command_line import UsageError


@pytest.fixture
def no_gpu(monkeypatch):
    """PyTorch sees no GPU, and nothing asks for the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_scmoe.py"])
    monkeypatch.delenv(cpu_backend.VARIABLE, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cpu_backend, "enable", lambda: None)


def machine(monkeypatch, root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    trace = cpu_backend._trace_of_a_gpu
    monkeypatch.setattr(cpu_backend, "_trace_of_a_gpu", lambda: trace(root))


@pytest.mark.parametrize(
    "file", ["dev/nvidia0", "dev/nvidia15", "proc/driver/nvidia/gpus/0000:01:00.0", "dev/dxg"]
)
def test_a_gpu_that_cannot_be_used_stops_the_run(file, no_gpu, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, file)
    with pytest.raises(UsageError) as refused:
        cpu_backend.choose()
    assert str(refused.value).startswith(f"this machine has a GPU ({tmp_path}/{file}), and ")
    assert "or --scmoe-cpu (or SCMOE_CPU=1), which takes the CPU" in str(refused.value)


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_a_gpu_that_is_hidden_is_named_so(hidden, no_gpu, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, "dev/nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(UsageError, match=f"CUDA_VISIBLE_DEVICES={hidden!r} hides it"):
        cpu_backend.choose()


@pytest.mark.parametrize("files", [(), ("dev/nvidiactl",), ("dev/nvidia-uvm",), ("dev/null",)])
def test_without_a_gpu_the_cpu_is_taken(files, no_gpu, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, *files)
    assert cpu_backend.choose()


def test_the_flag_takes_the_cpu(no_gpu, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, "dev/nvidia0")
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_scmoe.py", cpu_backend.FLAG])
    assert cpu_backend.choose()


@pytest.mark.parametrize("value", ["no", "false", "2"])
def test_the_variable_is_0_or_1(value, no_gpu, monkeypatch):
    monkeypatch.setenv(cpu_backend.VARIABLE, value)
    with pytest.raises(UsageError, match=f"^SCMOE_CPU={value} in the environment: accepted are 0"):
        cpu_backend.choose()


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("0", False), ("", False)])
def test_the_variable_takes_the_cpu(value, asked, no_gpu, monkeypatch):
    monkeypatch.setenv(cpu_backend.VARIABLE, value)
    monkeypatch.setattr(cpu_backend, "_enabled", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_backend.is_asked_for() == asked
    assert cpu_backend.choose() == asked


@pytest.mark.parametrize("name", ["transformer_engine", "apex"])
def test_packages_for_gpus_are_as_if_not_installed(name, monkeypatch, tmp_path):
    """Transformer Engine, installed on a machine without a driver: loading it raises an OSError."""
    (tmp_path / f"{name}.py").write_text("raise OSError('libcuda.so.1: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    for package in cpu_backend.GPU_PACKAGES:
        monkeypatch.delitem(sys.modules, package, raising=False)  # and back at the end
    with pytest.raises(OSError, match=r"libcuda\.so\.1"):
        importlib.import_module(name)

    cpu_backend.hide_gpu_packages()

    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
    assert importlib.util.find_spec(name) is None
