"""What a rule is: a function that refuses settings, and the flags that its refusals name.

Where a rule is a table, its rows are :class:`Refused`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.validation.settings import Settings, as_list

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


class Refused(NamedTuple):
    """Values of one setting that are refused, whatever else is set.

    Args:
        name: of the setting.
        flag: its flag.
        reason: why they cannot work.
        accepted: what could be given instead.
        is_refused: whether a value is one of them.
    """

    name: str
    flag: str
    reason: str
    accepted: str
    is_refused: Callable[[Any], object] = bool

    def given(self, settings: Settings) -> str | None:
        """The flag with its value, if that is refused."""
        value = getattr(settings, self.name)
        if not self.is_refused(value):
            return None
        return self.flag if value is True else " ".join([self.flag, *map(str, as_list(value))])
