"""Run a Megatron-LM checkout's own pretraining script with ScMoE.

    torchrun --nproc-per-node 8 -m megatron_scmoe.run Megatron-LM/pretrain_gpt.py \\
        --scmoe-tap pos2 ... Megatron's flags ...

The script and its Megatron stay as they are. It gets ``--spec megatron_scmoe.spec scmoe_spec``, and
its ``--scmoe-*`` flags, which its parser does not know, go into ``$SCMOE_ARGS``, where that spec reads
them. Without a GPU, CUDA requests are mapped to the CPU before Megatron is imported. Flags that were
not given and whose default cannot work are added, and named in a line.
"""

import os
import runpy
import shlex
import sys
import traceback
from argparse import Action, ArgumentParser, HelpFormatter, Namespace
from pathlib import Path
from typing import NoReturn

from megatron_scmoe.config import SPEC
from megatron_scmoe.errors import ScMoEError, SettingsError, with_nearest_flags
from megatron_scmoe.platform import cpu_backend, launch
from megatron_scmoe.platform.command_line import (
    UsageError,
    asks_for_help,
    is_first_rank,
    run_command,
)

USAGE = (
    "torchrun --nproc-per-node N -m megatron_scmoe.run SCRIPT [--scmoe-* ...] [Megatron's flags]"
)


def main() -> None:
    """Run the script that the command line names.

    Raises:
        ScMoEError: for what cannot be done, Megatron's refusal of arguments included.
    """
    words = sys.argv[1:]
    if not words:
        raise UsageError(f"no script is named; accepted: {USAGE}")
    if words[0] in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{__doc__}\nThe flags: scmoe train --help")
        return
    script = Path(words[0])
    if words[0].startswith("-") or not script.is_file():
        raise UsageError(
            f"{words[0]}: there is no such script; accepted: a Megatron-LM checkout's pretrain_gpt.py "
            f"first, then flags"
        )
    scmoe, flags = split_flags(words[1:])
    if "--async-save" in flags and "__main__" not in script.read_text(errors="replace"):
        raise UsageError(
            f"--async-save: its process imports {script}, which would train again there; accepted: a "
            'script that trains below if __name__ == "__main__", or leave the flag out'
        )
    sys.argv = [str(script), *flags]  # what errors name from here on
    # As Python does for a script: a checkout's own megatron.core goes before an installed one.
    sys.path.insert(0, str(script.resolve().parent))
    _check_spec(flags)
    if cpu_backend.FLAG in scmoe:
        os.environ[cpu_backend.VARIABLE] = "1"
    launch.before_megatron()
    _make_parsers_readable()
    if asks_for_help():
        _show_own_flags()
    else:
        launch.check()
        _check_scmoe(scmoe)
        given = shlex.join(word for word in scmoe if word != cpu_backend.FLAG)
        os.environ["SCMOE_ARGS"] = f"{os.environ.get('SCMOE_ARGS', '')} {given}".strip()
        added = missing_flags(flags)
        sys.argv += added
        if added and is_first_rank():
            where = "on the CPU over gloo; " if cpu_backend.is_enabled() else ""
            print(f"> {where}added where not given: {shlex.join(added)}", flush=True)
        _close_gaps(flags)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        if not isinstance(error, ScMoEError) and _is_of_arguments(error):
            # Only now: Megatron is imported by the script, behind what launch prepares.
            from megatron_scmoe.platform.megatron_judgement import in_words_of_flags

            raise SettingsError(in_words_of_flags(error)) from error
        raise


def split_flags(words: list[str]) -> tuple[list[str], list[str]]:
    """The ``--scmoe-*`` flags with their values, and the others."""
    scmoe: list[str] = []
    others: list[str] = []
    current = others
    for word in words:
        if word.startswith("--"):
            current = scmoe if word.startswith(("--scmoe-", "--no-scmoe-")) else others
        current.append(word)
    return scmoe, others


def missing_flags(given: list[str]) -> list[str]:
    """What a run of ScMoE needs and was not given."""
    wanted = [
        ["--spec", *SPEC],
        ["--moe-token-dispatcher-type", "alltoall"],
        ["--eval-interval", "1000"],
    ]
    if cpu_backend.is_enabled():
        wanted += [
            ["--distributed-backend", "gloo"],
            ["--transformer-impl", "local"],
            ["--no-gradient-accumulation-fusion"],
            ["--no-masked-softmax-fusion"],
            ["--no-rope-fusion"],
        ]
    words = [part for word in given for part in word.split("=", 1)]
    if "--seq-length" in words[:-1]:
        wanted.append(["--max-position-embeddings", words[words.index("--seq-length") + 1]])
    present = {word.split("=")[0] for word in given}
    return [word for words in wanted if words[0] not in present for word in words]


def _check_scmoe(words: list[str]) -> None:
    """Before Megatron starts: flags of a run, whose loop the script has not, and ``$SCMOE_ARGS``."""
    from megatron_scmoe.arguments import check_environment
    from megatron_scmoe.platform.megatron_flags import flags_of_the_run

    unheard = flags_of_the_run()
    for word in words:
        if word.split("=")[0] in unheard:
            raise UsageError(
                f"{word}: the script has a loop of its own, which does not hear it; accepted: leave "
                "the flag out, or pretrain_gpt_scmoe.py"
            )
    check_environment()


def _check_spec(flags: list[str]) -> None:
    """Refuse another spec: the script would build its model, and no flag of ScMoE would act."""
    given = [place for place, word in enumerate(flags) if word.split("=")[0] == "--spec"]
    for place in given:
        words = flags[place].split("=")[1:] + flags[place + 1 :]
        if tuple(words[: len(SPEC)]) != SPEC:
            raise UsageError(
                f"--spec {' '.join(words[:1])}: its model has no ScMoE; accepted: leave the flag out"
            )


def _show_own_flags() -> None:
    """Before the script shows the flags of its own parser."""
    from megatron_scmoe.platform.megatron_flags import add_flags_for_spec, prepare_parser

    parser = ArgumentParser(prog="megatron_scmoe.run", usage=USAGE, add_help=False)
    prepare_parser(add_flags_for_spec, parser).print_help()
    print(flush=True)


def _close_gaps(flags: list[str]) -> None:
    """What pretrain_gpt_scmoe.py does before it starts the loop."""
    from megatron_scmoe.platform import megatron_workarounds

    megatron_workarounds.apply(Namespace(async_save="--async-save" in flags))
    megatron_workarounds.call_specs()


def _make_parsers_readable() -> None:
    """In this process: a parser's error is one line, and a stray ``%`` in a help text is a ``%``."""
    expand = HelpFormatter._expand_help

    def expand_or_keep(self: HelpFormatter, action: Action) -> str | None:
        try:
            return expand(self, action)
        except (ValueError, TypeError, KeyError):
            return action.help

    def refuse(self: ArgumentParser, message: str) -> NoReturn:
        raise UsageError(f"{with_nearest_flags(self, message)} (see --help)")

    # Parsers are made by the script that is run: the classes are changed.
    HelpFormatter._expand_help = expand_or_keep  # type: ignore[method-assign,assignment]
    ArgumentParser.error = refuse  # type: ignore[method-assign]


def _is_of_arguments(error: Exception) -> bool:
    """Whether Megatron raised it while it parsed and judged arguments; elsewhere it is a bug."""
    if not isinstance(error, (AssertionError, ValueError, RuntimeError, ImportError)):
        return False
    judges = {"parse_args", "validate_args", "core_transformer_config_from_args"}
    return any(
        frame.f_code.co_name in judges
        and frame.f_globals.get("__name__", "").startswith("megatron.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


if __name__ == "__main__":
    run_command(main)
