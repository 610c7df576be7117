"""No patch, override or private call of Megatron's without a row in docs/megatron.md."""

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import megatron_scmoe
from tests.unit.megatron_ledger.source import LEDGER
from tests.unit.megatron_ledger.test_layers import PARAMETERS

PACKAGE = Path(megatron_scmoe.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MEMBERS = {name.rpartition(".")[2] for name in LEDGER}


def test_ledger_and_tests_have_the_same_rows():
    """A row is tested by the function under ``@row("its name")``."""
    tests = "\n".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    rows = re.findall(r'^@row\(\s*"([^"]+)"\s*\)\ndef test_', tests, re.MULTILINE)
    assert sorted(rows) == sorted(LEDGER)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_abc_impl"


def is_of_megatron(thing) -> bool:
    return (getattr(thing, "__module__", None) or "").startswith("megatron.")


def imported(tree: ast.Module) -> dict[str, str]:
    """Names that a file imports from Megatron or from this package: ``package.module:name`` of each."""
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron")
        for alias in node.names
    }


@functools.cache
def modules() -> tuple[ModuleType, ...]:
    """Those with a class that inherits from an imported one; importing all would take a minute."""
    found = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        names = imported(tree)
        bases = [b for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for b in node.bases]
        if any(getattr(base, "id", None) in names for base in bases):
            name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
            found.append(importlib.import_module(name))
    return tuple(found)


def classes() -> list[type]:
    """Those of this package that inherit from one of Megatron's."""
    return [
        kind
        for module in modules()
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and kind.__module__ == module.__name__
        and any(map(is_of_megatron, kind.__mro__))
    ]


def test_overrides_of_private_methods_have_a_row():
    overrides = set()
    for kind in classes():
        theirs = [base for base in kind.__mro__ if is_of_megatron(base)]
        for name in filter(is_private, vars(kind)):
            nearest = [base for base in theirs if name in vars(base)][:1]
            overrides |= {f"{base.__name__}.{name}" for base in nearest}
    assert overrides - set(LEDGER) == set()
    assert overrides - set(PARAMETERS) == set()
    assert "TransformerLayer._forward_mlp" in overrides


def assigned(tree: ast.Module) -> Iterator[str]:
    """Attributes of things imported from Megatron that a file assigns to, by their full names."""
    imports = imported(tree)
    aliases = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }

    def value_of(node: ast.expr, aliases: dict[str, ast.expr]) -> object | None:
        if isinstance(node, ast.Attribute):
            return getattr(value_of(node.value, aliases), node.attr, None)
        name = getattr(node, "id", None)
        if name in imports:
            return resolve(imports[name])
        others = {key: value for key, value in aliases.items() if key != name}
        return value_of(aliases[name], others) if name in aliases else None

    for owner, attribute in stores(tree):
        thing = value_of(owner, aliases)
        if isinstance(thing, ModuleType) or inspect.isclass(thing):
            yield f"{thing.__name__}.{attribute}"


def stores(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """What a file sets an attribute of, and which."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.value, node.attr
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setattr":
            yield node.args[0], ast.unparse(node.args[1]).strip("'")


def resolve(name: str) -> object:
    """What ``package.module:name`` imports: something in the module, or a module in the package."""
    module, _, last = name.partition(":")
    if not module.startswith("megatron."):
        return None
    found = importlib.import_module(module)
    return getattr(found, last, None) or importlib.import_module(f"{module}.{last}")


def test_patches_have_a_row():
    patches = {name for file in FILES for name in assigned(ast.parse(file.read_text()))}
    assert patches - set(LEDGER) == set()
    assert "ChainedOptimizer.load_state_dict" in patches


@functools.cache
def private_names_of_megatron() -> frozenset[str]:
    """Methods, attributes and variables in the files of the classes that this package builds on."""
    bases = {base for kind in classes() for base in kind.__mro__ if is_of_megatron(base)}
    files = {Path(inspect.getsourcefile(base)) for base in bases}
    return frozenset(name for file in files for name in names_defined(file) if is_private(name))


def names_defined(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


@functools.cache
def own_names() -> frozenset[str]:
    return frozenset(name for file in FILES for name in names_defined(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_private_members_that_are_used_have_a_row(file):
    tree = ast.parse(file.read_text())
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    theirs = (read & private_names_of_megatron()) - own_names()
    assert theirs - MEMBERS == set()


class TestTheTestItself:
    """The search finds what is there."""

    def test_an_assignment_through_a_name(self):
        text = """
            from megatron.core import optimizer
            from megatron.core.optimizer import distrib_optimizer
            def patch():
                kind = distrib_optimizer.DistributedOptimizer
                kind.step = None
                optimizer.Adam = None
                setattr(optimizer, "Lion", None)
                args.lr = 1
        """
        assert set(assigned(ast.parse(inspect.cleandoc(text)))) == {
            "DistributedOptimizer.step",
            "megatron.core.optimizer.Adam",
            "megatron.core.optimizer.Lion",
        }

    def test_private_names(self):
        assert {"_forward_attention", "_comm_manager"} <= private_names_of_megatron()
        assert "_forward_attention" not in own_names()
