"""Lines are left out by their exact words; their neighbours stay."""

import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from megatron_scmoe.platform import cpu_backend, log_filters

WARNINGS = [
    *log_filters._WARNINGS_ON_IMPORT,
    *log_filters._WARNINGS_OF_LOADING,
    *log_filters._WARNINGS_OF_A_GPU,
]


@pytest.fixture
def installed(monkeypatch):
    """The filters, on the CPU; taken back afterwards."""
    monkeypatch.setattr(cpu_backend, "is_enabled", lambda: True)
    monkeypatch.setenv("PYTHONWARNINGS", "always:another::given")
    loggers = [logging.getLogger(name) for name, *_ in log_filters._LOGGED]
    before = [list(logger.filters) for logger in loggers]
    megatron = logging.getLogger("megatron")
    disabled, level = logging.root.manager.disable, megatron.level
    logging.disable(logging.NOTSET)  # tools that other tests run in this process are quiet,
    megatron.setLevel(logging.NOTSET)  # and so are benchmarks that other tests import
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_filters.install()
        yield caught
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters = filters
    logging.disable(disabled)
    megatron.setLevel(level)


def warn(message: str, module: str) -> None:
    warnings.warn_explicit(message, UserWarning, f"{module}.py", 1, module=module)


def module_of(pattern: str) -> str:
    return re.sub(r"\\b|\.\*|\$|\\", "", pattern)


@pytest.mark.parametrize(("message", "module"), WARNINGS)
def test_warnings(message, module, installed):
    warn(message, module_of(module))
    assert not installed
    warn(message, "another.module")
    warn(f"But {message}", module_of(module))
    assert len(installed) == 2


def test_a_process_that_the_run_spawns_leaves_out_the_same(installed):
    code = "import sys, warnings\n" + "".join(
        f"warnings.warn_explicit({words!r}, UserWarning, 'x.py', 1, module={module!r})\n"
        for message, module in log_filters._WARNINGS_OF_A_GPU
        for words in (f"{message} and more", f"But {message}")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "Warning: " in line]
    assert len(said) == len(log_filters._WARNINGS_OF_A_GPU)
    assert all("Warning: But " in line for line in said)
    assert "always:another::given" in os.environ["PYTHONWARNINGS"]


@pytest.mark.parametrize(("name", "message"), [entry[:2] for entry in log_filters._LOGGED])
def test_log_records(name, message, installed, caplog):
    logging.getLogger(name).warning(message)
    assert not caplog.records
    logging.getLogger(name).warning("something else")
    logging.getLogger("another").warning(message)
    assert len(caplog.records) == 2


def test_on_a_gpu_what_is_missing_is_told(monkeypatch, installed):
    warnings.resetwarnings()
    warnings.simplefilter("always")
    monkeypatch.setattr(cpu_backend, "is_enabled", lambda: False)
    log_filters.install()
    for message, module in log_filters._WARNINGS_OF_A_GPU:
        warn(message, module_of(module))
    assert len(installed) == len(log_filters._WARNINGS_OF_A_GPU)
