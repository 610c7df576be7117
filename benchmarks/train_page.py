"""Whole training runs on RESULTS.md: tables of what train_run.py wrote, and the commands that did."""

import json
import shlex
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from rerun import folded, launcher
from shapes import SHAPES
from spoken import LINKS, model, place, system_name
from tables import table
from train_result import (
    COMPARED,
    finished,
    is_train_run,
    layout_of,
    loss_notes,
    read_train_run,
    speeds,
)

AGAINST = {"top2": "over stock", "shared": "over stock + shared expert", "serial": "over serial"}
"""The heads of the columns, by what :data:`COMPARED` names."""


BY_RANKS = "train-by-gpus"
"""The picture's name."""


def whole_runs(folder: Path) -> Iterator[str]:
    """The section of all measurements in a folder; nothing if there is none."""
    paths = [
        path for path in sorted(folder.glob("*.json")) if is_train_run(json.loads(path.read_text()))
    ]
    if not paths:
        return
    yield "## Whole training runs\n"
    yield (
        "Milliseconds of an iteration in Megatron's own training loop, as its log gives them: the "
        'median and the quartiles of all iterations behind the warm-up. "Over" compares with the '
        "fastest run of the other system under the same settings, with CUDA graphs or without. "
        "Settings `none` have no flag of speed: ScMoE chooses itself, and is compared with the "
        "others' best.\n"
    )
    results = {path.stem: read_train_run(path) for path in paths}
    yield from _by_ranks(results, folder)
    for name, heading in _headings(results).items():
        yield from _measurement(name, heading, results[name], folder)


def command(result: dict) -> str:
    """The command that measures it again."""
    return folded(_parts(result))


def growing(results: Iterable[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Measurements that differ in the number of GPUs alone, two or more, under the model's name."""

    def kind(result: dict) -> tuple:
        sizes = result["sizes"]
        return (
            result["shape"],
            sizes["blocks"],
            sizes["micro_batch"],
            result["link"],
            result["routing"],
            result["device"],
        )

    def is_whole(result: dict) -> bool:
        systems = {row["system"] for row in finished(result["runs"]).values()}
        is_plain = layout_of(result).is_plain and not result["overrides"]
        return is_plain and {"top2", "scmoe"} <= systems

    for _, group in groupby(sorted(filter(is_whole, results), key=kind), key=kind):
        group = sorted(group, key=lambda result: result["world_size"])
        if len({result["world_size"] for result in group}) > 1:
            yield f"{model(group[0])}, {LINKS[group[0]['link']]}", group


def compared(result: dict) -> dict[str, float]:
    """The fastest run of stock, stock + shared expert and overlapped ScMoE, ms an iteration."""
    rows = finished(result["runs"]).values()
    systems = {"top2": ["top2"], "shared": list(COMPARED["shared"]), "scmoe": ["scmoe"]}
    found = {
        name: [row["iteration_ms"] for row in rows if row["system"] in among]
        for name, among in systems.items()
    }
    return {name: min(times) for name, times in found.items() if times}


def _by_ranks(results: dict[str, dict], folder: Path) -> Iterator[str]:
    rows = []
    for name, group in growing(results.values()):
        for result in group:
            ms = compared(result)
            over = (
                ms[other] / ms["scmoe"] if other in ms else None for other in ("top2", "shared")
            )
            times = (_shown(ms.get(system), ".1f") for system in ("top2", "shared", "scmoe"))
            rows.append(
                [name, str(result["world_size"]), *times, *(_shown(x, ".3f", "x") for x in over)]
            )
    if not rows:
        return
    yield "### With more GPUs\n"
    yield "All GPUs share the experts; each has as many sequences. The fastest run of each system.\n"
    heads = [
        "model, link",
        "GPUs",
        "stock, ms",
        "stock + shared expert, ms",
        "ScMoE, overlapped, ms",
    ]
    yield from table([*heads, AGAINST["top2"], AGAINST["shared"]], rows)
    if (folder / f"{BY_RANKS}.png").exists():
        yield f"![over stock, by the number of GPUs](results/{BY_RANKS}.png)\n"


def _headings(results: dict[str, dict]) -> dict[str, str]:
    """A heading of its own for each: where some would be alike, with what sets them apart."""
    plain = {
        name: f"{model(result)}, {_where(result)}, {result['routing']} routing"
        for name, result in results.items()
    }
    found = {}
    for name, heading in plain.items():
        alike = [results[other] for other in results if plain[other] == heading]
        sizes = results[name]["sizes"]
        if len({result["sizes"]["micro_batch"] for result in alike}) > 1:
            heading += f", micro-batches of {sizes['micro_batch']}"
        if len(alike) > 1 and (flags := _own_flags(results[name])):
            heading += f", {flags}"
        if heading in found.values():
            heading += f", {', '.join(results[name]['runs'])}"
        found[name] = heading
    return found


def _own_flags(result: dict) -> str:
    """Flags that runs got on top of their settings."""
    return ", ".join(f"`{override.split('=', 1)[1]}`" for override in result["overrides"])


def _measurement(name: str, heading: str, result: dict, folder: Path) -> Iterator[str]:
    yield f"### {heading}\n"
    yield f"[`{name}`](results/{name}.json): {_note(result)}\n"
    runs = result["runs"]
    measured = finished(runs).values()
    memory = any(row["peak_memory_mb"] for row in measured)
    rate = any(row["flop_utilisation"] for row in measured)
    traced = any(row["trace"] for row in measured)
    heads = ["system", "settings", "iteration, ms", "quartiles", *(AGAINST[w] for w in COMPARED)]
    heads += ["tokens/s a rank"]
    heads += ["FLOP utilisation"] * rate + ["peak memory, MiB"] * memory
    heads += ["GPU idle", "communication alone"] * traced
    rows = []
    for row in measured:
        found, use = speeds(runs, row), row["trace"] or {}
        cells = [
            system_name(row["system"], result["sizes"]["topk"], None),
            row["settings"].replace("+", ", "),
            f"{row['iteration_ms']:.1f}",
            " to ".join(f"{ms:.1f}" for ms in row["quartiles"] or []),
            *(_shown(found[word], ".3f", "x") for word in COMPARED),
            f"{row['tokens_per_s_per_gpu']:.0f}",
        ]
        cells += [_shown(row["flop_utilisation"], ".3f")] * rate
        cells += [_shown(row["peak_memory_mb"], ".0f")] * memory
        if traced:
            cells += [_shown(use.get(key), ".1%") for key in ("idle_share", "exposed_share")]
        rows.append(cells)
    yield from table(heads, rows)
    for name_of_run, row in runs.items():
        if row["error"]:
            yield f"- `{name_of_run}` failed: {row['error']}"
    if missing := [name for name in result["selected"] if name not in runs]:
        yield f"- Not measured, as time was up: {', '.join(f'`{name}`' for name in missing)}."
    for note in loss_notes(runs):
        yield f"- Settings {note}."
    yield f"\n```bash\n{command(result)}\n```\n"
    if (folder / f"{name}.png").exists():
        yield f"![{model(result)}, {_where(result)}](results/{name}.png)\n"


def _where(result: dict) -> str:
    layout = layout_of(result)
    return place(result) if layout.is_plain else f"{place(result)}, {layout.name}"


def _note(result: dict) -> str:
    sizes = result["sizes"]
    versions = (f"{name} {version}" for name, version in result["versions"].items() if version)
    return (
        f"{result['date']}, {result['rounds']} runs of {result['iterations']} iterations each, the "
        f"first {result['warmup']} to warm up; {result['micro_batches']} micro-batches of "
        f"{sizes['micro_batch']} sequences per data-parallel rank. Versions: {', '.join(versions)}."
    )


def _parts(result: dict) -> Iterator[str]:
    sizes, shape = result["sizes"], SHAPES[result["shape"]]
    yield from launcher(result)
    yield "benchmarks/train_run.py"
    yield f"--shape {result['shape']}"
    for name in ("blocks", "micro_batch"):
        if sizes[name] != getattr(shape, name):
            yield f"--{name.replace('_', '-')} {sizes[name]}"
    layout = layout_of(result)
    for flag, size in (
        ("--tensor-parallel", layout.tensor),
        ("--pipeline-parallel", layout.pipeline),
        ("--model-chunks", layout.chunks),
    ):
        if size > 1:
            yield f"{flag} {size}"
    if layout.expert * layout.pipeline != layout.ranks:
        yield f"--expert-parallel {layout.expert}"
    yield f"--runs {' '.join(result['selected'])}"
    for override in result["overrides"]:
        yield f"--flags {shlex.quote(override)}"
    yield f"--micro-batches {result['micro_batches']}"
    if result["routing"] != "balanced":
        yield f"--routing {result['routing']}"
    if result["data"] == "own":
        yield "--data-path PREFIX"
    for name in ("rounds", "iterations", "warmup"):
        yield f"--{name} {result[name]}"
    if any(row.get("trace") for row in result["runs"].values()):
        yield "--trace FOLDER"


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
