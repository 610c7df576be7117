"""What is said to the user in one line: the package's own errors, and those of other libraries."""

import argparse
import ast
import difflib
import linecache
import re
import traceback
from typing import Any

BARE_ASSERTION = "it must hold that"


class ScMoEError(Exception):
    """What was asked for cannot be done; base of every error that this package raises on purpose.

    The message is one line: the flag or file, what was given, what is accepted. A command line shows
    that line alone and ends with ``status``. Any other exception is a bug and keeps its traceback.
    """

    status = 2
    """Exit status of a command line: 2 for a wrong request, 1 for one that failed."""

    @property
    def without_advice(self) -> str:
        """The message up to what is accepted."""
        return str(self)


class Refusal(ScMoEError, ValueError):
    """A request that cannot be met: what was given, why not, what can be.

    Args:
        given: the flag or file, with its value, as given.
        reason: why it cannot serve.
        accepted: the nearest that can.
    """

    def __init__(self, given: str, reason: str, accepted: str):
        super().__init__(given, reason, accepted)
        self.given, self.reason, self.accepted = given, reason, accepted

    @property
    def without_advice(self) -> str:
        return f"{self.given}: {self.reason}"

    def __str__(self) -> str:
        return f"{self.without_advice}; accepted: {self.accepted}"


class SettingsError(ScMoEError, ValueError):
    """Settings that Megatron itself refuses, in the words of its assertion."""


class ScMoEConfigError(Refusal):
    """A setting that ScMoE cannot work with."""


class RunError(Refusal):
    """Settings of a run that would stop it."""


class InputError(Refusal):
    """A file or folder that cannot serve; the message names the flag and the path."""


class ConversionError(ScMoEError, ValueError):
    """What stops a conversion, in one line that names the file, tensor or flag."""


def in_words(error: BaseException, lines: int | None = None) -> str:
    """An error in one line.

    A bare assertion has no message: what it asserts is read from its source. Messages of unpicklers
    that recommend to load the file unsafely are replaced by what the file asks for.

    Args:
        lines: how many lines of the message count; None for all.
    """
    message = str(error).strip()
    if found := re.search(r"GLOBAL ([\w.]+)", message):
        return f"it asks for {found[1]}"
    if re.search("weights_only|allow_pickle", message):
        return "its bytes are damaged, or of another format"
    words = " ".join(" ".join(message.splitlines()[:lines]).split())
    if not words and (failed := failed_assertion(error)):
        return f"{BARE_ASSERTION} {ast.unparse(failed[0])}"
    return words or type(error).__name__


def with_nearest_flags(parser: argparse.ArgumentParser, message: str) -> str:
    """What argparse says of flags that it does not know, and which flags are spelt almost like them."""
    unknown = message.removeprefix("unrecognized arguments: ")
    if unknown == message:
        return message
    flags = [word.partition("=")[0] for word in unknown.split() if word.startswith("--")]
    found = (difflib.get_close_matches(f, parser._option_string_actions, 1, 0.8) for f in flags)
    nearest = ", ".join(name for names in found for name in names)
    return f"{message}; the nearest: {nearest}" if nearest else message


NOT_JSON = (ValueError, RecursionError)
"""What the module json raises for a text it cannot parse: no JSON, no UTF-8, or nested too deeply."""


def reason_of(error: Exception) -> str:
    """Why a file could not be read or parsed, without its name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def failed_assertion(error: BaseException) -> tuple[ast.expr, dict[str, Any]] | None:
    """What the ``assert`` statement that raised the error tests, and the local variables there.

    None if it has a message of its own, or no such statement raised it.
    """
    if not isinstance(error, AssertionError) or str(error) or error.__traceback__ is None:
        return None
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    for node in ast.walk(ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))):
        if isinstance(node, ast.Assert) and node.lineno <= line <= (node.end_lineno or 0):
            return node.test, frame.f_locals
    return None


def lacks_memory(error: RuntimeError) -> bool:
    """Whether PyTorch raised it because memory has run out, a GPU's or the host's."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
