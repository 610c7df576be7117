"""The settings that rules read, under one name each, whether they are flags or a configuration yet."""

import argparse
import functools
from dataclasses import fields
from typing import Any, ClassVar

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_scmoe.arguments import defaults


class Settings:
    """Settings by the names of ``TransformerConfig``, read from it or from parsed flags.

    What only the other of the two has is None. A name that neither has is an error: Megatron has
    renamed it, and a rule about it would find nothing.

    Args:
        source: a ``TransformerConfig``, or Megatron's parsed arguments.
    """

    _FLAG_NAMES: ClassVar[dict[str, str]] = {"num_moe_experts": "num_experts"}

    def __init__(self, source: TransformerConfig | argparse.Namespace):
        self._source = source

    def __getattr__(self, name: str) -> Any:
        for known_as in (name, self._FLAG_NAMES.get(name, name)):
            if hasattr(self._source, known_as):
                return getattr(self._source, known_as)
        if name not in names_of_settings():
            raise AttributeError(f"Megatron-Core has no setting {name}")
        return None


@functools.cache
def names_of_settings() -> frozenset[str]:
    """What Megatron calls its settings: fields of its configurations, and arguments by their names."""
    kinds = (TransformerConfig, MLATransformerConfig)
    return frozenset(defaults()).union(f.name for kind in kinds for f in fields(kind))


def final_config(seen: Settings) -> TransformerConfig | None:
    """The configuration that the settings are read from; None while they are parsed flags."""
    return seen._source if isinstance(seen._source, TransformerConfig) else None


def as_list(value: Any) -> list[Any]:
    """A setting that Megatron's parser makes a list of, and its configuration may not."""
    return value if isinstance(value, list) else [value]


def kinds_with_own_choice(load_balancing: Any) -> set[str]:
    """Of the kinds of ``--moe-router-load-balancing-type``, those that choose experts in their own way.

    Args:
        load_balancing: the setting, one kind or a list of them.
    """
    return {"sinkhorn", "quantile_balancing"}.intersection(as_list(load_balancing))
