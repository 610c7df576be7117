"""A result: what a benchmark found, as its JSON holds it.

    {"shape": ..., "sizes": {...}, ..., "systems": {name: {"step_ms": ..., ...}}, "hidden_share": {...}}

Times are milliseconds a micro-batch.
"""

import json
from pathlib import Path

from shapes import SCMOE

from megatron_scmoe.command_line import UsageError

TIMES = ("step_ms", "forward_ms", "train_ms")
"""What may be measured of a system: a step, a forward, a whole training iteration."""


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


def read_result(path: Path) -> dict:
    """The result in a file.

    Raises:
        UsageError: if it holds none; the message is one line that names the file.
    """
    try:
        result = json.loads(path.read_text())
        whole = result["systems"] and result["sizes"] and result["world_size"]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UsageError(f"{path}: it is no result of step_time.py; accepted: its --json")
    return result
