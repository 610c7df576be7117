"""Experts on the host: the table that offloading.py prints, and the section of RESULTS.md."""

from collections.abc import Iterator

from rerun import folded
from shapes import SHAPES
from spoken import MODELS, place
from tables import table

BENCHMARK = "offloading"
"""What its JSON is marked with."""

BEFORE_GRAPHS = "4f841bd"
"""The last commit at which a token with offloaded experts was launched kernel by kernel."""


def is_offloading(result: dict) -> bool:
    """Whether a JSON is one of offloading.py."""
    return isinstance(result, dict) and result.get("benchmark") == BENCHMARK


def hidden_share(modes: dict) -> float | None:
    """Of the time that a token waits for copies, what overlap takes away; None without a wait."""
    blocking, overlapped = (modes[mode]["waited_ms"] for mode in ("blocking", "overlapped"))
    return 1 - overlapped / blocking if blocking else None


def memory_of(row: dict) -> float:
    """The peak where there is one, else that of the weights, in MB."""
    return row["peak_memory_mb"] or row["memory_mb"]


def printed(name: str, found: dict) -> str:
    """What is printed of a shape."""
    lines = [
        f"{name}: {found['experts']} experts of {found['expert_mb']:.1f} MB",
        f"{'':<12}{'prefill ms':>12}{'ms a token':>12}{'memory MB':>12}{'saved':>8}{'hits':>7}"
        f"{'MB a token':>12}{'waited ms':>11}  same output",
    ]
    for mode, row in found["modes"].items():
        line = (
            f"{mode:<12}{row['prefill_ms']:>12.2f}{row['token_ms']:>12.2f}{memory_of(row):>12.0f}"
        )
        if "hit_rate" in row:
            line += f"{found['memory_saved'][mode]:>8.1%}{row['hit_rate']:>7.0%}"
            line += f"{row['copied_mb']:>12.1f}{row['waited_ms']:>11.2f}  {row['same_output']}"
        lines.append(line)
    share = hidden_share(found["modes"])
    if share is not None:
        lines.append(f"hidden share of the waits for copies: {share:.3f}")
    return "\n".join(lines)


def offloading_section(results: dict[str, dict]) -> Iterator[str]:
    """The section of all measurements, by the names of their files; nothing if there is none."""
    if not results:
        return
    yield "## Experts on the host\n"
    yield (
        "Generation of one text with routed experts in pinned memory of the host "
        "(`--offload-experts`). *Blocking*: an expert is fetched when it is to compute; *overlapped*: "
        "when the gate has chosen it; *cached*: the same, with a cache of a quarter of all experts. "
        "*Waited*: how long the compute of a token waits for copies. *Saved*: of the peak of memory. "
        "*In graphs*: whether tokens were in CUDA graphs. Without, the host launches kernel by kernel, "
        "and a token takes far longer, so that there is more to hide copies behind.\n"
    )
    for name, result in results.items():
        for shape, found in result["shapes"].items():
            blocks = found["sizes"]["blocks"]
            eager = not found["modes"]["overlapped"]["in_graphs"]
            how = ", kernel by kernel" if eager else ""
            yield f"### Offloading: {MODELS[shape]}, {blocks} blocks, {place(result)}{how}\n"
            share = hidden_share(found["modes"])
            hidden = f" Overlap hides {share:.1%} of the waits." if share is not None else ""
            yield (
                f"[`{name}`](results/{name}.json): {result['date']}. {found['experts']} experts of "
                f"{found['expert_mb']:.1f} MB, a prompt of {result['prompt_length']} tokens, "
                f"{result['tokens']} tokens written, the medians.{hidden}\n"
            )
            yield from _rows(found)
            if eager:
                yield f"At commit {BEFORE_GRAPHS}, before offloaded experts were in graphs:\n"
            yield f"```bash\n{command(result)}\n```\n"


def command(result: dict) -> str:
    """The command that measures it again."""
    return folded(_parts(result))


def _rows(found: dict) -> Iterator[str]:
    heads = ["", "prefill, ms", "token, ms", "in graphs", "waited, ms", "copied, MB a token"]
    heads += ["hits", "peak, MB", "saved", "same text"]
    rows = []
    for mode, row in found["modes"].items():
        cells = [mode, f"{row['prefill_ms']:.1f}", f"{row['token_ms']:.2f}"]
        cells.append("yes" if row["in_graphs"] else "no")
        if "hit_rate" in row:
            cells += [
                f"{row['waited_ms']:.2f}",
                f"{row['copied_mb']:.0f}",
                f"{row['hit_rate']:.0%}",
            ]
            saved = f"{found['memory_saved'][mode]:.1%}"
            cells += [f"{memory_of(row):.0f}", saved, "yes" if row["same_output"] else "no"]
        else:
            cells += ["", "", "", f"{memory_of(row):.0f}", "", ""]
        rows.append(cells)
    yield from table(heads, rows)


def _parts(result: dict) -> Iterator[str]:
    yield "python benchmarks/offloading.py"
    yield f"--shapes {' '.join(result['shapes'])}"
    for name, found in result["shapes"].items():
        shape, blocks = SHAPES[name], found["sizes"]["blocks"]
        if blocks != (shape.of_blocks or shape.blocks):
            yield f"--blocks {blocks}"
    yield f"--prompt-length {result['prompt_length']}"
    yield f"--tokens {result['tokens']}"
    yield f"--batch {result['batch']}"
