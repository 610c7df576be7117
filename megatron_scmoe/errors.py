"""What the errors of other libraries say, in one line for the user."""

import ast
import linecache
import re
import traceback

BARE_ASSERTION = "it must hold that"


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
    return words or _asserted(error) or type(error).__name__


def _asserted(error: BaseException) -> str | None:
    """The expression of the ``assert`` that raised the error; None if no such statement did."""
    if not isinstance(error, AssertionError) or error.__traceback__ is None:
        return None
    frame = traceback.extract_tb(error.__traceback__)[-1]
    for node in ast.walk(ast.parse("".join(linecache.getlines(frame.filename)))):
        if isinstance(node, ast.Assert) and node.lineno <= frame.lineno <= node.end_lineno:
            return f"{BARE_ASSERTION} {ast.unparse(node.test)}"
    return None
