"""The commands, and the demo's scripts in tools/, called in this process."""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TOOLS = REPOSITORY / "tools"


def tool(name: str):
    """The module of a command, or of a script in tools/; those import each other by name."""
    if importlib.util.find_spec(command := f"megatron_scmoe.cli.{name}"):
        return importlib.import_module(command)
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    return importlib.import_module(name)


def run_tool(name: str, *argv) -> None:
    """Call its ``main`` with the words of a command line."""
    tool(name).main([str(word) for word in argv])


@contextlib.contextmanager
def pipe(content: bytes) -> Iterator[Path]:
    """A pipe with something short in it, by the name that ``<(command)`` has."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    try:
        yield Path(f"/dev/fd/{reader}")
    finally:
        os.close(reader)
