"""What models, places, settings and systems are called where people read of them."""

import re

from shapes import SHAPES

MODELS = {
    "gpt2-small": "GPT2-MoE-Small",
    "gpt2-medium": "GPT2-MoE-Medium",
    "gpt3-xl": "GPT3-MoE-XL",
    "llama2": "LLaMA2-MoE",
    "fine": "64 fine experts",
    "wide": "Eight wide experts",
    "cpu": "Small model",
}
"""By the name of a shape."""

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")

LINKS = {
    "socket": "tokens through sockets",
    "host-staged": "tokens through host memory",
    "native": "NVLink",
}
"""By the name of a link, the slow ones first."""


def model(result: dict) -> str:
    """The model, and how many blocks of it were measured."""
    sizes = result["sizes"]
    blocks, whole = sizes["blocks"], sizes["of_blocks"]
    cut = f"{blocks} of {whole} blocks" if whole not in (None, blocks) else f"{blocks} blocks"
    return f"{MODELS[result['shape']]}, {cut}"


def place(result: dict) -> str:
    """The devices, and the link between them."""
    ranks = result["world_size"]
    if result["device"] == "cpu":
        rate = re.search(r"two hosts at (\d+)([kmg])bit", result["link"])
        return (
            f"{_number(ranks)} CPU ranks, {rate[1]} {rate[2].replace('m', 'M').replace('g', 'G')}bit/s"
            if rate
            else f"{_number(ranks)} CPU ranks"
        )
    device = result["device"].removeprefix("NVIDIA ")
    link = f", {LINKS.get(result['link'], result['link'])}" if ranks > 1 else ""
    return f"{_number(ranks)} {device}{link}"


def variant(result: dict) -> str:
    """The settings that tell results of one model and place apart."""
    parts = [f"Pos-{result['tap'][-1]}"]
    if result["slot"] is not None:
        parts.append(f"slot {result['slot']}")
    if result["chunks"] > 1:
        parts.append(f"{_number(result['chunks'])} chunks")
    if result["device"] == "cpu":
        number = result["train_micro_batches"]
        s = "es" if number > 1 else ""
        parts.append(f"iterations of {_number(number)} micro-batch{s}")
        return ", ".join(parts)
    if result["world_size"] > 1:
        parts.append(_carrier(result))
    if channels := result["ep_channels"]:
        parts.append(f"at most {channels} channels")
    if modules := result["sizes"]["cuda_graphs"]:
        parts.append("CUDA graphs of attention" if modules == ["attn"] else "CUDA graphs")
    if (sequences := result["sizes"]["micro_batch"]) != SHAPES[result["shape"]].micro_batch:
        parts.append(f"{sequences} sequences")
    return ", ".join(parts)


def system_name(system: str, topk: int, floor: str | None) -> str:
    """A system; ``floor`` says what arrived in it where these were not copies of real tokens."""
    shared = f"stock top-{topk} + shared expert"
    return {
        "top2": f"stock top-{2 * topk}",
        "top2-1f1b": f"stock top-{2 * topk}, 1F1B overlap",
        "top1": f"stock top-{topk}, no shared expert",
        "shared": shared,
        "shared-overlap": f"{shared}, Megatron's overlap",
        "scmoe-serial": "ScMoE, serial",
        "scmoe": "**ScMoE, overlapped**",
        "floor": "ScMoE, communication left out" + (f" ({floor})" if floor else ""),
    }[system]


def sizes_note(result: dict) -> str:
    """The model's sizes in a sentence."""
    sizes = result["sizes"]
    groups = sizes["query_groups"]
    heads = f"{sizes['heads']} heads" + (f" in {groups} query groups" if groups else "")
    every = "block" if sizes["every_block"] else "second block"
    return (
        f"Hidden {sizes['hidden']}, {heads}, dense MLPs of {sizes['ffn']}, {sizes['experts']} experts "
        f"of {sizes['expert_ffn']} in every {every}, sequences of {sizes['sequence']}, a vocabulary of "
        f"{sizes['vocab']}. The experts are spread over all {_device(result)}s."
    )


def run_note(result: dict) -> str:
    """Date, rounds, tokens and versions in a few sentences."""
    sizes = result["sizes"]
    rounds = f"{result['rounds']} rounds" if "rounds" in result else "rounds not recorded"
    warmup = f" after {result['warmup']} to warm up" if "warmup" in result else ""
    sentences = [
        f"{result['date']}, {rounds}{warmup}, {sizes['micro_batch']} sequences per {_device(result)}.",
    ]
    if sizes["router_fusion"]:
        sentences.append("The router is fused in all systems.")
    if result.get("ep_channels"):
        sentences.append(
            f"The expert group has at most {result['ep_channels']} NCCL channels, in all systems."
        )
    if versions := result.get("versions"):
        named = (f"{name} {version}" for name, version in versions.items() if version)
        sentences.append(f"Versions: {', '.join(named)}.")
    if "warmup" not in result:
        sentences.append("The rounds before, to warm up, were not recorded.")
    if "environment" not in result:
        sentences.append("The environment was not recorded.")
    return " ".join(sentences)


def graph_note(result: dict) -> str:
    """What is captured; empty if nothing is."""
    modules = result["sizes"]["cuda_graphs"]
    if not modules:
        return ""
    return (
        f"All systems use CUDA graphs; those of ScMoE hold {', '.join(f'`{m}`' for m in modules)}."
    )


def _carrier(result: dict) -> str:
    """What carries the all-to-alls of ScMoE."""
    copied = result["copied"]
    if result["exchange"] == "collective":
        return "NCCL"
    if not copied:
        return "copy engines"
    if sorted(copied) == ["combine-backward", "dispatch-backward"]:
        return "copy engines in backward"
    return f"copy engines for {' and '.join(copied)}"


def _device(result: dict) -> str:
    return "rank" if result["device"] == "cpu" else "GPU"


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)
