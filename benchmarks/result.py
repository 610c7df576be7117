"""A result: what a benchmark found, as its JSON holds it.

    {"shape": ..., "sizes": {...}, ..., "systems": {name: {"step_ms": ..., ...}}, "hidden_share": {...}}

Times are milliseconds a micro-batch.
"""

import json
from pathlib import Path
from typing import Any

from shapes import SCMOE

from megatron_scmoe.platform.command_line import UsageError

TIMES = {"step_ms": "step", "forward_ms": "forward", "train_ms": "iteration"}
"""What may be measured of a system, and what it is called where people read of it."""

SETTINGS_THEN = {
    "chunks": 1,
    "exchange": "collective",
    "copied": None,
    "ep_channels": None,
    "ep_high_priority": False,
    "train_micro_batches": 1,
}
SIZES_THEN = {"of_blocks": None, "router_fusion": False, "cuda_graphs": []}
"""What was measured before there were flags for anything else."""


def measured_keys(systems: dict[str, dict]) -> list[str]:
    """What was measured of any system."""
    return [key for key in TIMES if any(key in row for row in systems.values())]


def hidden_share(systems: dict[str, dict], key: str) -> float | None:
    """(serial - overlapped) / (serial - floor): 1 if all of the communication is hidden.

    None if one of the three is missing, or if there is nothing to hide.
    """
    if not set(SCMOE) <= systems.keys():
        return None
    serial, overlapped, floor = (systems[n][key] for n in ("scmoe-serial", "scmoe", "floor"))
    return (serial - overlapped) / (serial - floor) if serial > floor else None


def baseline(systems: dict[str, dict]) -> str:
    """The system that others are compared with: stock top-2, else the first."""
    return "top2" if "top2" in systems else next(iter(systems))


def speed(systems: dict[str, dict], system: str, other: str, key: str) -> float | None:
    """How many times as fast one system is as another; None if one of the times is missing."""
    rows = [systems.get(name, {}) for name in (system, other)]
    return rows[1][key] / rows[0][key] if all(key in row for row in rows) else None


def read_json(path: Path) -> Any:
    """What a file holds; None if that is no JSON.

    Raises:
        UsageError: if it cannot be read; the message is one line that names the file.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except ValueError:
        return None


def read_result(path: Path) -> dict:
    """The result in a file; settings that it is too old to hold have the values they had then.

    Raises:
        UsageError: if it holds none; the message is one line that names the file.
    """
    result = read_json(path)
    try:
        whole = result["systems"] and result["sizes"] and result["world_size"]
        whole = whole and "benchmark" not in result  # another one's
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(f"{path}: it is no result of step_time.py; accepted: its --json")
    sizes = SIZES_THEN | result["sizes"]
    if isinstance(sizes["cuda_graphs"], bool):  # whether attention was captured
        sizes["cuda_graphs"] = ["attn"] if sizes["cuda_graphs"] else []
    return SETTINGS_THEN | result | {"sizes": sizes}
