"""What a trial of schedules found: the block that is logged, and the file of ``--scmoe-tune FILE``."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.analysis.slot_tuner import sizes_of
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import NOT_JSON, InputError, ScMoEConfigError, reason_of
from megatron_scmoe.platform.atomic_write import atomic_write
from megatron_scmoe.platform.megatron_flags import TUNE_FLAG

MARGIN = 0.01
"""By how much another schedule has to be faster than the run's own to take its place: the noise of a
median. Bits are equal, so a wrong choice within it costs nothing else."""


@dataclass(frozen=True)
class Record:
    """Milliseconds an iteration by schedule, and the schedule that is kept.

    Args:
        measured_on: what the times depend on, by name.
        ms: by the schedule's name; the first is the run's own.
        chosen: a name among these.
    """

    measured_on: Mapping[str, Any]
    ms: Mapping[str, float]
    chosen: str

    def write(self, path: str | Path) -> None:
        """Write as JSON; the file appears when it is whole."""
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as (file,):
            file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Record":
        """Read what :meth:`write` wrote.

        Raises:
            InputError: if the file holds anything else.
        """
        try:
            found = json.loads(Path(path).read_text())
        except (OSError, *NOT_JSON) as error:
            raise InputError(f"{TUNE_FLAG} {path}", reason_of(error), _ACCEPTED) from error
        ours = isinstance(found, dict) and set(found) == {"measured_on", "ms", "chosen"}
        if not (
            ours
            and isinstance(found["measured_on"], dict)
            and isinstance(found["ms"], dict)
            and isinstance(found["chosen"], str)
            and found["chosen"] in found["ms"]
        ):
            raise InputError(f"{TUNE_FLAG} {path}", "it holds no trial of schedules", _ACCEPTED)
        return cls(**found)

    def check(self, path: str | Path, measured_on: Mapping[str, Any]) -> None:
        """Refuse a record of something else.

        Raises:
            ScMoEConfigError: naming the file and the first entry that differs.
        """
        for name, value in measured_on.items():
            before = self.measured_on.get(name)
            if before != value:
                raise ScMoEConfigError(
                    f"{TUNE_FLAG} {path}",
                    f"its schedules were tried with {name} {_words(before)}, "
                    f"and this is {_words(value)}",
                    _ACCEPTED,
                )

    def describe(self, where: str) -> str:
        """The block that is logged.

        Args:
            where: the times are from: "tried on iterations 4 to 19" or "from tune.json".
        """
        lines = [f"> schedules {where} ({TUNE_FLAG}), ms an iteration:"]
        for name, ms in self.ms.items():
            mark = "  <- kept" if name == self.chosen else ""
            lines.append(f"  {name:<24}{ms:>10.2f}{mark}")
        if not is_overlapped(self.chosen):
            lines.append("  Overlap does not pay in this run: its all-to-alls are waited for")
        return "\n".join(lines)


def choose(names: Sequence[str], times: Sequence[float]) -> str:
    """The fastest schedule; the first, the run's own, unless another is faster by the margin."""
    fastest = min(range(len(times)), key=times.__getitem__)
    return names[fastest] if times[fastest] < times[0] * (1 - MARGIN) else names[0]


def name_of(slot: int | str, overlap: bool) -> str:
    """How a schedule is called in the log and in the file: "overlapped, slot 1", "serial"."""
    return f"overlapped, slot {slot}" if overlap else _SERIAL


def is_overlapped(name: str) -> bool:
    """Whether a schedule of this name overlaps."""
    return name != _SERIAL


def conditions(
    args: argparse.Namespace,
    scmoe: ScMoEConfig,
    config: TransformerConfig,
    tokens: int,
    schedules: Sequence[str],
) -> dict[str, Any]:
    """What the times of a trial depend on.

    Args:
        args: of the run, validated.
        tokens: of a sequence on this context-parallel rank.
        schedules: names of those tried.
    """
    captured = config.cuda_graph_modules if config.cuda_graph_impl != "none" else ()
    return {
        **sizes_of(config, args.micro_batch_size, tokens),
        "num_layers": config.num_layers,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "global_batch_size": args.global_batch_size,
        "ranks": args.world_size,
        "device": torch.cuda.get_device_name(),
        "tap": scmoe.tap,
        "chunks": scmoe.chunks,
        "exchange": scmoe.exchange,
        "cuda_graph_modules": sorted(module.name for module in captured),
        "schedules": list(schedules),
    }


_SERIAL = "serial"
_ACCEPTED = "another file, which will be written if it does not exist"


def _words(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)
