"""The table of rules: complete, and found by flag."""

import functools
import importlib
import inspect
import pkgutil
import re
import shlex

import pytest

from megatron_scmoe import validation
from megatron_scmoe.arguments import name_of_flag, scmoe_config_from_args
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation import latent_attention
from megatron_scmoe.validation.rule import Rule
from megatron_scmoe.validation.rules import RULES, describe, index_by_flag
from megatron_scmoe.validation.settings import Settings
from tests.unit.training.test_advice import parser
from tests.unit.validation.test_validation import PLAIN, REFUSED

TRIED_IN_TEST_VALIDATION = {
    # of a TransformerConfig
    "gates_weigh_a_shared_expert",
    "experts_have_no_fused_gelu",
    "fused_shared_expert_has_no_biases",
    "pipeline_stages_hold_whole_pairs",
    # behind a parser that refuses it as well, or of an environment
    "copied_are_all_to_alls",
    "dispatch_does_not_queue_behind_its_graph",
}
NEEDS_OTHER_SOFTWARE = {
    "torch_has_events_inside_graphs",  # an older PyTorch
    "copies_have_a_hardware_queue",  # a GPU
    "copy_engines_have_their_package",  # a GPU
    "latent_attention_is_not_captured",  # Transformer Engine, which latent attention asks for first
}


def name_of(rule: Rule) -> str:
    return rule.check.__name__


@functools.cache
def judgement(flags: str) -> tuple[Rule, str]:
    """The first rule that refuses the flags, and what it says was given."""
    args = parser().parse_args([*PLAIN, *shlex.split(flags)])
    scmoe = scmoe_config_from_args(args)
    for rule in RULES:
        try:
            rule.check(scmoe, Settings(args))
        except ScMoEConfigError as refusal:
            return rule, str(refusal).partition(": ")[0]
    raise AssertionError(f"nothing refuses {flags}")


def test_every_rule_is_in_the_table_once():
    written = []
    for found in pkgutil.iter_modules(validation.__path__, "megatron_scmoe.validation."):
        module = importlib.import_module(found.name)
        written += [value for value in vars(module).values() if isinstance(value, Rule)]
    assert sorted(map(name_of, written)) == sorted(map(name_of, RULES))
    assert len({name_of(rule) for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_a_rule_names_flags_that_exist(rule):
    assert rule.flags
    assert [flag for flag in rule.flags if name_of_flag(flag.removeprefix("--")) is None] == []


@pytest.mark.parametrize("flags", [row[0] for row in REFUSED])
def test_a_refusal_names_the_flags_of_its_rule(flags):
    rule, given = judgement(flags)
    named = re.findall(r"(?<!\S)--[a-z][\w-]*", given)
    assert given.startswith(named[0])
    assert set(named) <= set(rule.flags)


def test_every_rule_is_tried():
    tried = {name_of(judgement(row[0])[0]) for row in REFUSED}
    others = TRIED_IN_TEST_VALIDATION | NEEDS_OTHER_SOFTWARE
    assert {name_of(rule) for rule in RULES} - tried == others


def test_the_index_leads_to_the_rules_of_a_flag():
    names = [name_of(rule) for rule in index_by_flag()["--scmoe-active-experts"]]
    assert names == [
        "active_experts_are_aimed_at_by_a_bias",
        "active_experts_are_among_topk",
        "fewer_active_experts_need_zero_experts",
    ]


def test_a_line_of_the_index_says_where_the_rule_is():
    (line,) = describe(["--cache-mla-latents"])
    number = inspect.getsourcelines(latent_attention.latents_are_not_cached.check)[1]
    where = f"latent_attention.py:{number}"
    assert line.split() == ["--cache-mla-latents", where, "latents", "are", "not", "cached"]
