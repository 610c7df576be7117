"""Prefill and decode: the table that inference.py prints, and the section of RESULTS.md."""

from collections.abc import Iterator

from rerun import folded, launcher
from shapes import SHAPES
from spoken import model, place, system_name
from tables import table

BENCHMARK = "inference"
"""What its JSON is marked with."""

OTHERS = ("top2", "shared", "scmoe-serial")
"""What overlapped ScMoE is compared with."""


def is_inference(result: dict) -> bool:
    """Whether a JSON is one of inference.py."""
    return isinstance(result, dict) and result.get("benchmark") == BENCHMARK


PLAIN, PADDED, IN_GRAPHS = HOW = ("", "padded", "graphs")
"""How a token is computed: sizes are exchanged; experts are padded; and all is in a CUDA graph."""


def decode_key(batch: int, how: str = PLAIN) -> str:
    """Where a result has the time of one token of a batch."""
    return f"decode_{batch}_{how}_ms" if how else f"decode_{batch}_ms"


def inference_table(result: dict) -> str:
    """The table that is printed: times, and how many times as fast as the first system."""
    systems = result["systems"]
    keys = list(_names(result).values())
    base = next(iter(systems.values()))
    heads = "".join(f"{key.removesuffix('_ms').replace('_', ' '):>18}{'over':>9}" for key in keys)
    lines = [f"{result['shape']} on {result['world_size']} ranks, {result['link']}"]
    lines.append(f"{'system':<14}{heads}")
    for name, row in systems.items():
        cells = "".join(f"{row[key]:>18.2f}{base[key] / row[key]:>8.3f}x" for key in keys)
        lines.append(f"{name:<14}{cells}")
    return "\n".join(lines)


def inference_section(results: dict[str, dict]) -> Iterator[str]:
    """The section of all measurements, by the names of their files; nothing if there is none."""
    if not results:
        return
    yield "## Inference\n"
    yield (
        "Milliseconds, medians; the slowest rank counts. A prefill reads the prompts of a rank and "
        "gives the logits behind their last tokens. A decode reads one token of each text; the number "
        "is of texts on a rank. Padded: each token goes to every expert, and counts where it was "
        "chosen, so that no rank waits for sizes (`--decode-padding on`; stock models are padded too). "
        "In graphs: padded, and a token is one launch (`--decode-cuda-graphs on`; stock models too). "
        "Greedy choice, no sampling, no tokenizer. Routing is forced to be balanced; in graphs it is "
        "the router's own, and padded experts have as many rows either way.\n"
    )
    for name, result in results.items():
        graphs = ", in graphs too" if _has_graphs(result) else ""
        yield f"### Inference: {model(result)}, {place(result)}{graphs}\n"
        sizes = result["sizes"]
        yield (
            f"[`{name}`](results/{name}.json): {result['date']}, {result['rounds']} rounds. Prefill: "
            f"{sizes['micro_batch']} prompts of {sizes['sequence']} tokens. Decode: {result['tokens']} "
            f"tokens in a row behind {result['context']}.\n"
        )
        yield from _rows(result)
        yield f"```bash\n{command(result)}\n```\n"


def _has_graphs(result: dict) -> bool:
    return decode_key(result["batch_sizes"][0], IN_GRAPHS) in next(iter(result["systems"].values()))


def command(result: dict) -> str:
    """The command that measures it again."""
    return folded(_parts(result))


def _rows(result: dict) -> Iterator[str]:
    systems, topk = result["systems"], result["sizes"]["topk"]
    others = [other for other in OTHERS if {other, "scmoe"} <= systems.keys()]
    heads = [system_name(system, topk, None) for system in systems]
    heads += [f"over {system_name(other, topk, None)}" for other in others]
    rows = []
    for what, key in _names(result).items():
        times = [f"{row[key]:.2f}" for row in systems.values()]
        over = [f"{systems[other][key] / systems['scmoe'][key]:.3f}x" for other in others]
        rows.append([what, *times, *over])
    yield from table(["", *heads], rows)


def _names(result: dict) -> dict[str, str]:
    """What was measured, as one would say it, and where a result has it."""
    names = {"prefill": "prefill_ms"}
    for batch in result["batch_sizes"]:
        names[f"decode, {batch}"] = decode_key(batch)
        names[f"decode, {batch}, padded"] = decode_key(batch, PADDED)
        names[f"decode, {batch}, in graphs"] = decode_key(batch, IN_GRAPHS)
    measured = next(iter(result["systems"].values()))
    return {what: key for what, key in names.items() if key in measured}


def _parts(result: dict) -> Iterator[str]:
    sizes, shape = result["sizes"], SHAPES[result["shape"]]
    yield from launcher(result)
    yield "benchmarks/inference.py"
    yield f"--shape {result['shape']}"
    yield f"--systems {' '.join(result['systems'])}"
    for name in ("blocks", "micro_batch"):
        if sizes[name] != getattr(shape, name):
            yield f"--{name.replace('_', '-')} {sizes[name]}"
    yield f"--batch-sizes {' '.join(map(str, result['batch_sizes']))}"
    if _has_graphs(result):
        yield "--graphs"
    yield f"--tap {result['tap']}"
    if result["slot"] is not None:
        yield f"--slot {result['slot']}"
    for name in ("context", "tokens", "rounds", "warmup"):
        yield f"--{name} {result[name]}"
