"""Write docs/flags.md, the page of all flags of ScMoE, from ScMoEConfig and the parser.

    python docs/write_flags.py

tests/unit/test_flags_page.py fails where the page is not what this writes.
"""

import argparse
from pathlib import Path

from megatron_scmoe.arguments import add_scmoe_args
from megatron_scmoe.platform.megatron_flags import add_run_args

PAGE = Path(__file__).with_name("flags.md")

THEMES = {
    "The model": ("tap", "combine", "router_norm", "post_norm"),
    "The overlap": (
        "overlap", "expert_slot", "operator_times", "chunks", "exchange", "copy_engine_all_to_alls"
    ),
    "Zero experts, biased choices, latent attention": (
        "zero_experts", "expert_bias", "active_experts", "router_bias", "mla_scale",
        "mla_norm_epsilon",
    ),
    "Going on from a checkpoint": ("changed",),
}  # fmt: skip
"""Fields of ScMoEConfig; the first and the third say what the model computes."""

OF_THE_RUN = "The run"
"""Flags of the entry points that are no fields of ScMoEConfig."""

HEAD = """\
# Flags

`python docs/write_flags.py` writes this page from the source of `--help`. All of Megatron's flags
work too. What cannot work together stops at start-up with one line.

A model also needs `--moe-layer-freq '[0,1]*N'`, which makes N pairs of a dense and a MoE block, and
`--moe-shared-expert-intermediate-size`, the size of its shared expert. [The model](model.md)
explains taps, gates and top-1.

The flags of [the model](#the-model) and of
[its LongCat-Flash parts](#zero-experts-biased-choices-latent-attention) say what is computed. They
are saved with a checkpoint, and a run that loads it is held to them. All others may differ from run
to run.
"""


def page() -> str:
    """The text of docs/flags.md."""
    shown = (a for a in _flags(add_scmoe_args) if a.help is not argparse.SUPPRESS)
    ours = {action.dest: action for action in shown}
    tables = {
        theme: [ours.pop(f"scmoe_{name}") for name in names] for theme, names in THEMES.items()
    }
    if ours:
        raise ValueError(f"no theme has {sorted(ours)}; put them into THEMES")
    listed = {action.dest for actions in tables.values() for action in actions}
    tables[OF_THE_RUN] = [action for action in _flags(add_run_args) if action.dest not in listed]
    return HEAD + "".join(_section(theme, actions) for theme, actions in tables.items())


def _flags(add_arguments) -> list[argparse.Action]:
    parser = argparse.ArgumentParser(add_help=False)
    return add_arguments(parser)._actions


def _section(theme: str, actions: list[argparse.Action]) -> str:
    rows = "".join(_row(action) for action in actions)
    return f"\n## {theme}\n\n| flag | takes | default | what it is |\n| --- | --- | --- | --- |\n{rows}"


def _row(action: argparse.Action) -> str:
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    cells = flags, _takes(action), _default(action), " ".join(action.help.split())
    return f"| {' | '.join(cell.replace('|', ' or ') for cell in cells)} |\n"


def _takes(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "no value"
    words = [f"`{c}`" for c in action.choices] if action.choices else [action.metavar or ""]
    several = "one or more of " if action.nargs in ("+", "*") else ""
    return several + ", ".join(words)


def _default(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "on" if action.default is True and len(action.option_strings) > 1 else "off"
    return "in the text" if action.default is None else f"`{action.default}`"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
