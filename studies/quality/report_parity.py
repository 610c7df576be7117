"""The report's part on parity: the project's curve of training loss and the plain model's."""

from pathlib import Path

from megatron_scmoe.platform.atomic_write import atomic_write
from studies.quality.arms import WARM_UP

SHOWN = (1, 10, 100, 300)
"""Steps up to which the table has the largest difference."""


def differences(curve: list[float], other: list[float]) -> list[float]:
    """Relative, step by step."""
    return [abs(a - b) / abs(b) for a, b in zip(curve, other, strict=True)]


def section(results: list[dict], picture: str) -> str:
    """In Markdown; empty without results."""
    if not results:
        return ""
    steps = " | ".join(f"{step}" for step in SHOWN)
    lines = [
        "## Parity",
        "",
        "The largest relative difference of the training loss from that of a plain PyTorch model in "
        "fp32, up to a step. Weights at the start and batches are the same. For comparison: the "
        "plain model in fp64, or on a GPU under autocast.",
        "",
        f"![Training loss, and differences]({picture})",
        "",
        f"| size, numbers, device | arm | compared | {steps} |",
        "| --- | --- | --- |" + " --- |" * len(SHOWN),
    ]
    for result in results:
        other = "plain, fp64" if result["device"] == "cpu" else "plain, autocast"
        for arm, curves in result["arms"].items():
            for key, name in (("run", "the project's run"), ("rounded", other)):
                found = differences(curves[key], curves["plain"])
                cells = [f"{max(found[:n]):.1e}" if n <= len(found) else "" for n in SHOWN]
                lines.append(f"| {_where(result)} | {arm} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _where(result: dict) -> str:
    """What is different from one file to another."""
    words = [result["size"], result["precision"], result["device"]]
    if result["device"] != "cpu":
        local = result.get("modules") == "local"
        words.append("Megatron's modules" if local else "Transformer Engine")
    if result.get("warm_up", WARM_UP) != WARM_UP:
        words.append(f"warm-up {result['warm_up']:.0%}")
    if result.get("seed", 1) != 1:
        words.append(f"seed {result['seed']}")
    return ", ".join(words)


def draw(results: list[dict], path: Path) -> None:
    """A row for each file: the curves, and their differences."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(11, 3.6 * len(results)), squeeze=False, layout="constrained"
    )
    for (left, right), result in zip(axes, results):
        for colour, (arm, curves) in enumerate(result["arms"].items()):
            steps = range(1, len(curves["plain"]) + 1)
            left.plot(steps, curves["plain"], color=f"C{colour}", linewidth=3, alpha=0.4)
            left.plot(steps, curves["run"], color=f"C{colour}", linewidth=1, label=arm)
            for key, style in (("run", "-"), ("rounded", ":")):
                found = differences(curves[key], curves["plain"])
                name = f"{arm}, {'the run' if key == 'run' else 'plain, rounded otherwise'}"
                right.plot(steps, found, style, color=f"C{colour}", linewidth=1, label=name)
        left.set_title(f"{_where(result)}: thick plain, thin the run", fontsize="small")
        left.set_ylabel("training loss")
        right.set_title("relative difference from plain fp32")
        right.set_yscale("log")
        for axis in (left, right):
            axis.set_xlabel("step")
            axis.legend(fontsize="small")
    with atomic_write(path) as (file,):
        figure.savefig(file, format="png", dpi=80)
    pyplot.close(figure)
