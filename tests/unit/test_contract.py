"""Names of Megatron's that this package reads exist in the installed Megatron.

A check of a setting that Megatron has renamed would find nothing, and pass.
"""

import argparse
import ast
import re
from pathlib import Path

import megatron.core
import megatron.training
import pytest
from transformers import AutoConfig

import megatron_scmoe
from megatron_scmoe.checkpoints import runtime_settings, torch_dist
from megatron_scmoe.checkpoints.formats import longcat_flash, refusals, scmoe
from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig as HFScMoEConfig
from megatron_scmoe.checkpoints.model_arguments import MODEL_ARGUMENTS
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.platform.megatron_flags import add_run_args
from megatron_scmoe.training import (
    data_identity,
    number_checks,
    pretrain,
    resuming,
    run_checks,
    run_defaults,
)
from megatron_scmoe.validation import router, unsupported
from megatron_scmoe.validation.rule import Refused
from megatron_scmoe.validation.rules import validate
from megatron_scmoe.validation.settings import Settings, names_of_settings

PACKAGE = Path(megatron_scmoe.__file__).parent
SETTERS = (
    *Path(megatron.training.__path__[0]).glob("*.py"),
    Path(megatron.core.__path__[0]) / "tokenizers" / "utils" / "build_tokenizer.py",
)

TABLES = {
    "refused settings": [row.name for row in unsupported.UNSUPPORTED],
    "refused with an own router": [row.name for row in router.NOT_WITH_OWN_ROUTER],
    "model arguments": MODEL_ARGUMENTS,
    "compared on load": resuming.COMPARED,
    "free on load": resuming.FREE,
    "what is trained for": resuming.OF_TRAINING,
    "foreign flags": pretrain._FOREIGN,
    "what samples are drawn by": data_identity.ORDERING,
    "chosen where not given": run_defaults.OPEN,
    "numbers of a run": [
        row[0]
        for table in (
            number_checks._MODEL_NUMBERS,
            number_checks._NUMBERS,
            number_checks._OPTIONAL_NUMBERS,
            number_checks._RANGES,
        )
        for row in table
    ],
    "flags that need a package": [row[0] for row in run_checks._PACKAGES],
    "settings of a run": [*runtime_settings._OF_ONE_RANK, *runtime_settings._WITHOUT_TE],
    "layouts": torch_dist.LAYOUT,
    "in no format": [row[0] for row in refusals.IN_NO_FORMAT],
    "not in scmoe's format": [row[0] for row in scmoe._REFUSED],
    "not in LongCat's format": longcat_flash._FIXED_ARGUMENTS,
}


def derived() -> set[str]:
    """Arguments that no flag has: Megatron sets them while it validates."""
    pattern = re.compile(r"\bargs\.(\w+) *=[^=]")
    return {name for file in SETTERS for name in pattern.findall(file.read_text())}


def of_the_run() -> set[str]:
    """Arguments of this package's own entry point."""
    return set(vars(add_run_args(argparse.ArgumentParser()).parse_args([])))


KNOWN = names_of_settings() | derived() | of_the_run()


@pytest.mark.parametrize("table", TABLES)
def test_names_in_a_table_exist(table):
    assert [name for name in TABLES[table] if name not in KNOWN] == []


def names_read(file: Path) -> set[str]:
    """What is read of a variable that is called as Megatron's arguments or settings are here."""
    variables = {"args", "given", "view", "settings", "trial"}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and called(node.value) in variables:
            found.add(node.attr)
        if isinstance(node, ast.Call) and called(node.func) in ("getattr", "hasattr"):
            subject, name, *_ = node.args
            saved = {"saved", "before", "older", "theirs", "_saved"}
            if called(subject) in variables | saved and isinstance(name, ast.Constant):
                found.add(name.value)
    return found - {*dir(dict), *dir(list), *dir(str)}


def called(node: ast.expr) -> str:
    """What a variable or an attribute is called: ``args`` of ``args`` and of ``saved.args``."""
    if isinstance(node, ast.Attribute) and node.attr in ("args", "_saved"):
        return node.attr
    return getattr(node, "id", "")


def fields_read(file: Path) -> set[str]:
    """What is read of transformers' configuration, or its JSON, with an answer if it is not there."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            function, *arguments = map(ast.unparse, (node.func, *node.args))
            if function in ("require", "getattr") and arguments[0] in ("config", "self.config"):
                found.add(node.args[1])
            if function == "config.get":
                found.add(node.args[0])
    return {name.value for name in found if isinstance(name, ast.Constant)}


READ_OF_TRANSFORMERS = {
    "checkpoints/formats/gpt2.py": ["gpt2"],
    "checkpoints/formats/llama.py": ["llama", "mistral", "qwen2", "qwen3"],
    "checkpoints/formats/longcat_flash.py": ["longcat_flash"],
    "evaluation/hugging_face.py": ["gpt2", "llama", "mistral", "qwen2", "qwen3", "longcat_flash"],
}
"""Whose configurations a file reads, besides this package's own."""

FORMER_FIELDS = {"rope_theta"}
"""Read beside the field that has taken its place: folders of an earlier transformers have them."""


@pytest.mark.parametrize("file", READ_OF_TRANSFORMERS)
def test_fields_that_are_read_exist_in_transformers(file):
    configs = [HFScMoEConfig(), *map(AutoConfig.for_model, READ_OF_TRANSFORMERS[file])]
    known = {field for config in configs for field in (*vars(config), *config.attribute_map)}
    read = fields_read(PACKAGE / file)
    assert read
    assert sorted(read - known - FORMER_FIELDS) == []


FILES = sorted(
    file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py") if "cli" not in file.parts
)
"""Command lines of their own have arguments of their own."""


@pytest.mark.parametrize("file", FILES, ids=str)
def test_names_that_are_read_exist(file):
    assert sorted(names_read(PACKAGE / file) - KNOWN) == []


def test_a_name_that_neither_has_is_an_error():
    view = Settings(validation_settings())
    assert view.num_moe_experts == 4 and view.fp8 is None
    with pytest.raises(AttributeError, match="Megatron-Core has no setting apply_layernorm_1p"):
        _ = view.apply_layernorm_1p


def test_a_renamed_setting_is_an_error_not_a_pass(monkeypatch):
    row = Refused("mtp_layers", "--mtp-num-layers", "no block", "leave it out")
    monkeypatch.setattr(unsupported, "UNSUPPORTED", (row,))
    with pytest.raises(AttributeError, match="mtp_layers"):
        validate(ScMoEConfig(), validation_settings())


def validation_settings():
    from tests import models

    return models.transformer_config()
