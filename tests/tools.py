"""The command lines in tools/, called in this process."""

import importlib
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TOOLS = REPOSITORY / "tools"


def tool(name: str):
    """The tool of this name, as a module; scripts in tools/ import each other by name."""
    if str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    return importlib.import_module(name)


def run_tool(name: str, *argv) -> None:
    """Call its ``main`` with the words of a command line."""
    tool(name).main([str(word) for word in argv])
