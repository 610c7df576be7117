"""What a refusal recommends is accepted: each alternative it names is tried.

The messages end in "; accepted: ..." with flags, values of the flag in question, or words that
IN_WORDS translates. Where a recommended setting is refused for another reason, its first advice is
followed in turn, and so on: the user's way ends with settings that are accepted. Advice for files is
tried in tests/unit/training/test_input_checks.py and, by training, in
tests/distributed/test_advice_trains.py.
"""

import functools
import re
import shlex
from argparse import ArgumentParser

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.arguments import add_scmoe_args, scmoe_config_from_args
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rules import validate
from tests.unit.validation.test_validation import PLAIN, REFUSED

IN_WORDS = {
    "leave the flag out": ["without THIS"],
    "1 or more": ["1"],
    "0 or more": ["0"],
    "2 or more": ["2"],
    "a number": ["2"],
    "a number: 0 to 3": ["0", "3"],
    "a number; the second attention lies between tap and slot 3": ["2", "3"],
    "more than 0, up to 2": ["0.5", "2"],
    "1e-6, for example": ["1e-6"],
    "both flags": ["--moe-router-score-function softmax --moe-router-pre-softmax"],
    "1 for MoE in every block with --scmoe-tap pos1": ["--moe-layer-freq 1 --scmoe-tap pos1"],
    "transformer_engine with --cuda-graph-modules attn": [
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn"
    ],
    "--scmoe-overlap alone": ["without THIS --scmoe-overlap"],
    "--use-distributed-optimizer instead": ["without THIS --use-distributed-optimizer"],
    "--cuda-graph-modules without mlp": ["--cuda-graph-modules attn moe_router moe_preprocess"],
    "--moe-router-enable-expert-bias for other scores": [
        "without --scmoe-expert-bias --moe-router-enable-expert-bias "
        "--moe-router-score-function sigmoid"
    ],
    "--moe-router-enable-expert-bias for others": [
        "without --scmoe-expert-bias --moe-router-enable-expert-bias "
        "--moe-router-score-function sigmoid"
    ],
    "--scmoe-expert-bias for softmax scores": ["without --moe-router-enable-expert-bias"],
    "--scmoe-zero-experts": ["--scmoe-zero-experts 2"],
    "--q-lora-rank": ["--q-lora-rank 8"],
}
"""Advice in words, as flags or as values of the flag in question, THIS."""

NOT_HERE = {
    "install the package": "a test does not change the environment",
    "--scmoe-exchange copy-peer": "without a GPU copy engines are refused",
    "copy-host": "without a GPU copy engines are refused",
}
STEPS = 5
"""Pieces of advice followed one after the other, at most."""


@pytest.mark.parametrize("flags", [row[0] for row in REFUSED])
def test_advice_is_accepted(flags):
    given = shlex.split(flags)
    for settings in recommended(given, refusal(given)):
        follow(settings)


def refusal(flags: list[str]) -> str | None:
    args = parser().parse_args([*PLAIN, *flags])
    try:
        validate(scmoe_config_from_args(args), args)
    except ScMoEConfigError as error:
        return str(error)
    return None


@functools.cache
def parser() -> ArgumentParser:
    return add_scmoe_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def follow(flags: list[str]) -> None:
    """Follow the first advice of each refusal until there is none."""
    told = []
    for _ in range(STEPS):
        message = refusal(flags)
        if message is None:
            return
        assert message not in told, f"the advice of {message!r} leads back to it"
        told.append(message)
        flags = recommended(flags, message)[0]
    raise AssertionError(f"after {STEPS} steps still refused: {told}")


def recommended(flags: list[str], message: str) -> list[list[str]]:
    """The settings that a message recommends in place of ``flags``; one for each alternative."""
    given, _, accepted = message.rpartition("; accepted: ")
    this = flag = given.split()[0].removesuffix(":")
    pieces = alternatives(accepted)
    found = []
    for piece in pieces:
        if piece in NOT_HERE:
            continue
        if piece.startswith("--") and len(piece.split()) > 1:
            flag = piece.split()[0]  # "--flag A, B or C"
        for words in IN_WORDS.get(piece, [piece if piece.startswith("--") else f"{flag} {piece}"]):
            words = words.replace("THIS", this)
            if not words.startswith(("--", "without ")):
                words = f"{this} {words}"
            found.append(changed_by(flags, shlex.split(words)))
    assert found or not NOT_HERE.keys().isdisjoint(pieces), f"nothing to try in {accepted!r}"
    return found


def alternatives(accepted: str) -> list[str]:
    """The pieces of "A, B or C", "A, or B" and the like, but for what is one piece of advice."""
    if accepted in IN_WORDS:
        return [accepted]
    pieces = re.split(r", or | or (?!more\b)|, (?![^\[]*\])", accepted)
    return [piece.strip() for piece in pieces]


def changed_by(flags: list[str], words: list[str]) -> list[str]:
    """``flags`` with each flag among ``words``, and its values, in place of an earlier one."""
    if words[0] == "without":
        flags, words = without(flags, words[1]), words[2:]
    for name in [word for word in words if word.startswith("--")]:
        positive = name.replace("--no-", "--")
        flags = without(without(flags, positive), positive.replace("--", "--no-"))
    return [*flags, *words]


def without(flags: list[str], name: str) -> list[str]:
    """``flags`` without one flag and its values."""
    kept, skipping = [], False
    for word in flags:
        if word.startswith("--"):
            skipping = word == name
        if not skipping:
            kept.append(word)
    return kept
