"""Errors of libraries in one line, which says what is wrong and recommends nothing unsafe."""

import io
import os
import pickle

import numpy as np
import pytest
import torch

from megatron_scmoe.analysis.profiler_trace import TraceError
from megatron_scmoe.analysis.simulator import OperatorTimesError
from megatron_scmoe.errors import (
    ConversionError,
    InputError,
    ScMoEConfigError,
    ScMoEError,
    SettingsError,
    in_words,
)
from megatron_scmoe.overlap.copy_engine.rings import CopyEngineError
from megatron_scmoe.platform.command_line import UsageError


def caught(function, *args, **kwargs) -> Exception:
    with pytest.raises(Exception) as info:
        function(*args, **kwargs)
    return info.value


def check(module_file, source: str) -> str:
    """The words for what a module of this source raises when it is imported."""
    module_file.write_text(source)
    return in_words(caught(exec, compile(source, str(module_file), "exec"), {"x": 1}))


class TestAssertions:
    def test_a_bare_one_gives_its_expression(self, tmp_path):
        source = "assert x == 1\nassert (\n    x is not None\n    and x > 1\n)\n"
        words = check(tmp_path / "bare.py", source)
        assert words == "it must hold that x is not None and x > 1"

    def test_one_with_a_message_gives_the_message(self, tmp_path):
        source = "assert x > 1, '''too\n  small'''\n"
        assert check(tmp_path / "told.py", source) == "too small"

    def test_without_a_source_the_type_is_left(self, tmp_path):
        source = "raise AssertionError\n"
        assert check(tmp_path / "raised.py", source) == "AssertionError"


class Touch:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


class TestUnpicklers:
    def test_a_foreign_pickle_is_named_by_what_it_asks_for(self, tmp_path):
        stream = io.BytesIO()
        torch.save(Touch(tmp_path / "file"), stream)
        stream.seek(0)
        error = caught(torch.load, stream, weights_only=True)
        assert in_words(error) == f"it asks for {os.system.__module__}.system"

    @pytest.mark.parametrize("content", [b"\x80\x02\xc7" * 9, pickle.dumps([1])])
    def test_no_advice_of_torch(self, content):
        error = caught(torch.load, io.BytesIO(content), weights_only=True)
        assert isinstance(error, pickle.UnpicklingError)
        assert in_words(error) == "its bytes are damaged, or of another format"

    @pytest.mark.parametrize("content", [b"some text", np.array([{}])])
    def test_no_advice_of_numpy(self, content):
        stream = io.BytesIO()
        if isinstance(content, bytes):
            stream.write(content)
        else:
            np.save(stream, content, allow_pickle=True)
        stream.seek(0)
        error = caught(np.load, stream, allow_pickle=False)
        assert in_words(error) == "its bytes are damaged, or of another format"


def test_lines_are_joined_and_may_be_limited():
    error = ValueError("one\n   two\nthree")
    assert in_words(error) == "one two three"
    assert in_words(error, lines=2) == "one two"


class TestOwnErrors:
    def test_all_have_one_base(self):
        kinds = [ConversionError, CopyEngineError, OperatorTimesError, InputError]
        kinds += [ScMoEConfigError, SettingsError, TraceError, UsageError]
        assert all(issubclass(kind, ScMoEError) for kind in kinds)

    def test_a_refusal_is_read_in_parts_and_travels_between_processes(self):
        error = pickle.loads(pickle.dumps(InputError("--load x", "it is empty", "another")))
        assert str(error) == "--load x: it is empty; accepted: another"
        assert error.without_advice == "--load x: it is empty"
        assert SettingsError("hidden").without_advice == "hidden"
