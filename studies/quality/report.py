"""The stored results as a page and a picture.

    python -m studies.quality.report

reads results/*.json and results/parity/*.json beside this file and writes RESULTS.md, results.png,
hours.png, conversion.png and parity.png there.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from megatron_scmoe.platform.atomic_write import atomic_write
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, run_tool
from studies.quality import report_conversion, report_hours, report_parity, report_seeds
from studies.quality.arms import ARMS, SIZES
from studies.quality.stored import loss, paired_differences

HERE = Path(__file__).parent
BASELINE = "top2"

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, two-sided 95 %, for 1 to 10 degrees of freedom."""


def main(argv: list[str] | None = None) -> None:
    """Write page and picture."""
    parser = OneLineParser(description="Write the page and the picture of the study of quality.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of results")
    parser.add_argument("--page", type=Path, default=HERE / "RESULTS.md", help="written")
    parser.add_argument("--picture", type=Path, default=HERE / "results.png", help="written")
    args = parser.parse_args(argv)
    results, parity = read(args.results), read(args.results / "parity")
    if not results and not parity:
        raise UsageError(f"--results {args.results}: it has no results")
    hours, conversion, of_parity = (
        args.picture.with_stem(name) for name in ("hours", "conversion", "parity")
    )
    parts = [
        page(from_nothing(results), args.picture.name),
        report_hours.section(_compared(results), hours.name),
        report_seeds.section(_usual(results)),
        report_conversion.section(results, conversion.name),
        report_parity.section(parity, of_parity.name),
    ]
    with atomic_write(args.page) as (file,):
        file.write_text("\n\n".join(part.rstrip("\n") for part in parts if part) + "\n")
    _draw_all(results, parity, args.picture, hours, conversion, of_parity)
    print(f"wrote {args.page} and its pictures")


def read(folder: Path) -> list[dict]:
    """The results in a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def from_nothing(results: list[dict]) -> list[dict]:
    """Those that start from no other run's weights."""
    return [result for result in results if not result.get("after")]


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half the width of its 95 % confidence interval; None for one value."""
    if len(values) < 2:
        return mean(values), None
    degrees = len(values) - 1
    t = T_975[degrees - 1] if degrees <= len(T_975) else 1.96 + 2.4 / degrees
    return mean(values), t * stdev(values) / math.sqrt(len(values))


def page(results: list[dict], picture: str) -> str:
    """The page in Markdown."""
    parts = [
        "# Quality: what was run",
        "Written by `studies/quality/report.py` from `studies/quality/results/`. Losses are in nats "
        "a token on text that no model has seen, the mean of the sources. *Difference* is to "
        f"`{BASELINE}` with the same seed, so the same data order; behind it half the 95 % confidence "
        "interval over seeds. Negative is better.",
    ]
    if results:
        parts.append(f"![Loss by arm, and its way there]({picture})")
    for (size, tokens), group in sorted(_by_size(results).items(), key=_in_order):
        title = f"## {size}, {tokens / 1e6:g} million tokens"
        parts += [title, _table(_at_the_usual_rate(group, size)), _by_source(group, size)]
        parts += [_sweep(group)] if _has_sweep(group) else []
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(results: list[dict], path: Path) -> None:
    """Left: difference to the baseline by arm, a dot a seed. Right: loss against tokens, mean of seeds.

    Sizes and lengths with one seed alone, such as those of a sweep, are left out if there are others.
    """
    from matplotlib import pyplot

    groups = sorted(_by_size(results).items(), key=_in_order)
    groups = [(key, group) for key, group in groups if _has_seeds(group)] or groups
    figure, axes = pyplot.subplots(
        len(groups), 2, figsize=(11, 3.6 * len(groups)), squeeze=False, layout="constrained"
    )
    for (left, right), ((size, tokens), group) in zip(axes, groups):
        arms = _by_arm(_at_the_usual_rate(group, size))
        names = [name for name in arms if name != BASELINE]
        for row, name in enumerate(names):
            differences = paired_differences(arms[name], arms.get(BASELINE, []))
            left.plot(differences, [row] * len(differences), "o", alpha=0.5, color=f"C{row % 10}")
            if differences:
                middle, half = interval(differences)
                shown = half if half and len(differences) > 2 else 0  # two give no scale
                left.errorbar(middle, row, xerr=shown, fmt="|", color="black", capsize=4)
        left.axvline(0, color="grey", linewidth=1)
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.set_title(f"{size}, {tokens / 1e6:g} M tokens")
        left.set_xlabel(f"validation loss less that of {BASELINE} with the same seed")
        for name, runs in arms.items():
            curve = report_hours.mean_curve(runs)
            right.plot([at / 1e6 for at, _ in curve], [y for _, y in curve], label=name)
        right.set_xlabel("million tokens")
        right.set_ylabel("validation loss")
        right.legend(fontsize="x-small", ncols=2)
    with atomic_write(path) as (file,):
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def _draw_all(
    results: list[dict],
    parity: list[dict],
    path: Path,
    of_hours: Path,
    of_conversion: Path,
    of_parity: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    if from_nothing(results):
        draw(from_nothing(results), path)
    if compared := _compared(results):
        report_hours.draw(compared, of_hours)
    if report_conversion.pairs(results):
        report_conversion.draw(results, of_conversion)
    if parity:
        report_parity.draw(parity, of_parity)


def _by_size(results: list[dict]) -> dict[tuple[str, int], list[dict]]:
    groups = defaultdict(list)
    for result in results:
        groups[result["size"], result["tokens_asked"]].append(result)
    return groups


def _usual(results: list[dict]) -> dict[tuple[str, int], list[dict]]:
    """Results at the usual rate, by size and tokens, in order."""
    groups = sorted(_by_size(from_nothing(results)).items(), key=_in_order)
    return {key: _at_the_usual_rate(group, key[0]) for key, group in groups}


def _compared(results: list[dict]) -> dict[tuple[str, int], dict[str, list[dict]]]:
    """Results at the usual rate by size and tokens, then by arm: those of several seeds."""
    found = {}
    for key, group in _usual(results).items():
        arms = _by_arm(group)
        arms = {name: runs for name, runs in arms.items() if _has_seeds(runs)}
        if len(arms) > 1 and BASELINE in arms:
            found[key] = arms
    return found


def _by_arm(results: list[dict]) -> dict[str, list[dict]]:
    """In the order of the study, seeds in order."""
    return {
        name: sorted(found, key=lambda result: result["seed"])
        for name in ARMS
        if (found := [result for result in results if result["arm"] == name])
    }


def _in_order(item) -> tuple[int, int]:
    (size, tokens), _ = item
    return list(SIZES).index(size), tokens


def _at_the_usual_rate(group: list[dict], size: str) -> list[dict]:
    return [r for r in group if math.isclose(r["learning_rate"], SIZES[size].learning_rate)]


def _has_seeds(group: list[dict]) -> bool:
    return len({result["seed"] for result in group}) > 1


def _has_sweep(group: list[dict]) -> bool:
    return len({result["learning_rate"] for result in group}) > 1


def _shown(differences: list[float]) -> str:
    if not differences:
        return ""
    middle, half = interval(differences)
    return f"{middle:+.4f}" + (f" ± {half:.4f}" if half is not None else "")


def _table(results: list[dict]) -> str:
    arms = _by_arm(results)
    if not arms:
        return ""
    lines = [
        "| arm | active, all (M) | seeds | loss | difference | busiest expert | entropy | tokens/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in arms.items():
        routers = [router for run in runs for router in run["routers"].values()]
        busiest = f"{mean(r['load_max'] for r in routers):.2f}" if routers else ""
        entropy = f"{mean(r['entropy'] for r in routers):.2f}" if routers else ""
        differences = [] if name == BASELINE else paired_differences(runs, arms.get(BASELINE, []))
        sizes = [runs[0][f"{kind}_parameters"] / 1e6 for kind in ("active", "total")]
        speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"]]
        speed = f"{mean(speeds):,.0f}" if speeds else ""
        lines.append(
            f"| {name} | {sizes[0]:.1f}, {sizes[1]:.1f} | {len(runs)} | "
            f"{mean(map(loss, runs)):.4f} | {_shown(differences)} | {busiest} | {entropy} | "
            f"{speed} |"
        )
    return "\n".join(lines)


def _by_source(group: list[dict], size: str) -> str:
    arms = _by_arm(_at_the_usual_rate(group, size))
    if BASELINE not in arms:
        return ""
    names = sorted(arms[BASELINE][0]["validation"])
    lines = [
        f"Difference to `{BASELINE}` by source; in its own row the loss:",
        "",
        f"| arm | {' | '.join(names)} |",
        "| --- |" + " --- |" * len(names),
    ]
    for name, runs in arms.items():
        cells = [
            f"{mean(loss(run, source) for run in runs):.4f}"
            if name == BASELINE
            else _shown(paired_differences(runs, arms[BASELINE], source))
            for source in names
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sweep(group: list[dict]) -> str:
    rates = sorted({result["learning_rate"] for result in group})
    lines = [
        "Learning rates tried, loss:",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "| --- |" + " --- |" * len(rates),
    ]
    for name, runs in _by_arm(group).items():
        if len({run["learning_rate"] for run in runs}) > 1:
            cells = []
            for rate in rates:
                at = [loss(run) for run in runs if run["learning_rate"] == rate]
                cells.append(f"{mean(at):.4f}" if at else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_tool(main)
