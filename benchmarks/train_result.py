"""What a measurement of whole runs holds, and how it is made from the logs of the runs.

    {"benchmark": "train_run", "shape": ..., "runs": {"scmoe/best": {"iteration_ms": ..., ...}}, ...}

Times are milliseconds an iteration.
"""

import re
import statistics
from pathlib import Path

from result import read_json
from train_settings import GRAPHS, Layout, Variant

from megatron_scmoe.platform.command_line import UsageError

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200 NVL": 835.0,
    "H200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
}
"""Dense bf16 of one GPU, from NVIDIA's data sheets, by a part of the device's name: the first found."""

COMPARED = {"top2": ("top2",), "shared": ("shared", "shared-overlap"), "serial": ("scmoe-serial",)}
"""What runs are compared with: the fastest of these systems, with graphs or without."""

_LINE = re.compile(r"iteration +(\d+)/ *\d+ \|(.*)")
_FIELDS = {
    "ms": r"elapsed time per iteration \(ms\): ([\d.]+)",
    "tflops": r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+)",
    "loss": r"lm loss: ([-+\d.E]+)",
}


def parse_log(text: str) -> dict[int, dict[str, float]]:
    """``ms``, ``tflops`` and ``loss`` by iteration, as far as Megatron's log has them."""
    found = {}
    for number, line in _LINE.findall(text):
        values = {name: re.search(pattern, line) for name, pattern in _FIELDS.items()}
        found[int(number)] = {name: float(match[1]) for name, match in values.items() if match}
    return found


def error_line(text: str) -> str | None:
    """The line of an output that says why it ended: a refusal, else the last exception's; or None."""
    lines = text.splitlines()
    refusals = [line.split(" error: ", 1)[1] for line in lines if re.match(r"\S+: error: ", line)]
    raised = r"(?:\[rank\d+\]:\s*|rank \d+: )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)"
    exceptions = [match[1] for line in lines if (match := re.match(raised, line))]
    if refusals:
        return refusals[0]
    return exceptions[-1] if exceptions else None


class Measurement:
    """What was found of one variant, round by round."""

    def __init__(self, warmup: int, iterations: int):
        self._counted = range(warmup + 1, iterations + 1)
        self.rounds: list[list[float]] = []
        self.tflops: list[float] = []
        self.losses: list[dict[str, str]] = []
        self.peaks: list[float] = []
        self.error: str | None = None
        self.trace: dict | None = None

    def add(self, ranks: list[dict]) -> None:
        """Take in a round: what each rank found (see train_processes.py)."""
        errors = [found["error"] for found in ranks if "error" in found]
        if errors:  # the reason rather than its consequence on the other ranks
            self.error = next((line for line in errors if not _is_consequence(line)), errors[0])
            return
        logged = {int(n): row for found in ranks for n, row in found["iterations"].items()}
        rows = [logged[n] for n in self._counted if "ms" in logged.get(n, {})]
        if not rows:
            self.error = f"the log has no iteration behind the first {self._counted.start - 1}"
            return
        self.rounds.append([row["ms"] for row in rows])
        self.tflops += [row["tflops"] for row in rows if row.get("tflops")]
        exact = next((found["losses"] for found in reversed(ranks) if found["losses"]), {})
        self.losses.append({n: x for n, x in exact.items() if int(n) < self._counted.stop})
        self.peaks += [f["peak_memory_mb"] for f in ranks if f["peak_memory_mb"] is not None]

    def row(self, variant: Variant, tokens: int, device: str) -> dict:
        """As the JSON holds it.

        Args:
            tokens: of one GPU in an iteration.
            device: its name.
        """
        about = {"system": variant.system, "settings": variant.settings}
        if not self.rounds:
            return about | {"error": self.error}
        times = [ms for took in self.rounds for ms in took]
        median = statistics.median(times)
        peak = next((value for word, value in PEAK_TFLOPS.items() if word in device), None)
        tflops = statistics.median(self.tflops) if self.tflops and device != "cpu" else None
        last = self.losses[-1]
        return about | {
            "iteration_ms": median,
            "quartiles": statistics.quantiles(times, n=4, method="inclusive")[::2]
            if len(times) > 1
            else None,
            "rounds_ms": [statistics.median(took) for took in self.rounds],
            "tokens_per_s_per_gpu": tokens / median * 1e3,
            "tflops_per_gpu": tflops,
            "flop_utilisation": tflops / peak if tflops and peak else None,
            "peak_memory_mb": max(self.peaks, default=None),
            "final_loss": float.fromhex(last[max(last, key=int)]) if last else None,
            "losses": last,
            "losses_repeat": all(losses == last for losses in self.losses),
            "trace": self.trace,
            "error": self.error,
        }


def _is_consequence(line: str) -> bool:
    return line.startswith("another rank") or "DistBackendError" in line or "gloo" in line


def finished(runs: dict[str, dict]) -> dict[str, dict]:
    """The runs that were measured."""
    return {name: row for name, row in runs.items() if "iteration_ms" in row}


def group(row: dict) -> str:
    """The settings without graphs: runs of one group are compared."""
    return row["settings"].removesuffix(GRAPHS)


def fastest(runs: dict[str, dict], systems: tuple[str, ...], of_group: str) -> dict | None:
    """The fastest run of these systems in a group; None if there is none."""
    rows = [
        row
        for row in finished(runs).values()
        if row["system"] in systems and group(row) == of_group
    ]
    return min(rows, key=lambda row: row["iteration_ms"], default=None)


def speeds(runs: dict[str, dict], row: dict) -> dict[str, float | None]:
    """How many times as fast a run is as the fastest top2, shared and serial of its group.

    Without flags of speed (``none``) it is compared with their ``best``, where they have no such run.
    """
    found = {}
    for word, systems in COMPARED.items():
        other = fastest(runs, systems, group(row))
        if other is None and group(row) == "none":
            other = fastest(runs, systems, "best")
        found[word] = other["iteration_ms"] / row["iteration_ms"] if other else None
    return found


def loss_notes(runs: dict[str, dict]) -> list[str]:
    """Whether scmoe and scmoe-serial agree in every loss, bit for bit; a sentence for each settings."""
    notes = []
    measured = finished(runs)
    for row in measured.values():
        serial = measured.get(f"scmoe-serial/{row['settings']}")
        if row["system"] != "scmoe" or serial is None:
            continue
        about = f"{row['settings']}: the losses of scmoe and scmoe-serial"
        apart = [n for n in row["losses"] if row["losses"][n] != serial["losses"].get(n)]
        if not apart:
            notes.append(f"{about} agree bit for bit")
        elif not (row["losses_repeat"] and serial["losses_repeat"]):
            notes.append(f"{about} DIFFER, and so do rounds of one system: its kernels vary")
        else:
            first = min(apart, key=int)
            most = max(_apart(row["losses"][n], serial["losses"].get(n)) for n in apart)
            alone = len(row["rounds_ms"]) == 1
            whose = (
                "; one round does not tell whether a system's own losses repeat" if alone else ""
            )
            notes.append(
                f"{about} DIFFER from iteration {first} on, by {most:.0e} of it at most{whose}"
            )
    return notes


def _apart(loss: str, other: str | None) -> float:
    """Their difference, in shares of the second; infinite if it is missing."""
    if other is None:
        return float("inf")
    return abs(float.fromhex(loss) / float.fromhex(other) - 1)


def is_train_run(result: dict) -> bool:
    """Whether a JSON is one of train_run.py."""
    return isinstance(result, dict) and result.get("benchmark") == "train_run"


def layout_of(result: dict) -> Layout:
    """Where the model lay; measurements older than this record had all ranks share the experts."""
    ranks = result["world_size"]
    return Layout(**result.get("layout") or {"ranks": ranks, "expert": ranks})


def read_train_run(path: Path) -> dict:
    """The measurement in a file. Raises UsageError, one line, if it holds none."""
    result = read_json(path)
    if not (is_train_run(result) and result.get("runs")):
        raise UsageError(f"{path}: it is no result of train_run.py; accepted: its --json")
    return result
