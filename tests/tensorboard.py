"""What a run has written for TensorBoard."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def losses(folder: Path) -> dict[int, set[float]]:
    """By iteration; more than one where a start has repeated it with another loss."""
    found: dict[int, set[float]] = {}
    for file in sorted(folder.iterdir()):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        if "lm loss" in events.Tags()["scalars"]:
            for event in events.Scalars("lm loss"):
                found.setdefault(event.step, set()).add(event.value)
    return found
