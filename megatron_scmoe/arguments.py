"""Command-line flags ``--scmoe-*``, generated from :class:`~megatron_scmoe.config.ScMoEConfig`."""

import argparse
import functools
import os
import shlex
import sys
from dataclasses import Field, fields
from typing import Any, NoReturn

from megatron.training.argument_utils import ArgumentGroupFactory, TypeInferenceError
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.config import RUNTIME_FIELDS, ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError, with_nearest_flags

ENVIRONMENT_VARIABLE = "SCMOE_ARGS"
"""Where ``--spec megatron_scmoe.spec scmoe_spec`` finds the flags under a foreign entry point, whose
parser does not know them. Example: ``SCMOE_ARGS='--scmoe-tap pos3 --no-scmoe-overlap'``."""

PREFIX = "scmoe_"
"""How the names of ScMoE's fields begin among Megatron's arguments, in a checkpoint too."""

RENAMED_FLAGS = {"--scmoe-copied": "--scmoe-copy-engine-all-to-alls"}
"""Flags of earlier versions and what they are called now; read with a line that says so
(CONTRIBUTING.md says for how long)."""


class _ScMoEArgumentGroup(ArgumentGroupFactory):
    """Megatron's dataclass-to-flags factory, with the prefix ``scmoe``."""

    def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
        name: str = super()._format_arg_name(PREFIX + config_attr_name, prefix)
        return name

    def _extract_type(self, config_type: type) -> dict[str, Any]:
        try:
            kwargs: dict[str, Any] = super()._extract_type(config_type)
            return kwargs
        except TypeInferenceError:  # Megatron prints a warning: the field's metadata has the type
            return {"type": str}

    def _build_argparse_kwargs_from_field(self, attribute: Field[Any]) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._build_argparse_kwargs_from_field(attribute)
        kwargs["dest"] = PREFIX + attribute.name
        if "choices" not in kwargs and "action" not in kwargs:
            kwargs.setdefault("metavar", "N")
        return kwargs


def add_scmoe_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--scmoe-*`` flags; an ``extra_args_provider`` of Megatron's parser."""
    _ScMoEArgumentGroup(ScMoEConfig).build_group(parser, title="scmoe")
    for old, new in RENAMED_FLAGS.items():
        action = parser._option_string_actions[new]
        parser.add_argument(
            old,
            dest=action.dest,
            nargs=action.nargs,
            type=action.type,  # type: ignore[arg-type]  # an action has what a flag may have
            choices=action.choices,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
            action=_RenamedFlag,
            now=action,
        )
    return parser


def scmoe_config_from_args(args: argparse.Namespace) -> ScMoEConfig:
    """The configuration given by parsed ``--scmoe-*`` flags."""
    return ScMoEConfig(**{f.name: getattr(args, PREFIX + f.name) for f in fields(ScMoEConfig)})


def check_choices(saved: argparse.Namespace) -> None:
    """Refuse a model that a later version has saved.

    Raises:
        ScMoEConfigError: at a value that no flag of this version takes.
    """
    for action in _parser()._actions:
        of_model = action.dest.removeprefix(PREFIX) not in RUNTIME_FIELDS
        if action.dest.startswith(PREFIX) and action.choices and of_model:
            value = getattr(saved, action.dest, None)
            if value is not None and value not in action.choices:
                raise ScMoEConfigError(
                    f"a checkpoint of {in_flags(action.dest, value)}",
                    "this version does not know it",
                    "the version of megatron_scmoe that has saved it",
                )


def scmoe_arguments(scmoe: ScMoEConfig) -> dict[str, Any]:
    """The other way: a configuration by the names that parsed flags have."""
    return {PREFIX + f.name: getattr(scmoe, f.name) for f in fields(ScMoEConfig)}


def scmoe_config_from_environment() -> ScMoEConfig:
    """The configuration given by the flags in ``$SCMOE_ARGS`` (the defaults if it is not set).

    Raises:
        SystemExit: status 2 and one line if the variable holds anything but ``--scmoe-*`` flags.
    """
    try:
        return scmoe_config_from_args(_parsed_environment())
    except ScMoEConfigError as error:  # Megatron's script would show a traceback
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def check_environment() -> None:
    """Check ``$SCMOE_ARGS``, before a program of this project adds its own flags to it.

    Raises:
        ScMoEConfigError: if it holds anything but ``--scmoe-*`` flags of the model.
    """
    _parsed_environment()


def _parsed_environment() -> argparse.Namespace:
    parser = add_scmoe_args(_EnvironmentParser(allow_abbrev=False, add_help=False))
    return parser.parse_args(_words_of_environment())


class _EnvironmentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse_environment(with_nearest_flags(self, message))


def _refuse_environment(message: str) -> NoReturn:
    raise ScMoEConfigError(
        f"${ENVIRONMENT_VARIABLE}",
        message,
        "--scmoe-* flags of the model, such as --scmoe-tap pos2",
    )


def given_in_environment() -> dict[str, Any]:
    """What ``$SCMOE_ARGS`` says and leaves to no default, by the names of parsed flags."""
    parser = add_scmoe_args(argparse.ArgumentParser(allow_abbrev=False))
    return _given(parser, _words_of_environment())


def given_on_command_line() -> dict[str, Any]:
    """Megatron's arguments and ``scmoe_*`` that the command line says, and leaves to no default."""
    return _given(_parser(), sys.argv[1:])


def defaults() -> dict[str, Any]:
    """What Megatron's arguments and ``scmoe_*`` are where no flag is given."""
    return vars(_parser().parse_args([]))


def in_flags(name: str, value: Any) -> str:
    """How an argument is given on a command line: ``--scmoe-tap pos3``, ``no --swiglu``.

    Args:
        name: of the parsed argument, which may differ from its flag's.
        value: of the argument.
    """
    action, flag = _action(name), flag_of(name)
    if isinstance(action, argparse.BooleanOptionalAction):
        return flag if value else f"--no-{flag[2:]}"
    if value is None or (action is not None and action.nargs == 0 and value != action.const):
        return f"no {flag}"
    if action is not None and action.nargs == 0:
        return flag
    is_list = action is not None and action.nargs and isinstance(value, list | tuple)
    words = value if is_list else [value]
    return " ".join([flag, *map(_as_word, words)])


def flag_of(name: str) -> str:
    """The flag of a parsed argument: ``--norm-epsilon`` of ``layernorm_epsilon``."""
    action = _action(name)
    flags = [] if action is None else [f for f in action.option_strings if f.startswith("--")]
    return flags[0] if flags else f"--{name.replace('_', '-')}"


def is_switch_off(name: str) -> bool:
    """Whether the flag of an argument makes it false: ``--disable-bias-linear``."""
    action = _action(name)
    return action is not None and action.nargs == 0 and action.const is False


def name_of_flag(word: str) -> str | None:
    """The parsed argument of a flag without its dashes: ``scmoe_tap`` of ``scmoe-tap``; or None."""
    action = _parser()._option_string_actions.get(f"--{word}")
    return None if action is None else action.dest


class _RenamedFlag(argparse.Action):
    """Does what the flag does that is called otherwise now, and says so."""

    def __init__(self, *args: Any, now: argparse.Action, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._now = now

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        new = RENAMED_FLAGS[str(option_string)]
        _say_once(f"WARNING: {option_string} is called {new} now; the old name will go")
        self._now(parser, namespace, values, new)


@functools.cache
def _say_once(line: str) -> None:
    """On the first rank; a command line is parsed several times."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _as_word(value: Any) -> str:
    """A value as one word: text as it is, an enum by its name, a list without spaces."""
    return value if isinstance(value, str) else str(getattr(value, "name", value)).replace(" ", "")


def _words_of_environment() -> list[str]:
    given = os.environ.get(ENVIRONMENT_VARIABLE, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        _refuse_environment(f"{given}: {str(error).lower()}")


@functools.cache
def _parser() -> argparse.ArgumentParser:
    return add_scmoe_args(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def _action(name: str) -> argparse.Action | None:
    return next((action for action in _parser()._actions if action.dest == name), None)


def _given(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, Any]:
    """argparse sets no default where the namespace has a value already."""
    unset = argparse.Namespace(**{name: parser for name in vars(parser.parse_args([]))})
    found, _ = parser.parse_known_args(words, namespace=unset)
    return {name: value for name, value in vars(found).items() if value is not parser}
