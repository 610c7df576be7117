"""Imports between the rooms of the package go one way: down."""

import ast
import re
from pathlib import Path

import pytest

import megatron_scmoe

PACKAGE = Path(megatron_scmoe.__file__).parent

FLOORS = (
    ("config", "errors"),
    ("arguments",),
    ("platform",),
    ("overlap",),
    ("validation",),
    ("model",),
    ("analysis",),
    ("checkpoints",),
    ("training",),
    ("evaluation", "inference"),
    ("serving",),
    ("cli", "spec", "run"),
)
"""From the ground up: a room imports from itself and from the floors below."""

STREAMS = {"Stream", "current_stream", "all_to_all_single", "record_stream", "wait_stream"}
"""What only the module of streams and collectives, and the copy engines, may call."""

FILES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def imports_of(file: Path) -> set[str]:
    """Rooms of this package that a file imports, at its head or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in named if name.startswith("megatron_scmoe.")}
    return found - {"__version__"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_down(file):
    room = room_of(file)
    if room == "__init__":
        assert imports_of(file) == set()
        return
    wrong = {r for r in imports_of(file) - {room} if floor_of(r) >= floor_of(room)}
    assert wrong == set()


def test_every_room_has_a_floor():
    rooms = {room_of(file) for file in FILES} - {"__init__"}
    assert rooms == {room for rooms in FLOORS for room in rooms}


def test_one_module_has_the_streams_and_collectives():
    """Two more by nature: the copy engines' own streams, and the CPU's stand-ins."""
    found = {
        file.as_posix()
        for file in FILES
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.Attribute) and node.attr in STREAMS
    }
    assert {name for name in found if not name.startswith("overlap/copy_engine")} == {
        "overlap/async_all_to_all.py",
        "platform/cpu_backend.py",
    }


def test_imports_within_checkpoints_go_down_too():
    """Formats know tensors and tables; converting, upcycling and describing know formats."""
    above = {"convert", "upcycle", "inspect", "model_card"}
    for file in FILES:
        if room_of(file) == "checkpoints" and file.stem not in above:
            is_format = file.parent.name == "formats"
            text = (PACKAGE / file).read_text()
            hidden = above if is_format else {*above, "formats"}
            assert not re.findall(rf"megatron_scmoe\.checkpoints\.({'|'.join(hidden)})\b", text), (
                file
            )
