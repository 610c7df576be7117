"""Command-line flags ``--scmoe-*``, generated from :class:`~megatron_scmoe.config.ScMoEConfig`."""

import argparse
import os
import shlex
from dataclasses import fields

from megatron.training.argument_utils import ArgumentGroupFactory, TypeInferenceError

from megatron_scmoe.config import ScMoEConfig

ENVIRONMENT_VARIABLE = "SCMOE_ARGS"
"""Where ``--spec megatron_scmoe.spec scmoe_spec`` finds the flags under a foreign entry point, whose
parser does not know them. Example: ``SCMOE_ARGS='--scmoe-tap pos3 --no-scmoe-overlap'``."""

_PREFIX = "scmoe_"


class _ScMoEArgumentGroup(ArgumentGroupFactory):
    """Megatron's dataclass-to-flags factory, with the prefix ``scmoe``."""

    def _format_arg_name(self, config_attr_name, prefix=None):
        return super()._format_arg_name(_PREFIX + config_attr_name, prefix)

    def _extract_type(self, config_type):
        try:
            return super()._extract_type(config_type)
        except TypeInferenceError:  # Megatron prints a warning: the field's metadata has the type
            return {"type": str}

    def _build_argparse_kwargs_from_field(self, attribute):
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        kwargs["dest"] = _PREFIX + attribute.name
        if "choices" not in kwargs and "action" not in kwargs:
            kwargs.setdefault("metavar", "N")
        return kwargs


def add_scmoe_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the ``--scmoe-*`` flags; an ``extra_args_provider`` of Megatron's parser."""
    _ScMoEArgumentGroup(ScMoEConfig).build_group(parser, title="scmoe")
    return parser


def scmoe_config_from_args(args: argparse.Namespace) -> ScMoEConfig:
    """The configuration given by parsed ``--scmoe-*`` flags."""
    return ScMoEConfig(**{f.name: getattr(args, _PREFIX + f.name) for f in fields(ScMoEConfig)})


def scmoe_config_from_environment() -> ScMoEConfig:
    """The configuration given by the flags in ``$SCMOE_ARGS`` (the defaults if it is not set).

    Raises:
        SystemExit: status 2 and one line if the variable holds anything but ``--scmoe-*`` flags.
    """
    parser = argparse.ArgumentParser(prog=f"${ENVIRONMENT_VARIABLE}", usage="", allow_abbrev=False)
    words = shlex.split(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    return scmoe_config_from_args(add_scmoe_args(parser).parse_args(words))
