"""What Megatron says of settings, in one line and in flags."""

import argparse
import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_scmoe.arguments import flag_of, in_flags, is_switch_off, name_of_flag
from megatron_scmoe.errors import (
    BARE_ASSERTION,
    ScMoEError,
    SettingsError,
    failed_assertion,
    in_words,
)


@contextmanager
def judged_by_megatron() -> Iterator[None]:
    """Turn what Megatron says of settings into one line: assertions, ValueErrors, and the
    RuntimeErrors and ImportErrors by which it asks for a package.

    Put its validation of arguments and configurations in here, and nothing else: anywhere else such
    an exception is a bug.

    Raises:
        SettingsError: with Megatron's words.
    """
    try:
        yield
    except ScMoEError:
        raise
    except (AssertionError, ValueError, RuntimeError, ImportError) as error:
        raise SettingsError(in_words_of_flags(error)) from error


def in_words_of_flags(error: BaseException) -> str:
    """An error in one line (:func:`~megatron_scmoe.errors.in_words`).

    In a bare assertion about parsed arguments, flags with their values are in place of the
    arguments: ``--min-lr 1.0, --lr 0.1: it must hold that --min-lr <= --lr``. In a message flags are
    in place of the names of several words: ``eval_global_batch_size``.
    """
    failed = failed_assertion(error)
    if failed is None:
        return _NAME.sub(_flag_in_place, in_words(error))
    test, variables = failed
    args = variables.get("args")
    if not isinstance(args, argparse.Namespace):
        return in_words(error)
    flags = _Flags(args)
    told = ast.unparse(flags.visit(test))
    return f"{', '.join(flags.given)}{': ' * bool(flags.given)}{BARE_ASSERTION} {told}"


_NAME = re.compile(r"(?<![\w./-])[a-z]+(?:_[a-z\d]+)+(?![\w./(=-])")
"""What may be the name of an argument; not in a path, a call or a longer name."""


def _flag_in_place(name: re.Match[str]) -> str:
    flag = flag_of(name[0])
    return flag if name_of_flag(flag[2:]) == name[0] and not is_switch_off(name[0]) else name[0]


class _Flags(ast.NodeTransformer):
    """Puts flags in place of ``args.NAME`` wherever there is a flag of that argument."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.given: dict[str, None] = {}

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        is_argument = isinstance(node.value, ast.Name) and node.value.id == "args"
        flag = flag_of(node.attr)
        if not is_argument or not hasattr(self.args, node.attr) or not name_of_flag(flag[2:]):
            return self.generic_visit(node)
        self.given[in_flags(node.attr, getattr(self.args, node.attr))] = None
        written = ast.Name(flag)
        return ast.UnaryOp(ast.Not(), written) if is_switch_off(node.attr) else written

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), twice)):
                return twice
        return node
