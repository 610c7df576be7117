"""The command that measures a result again, from the settings that its JSON holds."""

import re
from collections.abc import Iterable, Iterator

from options import all_that_run
from result import SETTINGS_THEN
from shapes import SHAPES, Shape

OWN_VARIABLES = ("NCCL_VERSION", "NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""What a container or Megatron sets by itself."""

LINE = 104


def command(result: dict) -> str:
    """One command; lines that go on end in a backslash."""
    return folded(_parts(result))


def folded(parts: Iterable[str]) -> str:
    """The parts of a command in lines; those that go on end in a backslash."""
    lines, line = [], ""
    for part in parts:
        if line and len(line) + len(part) > LINE - 4:
            lines.append(line)
            line = " "
        line += f" {part}" if line else part
    return " \\\n".join([*lines, line])


def launcher(result: dict) -> Iterator[str]:
    """What stands before the script: variables, and what starts the ranks."""
    if result["device"] == "cpu":
        rate = re.search(r"two hosts at (\S+)", result["link"])
        yield f"benchmarks/two_hosts.sh --rate {rate[1]} --" if rate else _torchrun(result)
    else:
        for name, value in _environment(result).items():
            yield f"{name}={value}"
        yield _torchrun(result)


def _parts(result: dict) -> Iterator[str]:
    """What is not broken between lines."""
    on_cpu = result["device"] == "cpu"
    yield from launcher(result)
    yield "benchmarks/step_time.py"
    sizes, shape = result["sizes"], SHAPES[result["shape"]]
    graphs = sizes["cuda_graphs"]
    yield f"--shape {result['shape']}"
    yield from _of_shape(sizes, shape)
    yield f"--tap {result['tap']}"
    if result["slot"] is not None:
        yield f"--slot {result['slot']}"
    if graphs:
        yield f"--cuda-graphs {' '.join(graphs)}"
    for name in ("chunks", "exchange", "ep_channels"):
        if result[name] != SETTINGS_THEN[name]:
            yield f"--{name.replace('_', '-')} {result[name]}"
    if result["copied"]:
        yield f"--copied {' '.join(result['copied'])}"
    if result["ep_high_priority"]:
        yield "--ep-high-priority"
    for name in ("rounds", "warmup"):
        if name in result:
            yield f"--{name} {result[name]}"
    yield from _of_training(result, default=0 if graphs else 5)
    if result.get("operators"):
        yield "--operators"
    if list(result["systems"]) != all_that_run(on_cpu, bool(graphs)):
        yield f"--systems {' '.join(result['systems'])}"


def _torchrun(result: dict) -> str:
    return f"torchrun --nproc-per-node {result['world_size']}"


def _environment(result: dict) -> dict[str, str]:
    """The variables to set; the link's also where the environment was not recorded."""
    recorded = result.get("environment", {})
    link = {"NCCL_P2P_DISABLE": "1"} if result["link"] in ("host-staged", "socket") else {}
    link |= {"NCCL_SHM_DISABLE": "1"} if result["link"] == "socket" else {}
    return {
        name: value
        for name, value in sorted((link | recorded).items())
        if name not in OWN_VARIABLES
    }


def _of_shape(sizes: dict, shape: Shape) -> Iterator[str]:
    if sizes["blocks"] != shape.blocks:
        yield f"--blocks {sizes['blocks']}"
    if sizes["micro_batch"] != shape.micro_batch:
        yield f"--micro-batch {sizes['micro_batch']}"
    if sizes["router_fusion"]:
        yield "--router-fusion"


def _of_training(result: dict, default: int) -> Iterator[str]:
    trained = any("train_ms" in row for row in result["systems"].values())
    rounds = result.get("train_rounds", default if trained else 0)
    if rounds != default:
        yield f"--train-rounds {rounds}"
    if result["train_micro_batches"] != 1:
        yield f"--train-micro-batches {result['train_micro_batches']}"
