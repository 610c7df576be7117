"""The README.md of an exported model: what is known of it, and nothing else."""

from collections.abc import Mapping
from typing import Any

from megatron_scmoe.checkpoints.inspect import count_parameters, millions
from megatron_scmoe.checkpoints.torch_dist import MegatronCheckpoint

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- moe
- scmoe
---

# {title}

A language model with shortcut-connected mixtures of experts (ScMoE,
[arXiv 2404.05019](https://arxiv.org/abs/2404.05019)), converted from a Megatron-Core checkpoint by
megatron_scmoe.

| | |
| --- | --- |
{facts}

```python
from transformers import AutoModelForCausalLM{and_tokenizer}

model = AutoModelForCausalLM.from_pretrained("{title}"{trust})
{load_tokenizer}```
{code}
Data, evaluation, intended use and licence are not known to the converter.
"""

_CODE = """
`trust_remote_code=True` runs `configuration_scmoe.py` and `modeling_scmoe.py` of this folder.
"""


def model_card(
    config: Mapping[str, Any],
    checkpoint: MegatronCheckpoint,
    tokenizer: str,
    title: str,
    has_tokenizer: bool,
) -> str:
    """The card of a model.

    Args:
        config: its ``config.json``.
        checkpoint: what it was made of.
        tokenizer: which tokenizer goes with it.
        title: the name of the folder.
        has_tokenizer: whether the folder holds one.
    """
    args = checkpoint.args
    assert args is not None  # a checkpoint without is refused before
    total, active = count_parameters(checkpoint.tensors, args)
    facts = {
        "parameters": f"{millions(total)}, {millions(active)} of them active for a token",
        "blocks": f"{args.num_layers}, hidden size {args.hidden_size}",
        "experts": f"{args.num_experts}, {args.moe_router_topk} for a token",
        "tap, combine": f"{args.scmoe_tap}, {args.scmoe_combine}",
        "vocabulary": _vocabulary(config),
        "sequence length in training": args.seq_length,
        "training iterations": checkpoint.iteration,
        "dtype": config["dtype"],
        "tokenizer": tokenizer,
    }
    own_code = "auto_map" in config
    trust = ", trust_remote_code=True" if own_code else ""
    tokenizer_line = f'tokenizer = AutoTokenizer.from_pretrained("{title}"{trust})\n'
    return _CARD.format(
        title=title,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        trust=trust,
        and_tokenizer=", AutoTokenizer" if has_tokenizer else "",
        load_tokenizer=tokenizer_line if has_tokenizer else "",
        code=_CODE if own_code else "",
    )


def _vocabulary(config: Mapping[str, Any]) -> str:
    rows, tokens = config["vocab_size"], config.get("unpadded_vocab_size")
    if not tokens:
        return f"{rows} tokens"
    return f"{tokens} tokens; ids from {tokens} to {rows - 1} pad it, and sampling may choose them"
