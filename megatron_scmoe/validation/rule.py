"""What a rule is: a function that refuses settings, and the flags that its refusals name."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.validation.settings import Settings

Check = Callable[[ScMoEConfig, Settings], None]
"""Raises ``ScMoEConfigError`` if the settings cannot work, and returns otherwise."""


@dataclass(frozen=True)
class Rule:
    """One thing that ScMoE cannot do.

    Args:
        flags: those that its refusals say were given; each refusal begins with one of them.
        check: the function, whose name says what must hold.
    """

    flags: tuple[str, ...]
    check: Check


def rule(*flags: str) -> Callable[[Check], Rule]:
    """Make a function the rule for these flags; :mod:`megatron_scmoe.validation.rules` lists it."""
    return lambda check: Rule(flags, check)
