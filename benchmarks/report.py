"""How a result is shown: its JSON, a table to print, a picture."""

import json
from pathlib import Path

from result import baseline, measured_keys
from train_result import COMPARED, finished, is_train_run, layout_of, loss_notes, speeds

from megatron_scmoe.platform.command_line import staged_outputs


def write(result: dict, json_path: Path | None, plot_path: Path | None) -> None:
    """Write the files that were asked for, each whole or not at all."""
    if json_path:
        with staged_outputs("--json", [json_path]) as (staged,):
            staged.write_text(json.dumps(result, indent=1) + "\n")
    if plot_path:
        with staged_outputs("--plot", [plot_path]) as (staged,):
            plot(result, staged)


def table(result: dict) -> str:
    """The table that is printed."""
    systems = result["systems"]
    base = systems[baseline(systems)]
    keys = measured_keys(systems)
    titles = "".join(f"{key.replace('_', ' '):>12}{'over':>8}" for key in keys)
    lines = [
        title(result),
        f"{'system':<16}{titles}{'peak MiB':>10}{'tokens/s':>11}{'TFLOP/s':>9}",
    ]
    for name, row in systems.items():
        cells = "".join(
            f"{row[key]:>12.2f}{base[key] / row[key]:>7.3f}x"
            if key in row
            else f"{'-':>12}{'-':>8}"
            for key in keys
        )
        peak = row["peak_memory_mb"]
        rest = f"{'-' if peak is None else f'{peak:.0f}':>10}{row['tokens_per_s']:>11.0f}"
        rest += f"{row['tflops_per_gpu']:>9.1f}"
        lines.append(f"{name:<16}{cells}{rest}")
    for key, share in result["hidden_share"].items():
        if share is not None:
            lines.append(f"hidden share, {key}: {share:.3f}")
    return "\n".join(lines)


def train_table(result: dict) -> str:
    """The table of whole runs that is printed: times, and how many times as fast as the others."""
    runs = result["runs"]
    words = "".join(f"{f'over {word}':>13}" for word in COMPARED)
    heads = f"{'ms':>9}{'quartiles':>19}{words}{'tokens/s/GPU':>14}{'MFU':>7}{'peak MiB':>10}"
    heads += f"{'final loss':>12}"
    traced = any(row.get("trace") for row in runs.values())
    lines = [title(result), f"{'run':<30}{heads}{'  idle  exposed' if traced else ''}"]
    for name, row in runs.items():
        if "iteration_ms" not in row:
            lines.append(f"{name:<30}  failed: {row['error']}")
            continue
        low, high = row["quartiles"] or [row["iteration_ms"]] * 2
        found = speeds(runs, row)
        cells = f"{row['iteration_ms']:>9.1f}{f'{low:.1f} to {high:.1f}':>19}"
        cells += "".join(f"{_or_dash(found[word], '.3f', 'x'):>13}" for word in COMPARED)
        cells += f"{row['tokens_per_s_per_gpu']:>14.0f}"
        cells += f"{_or_dash(row['flop_utilisation'], '.3f'):>7}"
        cells += f"{_or_dash(row['peak_memory_mb'], '.0f'):>10}"
        cells += f"{_or_dash(row['final_loss'], '.5f'):>12}"
        if traced:
            use = row["trace"] or {}
            cells += f"{_or_dash(use.get('idle_share'), '.1%'):>7}"
            cells += f"{_or_dash(use.get('exposed_share'), '.1%'):>9}"
        lines.append(f"{name:<30}{cells}")
        if row["error"]:
            lines.append(f"{'':<30}  a later round failed: {row['error']}")
    return "\n".join([*lines, *loss_notes(runs)])


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def plot_train_run(result: dict, path: Path) -> None:
    """Each run's median as a bar, with its quartiles."""
    from matplotlib.figure import Figure

    runs = finished(result["runs"])
    medians = [row["iteration_ms"] for row in runs.values()]
    errors = [
        [
            abs(row["iteration_ms"] - (row["quartiles"] or [row["iteration_ms"]] * 2)[side])
            for row in runs.values()
        ]
        for side in (0, 1)
    ]
    figure = Figure(figsize=(max(6, 0.9 * len(runs)), 3.5), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(range(len(runs)), medians, yerr=errors, capsize=3)
    axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_xticks(range(len(runs)), [name.replace("/", "\n") for name in runs], fontsize=7)
    axes.set_ylabel("ms an iteration")
    axes.set_title(title(result))
    figure.savefig(path, dpi=130)


def plot_by_ranks(found: dict[str, list[tuple[int, dict[str, float]]]], path: Path) -> None:
    """How many times as fast as stock ScMoE is: a line for each model, over the number of GPUs.

    Args:
        found: by model, number of GPUs and ms an iteration by system.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in found.items():
        ranks = [count for count, _ in rows]
        axes.plot(ranks, [ms["top2"] / ms["scmoe"] for _, ms in rows], marker="o", label=name)
    every = sorted({count for rows in found.values() for count, _ in rows})
    axes.set_xticks(every, [str(count) for count in every])
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="GPUs", ylabel="times as fast as stock", title="ScMoE, whole training runs")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def plot(result: dict, path: Path) -> None:
    """Each system's times as bars."""
    if is_train_run(result):
        plot_train_run(result, path)
        return
    from matplotlib.figure import Figure

    systems, keys = result["systems"], measured_keys(result["systems"])
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(keys)
    for number, key in enumerate(keys):
        rows = [(place, row[key]) for place, row in enumerate(systems.values()) if key in row]
        places, heights = zip(*rows, strict=True)
        bars = axes.bar(
            [place + (number - (len(keys) - 1) / 2) * width for place in places],
            heights,
            width=0.95 * width,
            label=key.removesuffix("_ms"),
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    names = [name.replace("-", "\n", 1) for name in systems]
    axes.set_xticks(range(len(systems)), names, fontsize=8)
    axes.set_ylabel("ms a micro-batch")
    axes.set_title(title(result))
    axes.legend()
    figure.savefig(path, dpi=130)


def title(result: dict) -> str:
    """The shape, if it is cut also how much of the model it is, the ranks and the link."""
    blocks, of_blocks = (result["sizes"].get(key) for key in ("blocks", "of_blocks"))
    cut = f" ({blocks} of {of_blocks} blocks)" if of_blocks not in (None, blocks) else ""
    layout = layout_of(result)
    split = "" if layout.is_plain else f", {layout.name}"
    return f"{result['shape']}{cut} on {result['world_size']} ranks{split}, {result['link']}"
