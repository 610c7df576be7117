"""RESULTS.md from the JSON files in results/: names, tables, commands, pictures.

    python benchmarks/results_page.py            # writes benchmarks/RESULTS.md
    python benchmarks/results_page.py --pictures # draws all pictures first
    python benchmarks/results_page.py --check    # exit status 1 if it is not what the files give

What stands before the tables is results/intro.md. What a file does not hold (remarks, settings older
than their record) is in results/notes.toml.
"""

import json
import tomllib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from inference_page import inference_section, is_inference
from offloading_page import is_offloading, offloading_section
from report import plot, plot_by_ranks
from rerun import command as rerun_command
from result import TIMES, baseline, measured_keys, read_result, speed
from shapes import SHAPES
from spoken import LINKS, graph_note, model, place, run_note, sizes_note, system_name, variant
from tables import table
from train_page import BY_RANKS, compared, growing, whole_runs
from train_result import is_train_run

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, run_tool

HERE = Path(__file__).parent
PAGE = HERE / "RESULTS.md"
RESULTS = HERE / "results"

OPERATOR_TIMES = "operator-times"
"""How the names of files end that hold operator times alone."""


MARKED = {
    "{inference}\n": (is_inference, inference_section),
    "{offloading}\n": (is_offloading, offloading_section),
}
"""Where intro.md has sections of other benchmarks: what their results are, and what is written."""


def main() -> None:
    """Write the page, or compare it."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")
    parser.add_argument("--pictures", action="store_true", help="draw all pictures from the files")
    options = parser.parse_args()
    if options.check and options.pictures:
        raise UsageError("--check with --pictures: it writes nothing; accepted: one or the other")
    if options.pictures:
        draw_all(RESULTS)
    text = page(RESULTS)
    if not options.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        raise _OldPageError(f"{PAGE}: not what {RESULTS} gives; run benchmarks/results_page.py")


class _OldPageError(ScMoEError):
    status = 1


def draw_all(folder: Path) -> None:
    """The picture of each measurement of whole runs, of whole runs by GPUs, and those others have."""
    whole = {}
    for path in sorted(folder.glob("*.json")):
        result, picture = json.loads(path.read_text()), path.with_suffix(".png")
        if is_train_run(result):
            whole[path.stem] = result
        if is_train_run(result) or picture.exists():
            plot(result if is_train_run(result) else read_result(path), picture)
    lines = {
        name: [(result["world_size"], compared(result)) for result in group]
        for name, group in growing(whole.values())
    }
    plot_by_ranks(lines, folder / f"{BY_RANKS}.png")


def page(folder: Path) -> str:
    """The text of the page for all results in a folder."""
    results = read_all(folder)
    groups = [list(group) for _, group in groupby(results, title)]
    intro = (folder / "intro.md").read_text()
    named = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    sections = (line for group in groups for line in _section(group, folder))
    intro = intro.replace("{whole runs}\n", _lines(whole_runs(folder)))
    for mark, (is_of, section) in MARKED.items():
        found = {name: result for name, result in named.items() if is_of(result)}
        intro = intro.replace(mark, _lines(section(found)))
    return intro.replace("{summary}\n", _lines(_summary(results))) + _lines(
        (*sections, *_operator_times(results, folder))
    )


def read_all(folder: Path) -> list[dict]:
    """The results of step_time.py in a folder, with ``name`` and ``notes``, in the page's order.

    Of a model and link the fastest ScMoE comes first.
    """
    notes = tomllib.loads((folder / "notes.toml").read_text())
    results = []
    for path in sorted(folder.glob("*.json")):
        if path.stem.endswith(OPERATOR_TIMES) or "benchmark" in json.loads(path.read_text()):
            continue  # another benchmark's
        about = notes.get(path.stem, {})
        own = {"name": path.stem, "notes": about.get("notes", []), "floor": about.get("floor")}
        results.append(about.get("settings", {}) | read_result(path) | own)
    return sorted(results, key=_order)


def title(result: dict) -> str:
    """Model, GPUs and link, as one would say them."""
    return f"{model(result)}, {place(result)}"


def _order(result: dict) -> tuple:
    """GPUs before none; by link, slow before fast; by model, the paper's first; of one, the fastest."""
    systems = result["systems"]
    return (
        result["device"] == "cpu",
        result["world_size"] == 1,
        list(LINKS).index(result["link"]) if result["link"] in LINKS else len(LINKS),
        list(SHAPES).index(result["shape"]),
        -result["world_size"],
        -result["sizes"]["blocks"],
        "top2" not in systems,
        -speed(systems, "scmoe", baseline(systems), measured_keys(systems)[0]),
    )


def _summary(results: list[dict]) -> Iterator[str]:
    """One row for each result that has the baseline."""
    yield "How many times as fast as stock the overlapped ScMoE is, and what it hides:\n"
    names = TIMES.values()
    yield from table(
        ["model", "GPUs, link", "settings", *names, *(f"hidden, {name}" for name in names)],
        (
            [
                f"[{model(result)}](#{_anchor(title(result))})",
                place(result),
                variant(result),
                *(_times(speed(result["systems"], "scmoe", "top2", key)) for key in TIMES),
                *("" if result["floor"] else _share(result, key) for key in TIMES),
            ]
            for result in results
            if "top2" in result["systems"]
        ),
    )


def _section(group: list[dict], folder: Path) -> Iterator[str]:
    """A model on some GPUs with some link: each of its results."""
    yield f"## {title(group[0])}\n"
    yield f"{sizes_note(group[0])}\n"
    for result in group:
        yield f"### {variant(result)}\n"
        yield from _result(result, folder)


def _result(result: dict, folder: Path) -> Iterator[str]:
    name = result["name"]
    yield f"{_link(name)}: {run_note(result)}"
    if graph_note(result):
        yield graph_note(result)
    yield ""
    yield from _times_table(result)
    yield from _ratios(result)
    for note in result["notes"]:
        yield f"- {note}"
    if result["notes"]:
        yield ""
    if result.get("slots"):
        yield "A pair of blocks alone, forward and backward, by expert slot:\n"
        yield from table(
            ["slot", "predicted, ms", "measured, ms"],
            (
                [str(slot), f"{row['predicted_ms']:.1f}", f"{row['measured_ms']:.1f}"]
                for slot, row in enumerate(result["slots"])
            ),
        )
    yield f"```bash\n{rerun_command(result)}\n```\n"
    if (folder / f"{name}.png").exists():
        yield f"![{title(result)}: {variant(result)}](results/{name}.png)\n"


def _times_table(result: dict) -> Iterator[str]:
    """Times of each system, and how many times as fast as the baseline it is."""
    systems = result["systems"]
    base, keys = baseline(systems), measured_keys(systems)
    memory = _knows_memory(result)
    over = "over stock" if base == "top2" else f"over {_name(result, base)}"
    heads = [head for key in keys for head in (f"{TIMES[key]}, ms", over)]
    rows = []
    for system, row in systems.items():
        cells = [_name(result, system)]
        for key in keys:
            cells.append(f"{row[key]:.1f}" if key in row else "")
            cells.append(_times(speed(systems, system, base, key)))
        if memory:
            cells.append(f"{row['peak_memory_mb']:.0f}")
        rows.append(cells)
    yield from table(["system", *heads, *(["peak memory, MiB"] if memory else [])], rows)


def _ratios(result: dict) -> Iterator[str]:
    """What is hidden, and the overlapped ScMoE against the nearer competitors."""
    systems, keys = result["systems"], measured_keys(result["systems"])
    rows = []
    if "floor" in systems:
        against = f", against {result['floor']}" if result["floor"] else ""
        slower = [speed(systems, "floor", "scmoe", key) for key in keys]
        rows.append([f"hidden{against}", *(_share(result, key) for key in keys)])
        rows.append(
            [f"time over communication left out{against}", *(f"{ratio:.3f}" for ratio in slower)]
        )
    for other in ("shared", "shared-overlap", "scmoe-serial"):
        if other in systems and other != baseline(systems):
            speeds = [_times(speed(systems, "scmoe", other, key)) for key in keys]
            rows.append([f"over {_name(result, other)}", *speeds])
    if rows:
        yield from table(["ScMoE, overlapped", *(TIMES[key] for key in keys)], rows)
    if _knows_memory(result) and "shared" in systems:
        ratio = systems["scmoe"]["peak_memory_mb"] / systems["shared"]["peak_memory_mb"]
        yield f"Its peak memory is {ratio:.3f} times that of {_name(result, 'shared')}.\n"


def _operator_times(results: list[dict], folder: Path) -> Iterator[str]:
    """Operators of one pair, alone: those of results, and of files that hold nothing else."""
    found = {result["name"]: result["operators"] for result in results if result.get("operators")}
    alone = [path.stem for path in sorted(folder.glob(f"*{OPERATOR_TIMES}.json"))]
    found |= {name: json.loads((folder / f"{name}.json").read_text()) for name in alone}
    yield "## Operator times\n"
    yield "Milliseconds of each operator of one pair of blocks, alone, for one micro-batch.\n"
    names = list(next(iter(found.values()))["forward"])
    yield from table(
        ["file", "direction", *names],
        (
            [_link(name), direction, *(f"{times[direction][operator]:.2f}" for operator in names)]
            for name, times in found.items()
            for direction in ("forward", "backward")
        ),
    )
    for name in alone:
        command, hardware, date = found[name]["source"].removeprefix("printed by ").rsplit(", ", 2)
        yield f"- {_link(name)}: {hardware}, {date}, `{command}`"


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _link(name: str) -> str:
    return f"[`{name}`](results/{name}.json)"


def _knows_memory(result: dict) -> bool:
    """CUDA graphs hold theirs from the start; a CPU tells none."""
    return result["device"] != "cpu" and not result["sizes"]["cuda_graphs"]


def _name(result: dict, system: str) -> str:
    return system_name(system, result["sizes"]["topk"], result["floor"])


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}x"


def _share(result: dict, key: str) -> str:
    share = result["hidden_share"].get(key.removesuffix("_ms"))
    return "" if share is None else f"{share:.3f}"


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = "".join(letter for letter in heading.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


if __name__ == "__main__":
    run_tool(main)
