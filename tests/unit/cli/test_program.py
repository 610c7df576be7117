"""The console program ``scmoe``: its commands, what it says of a wrong one, what errors name."""

import importlib
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_scmoe.cli import program
from megatron_scmoe.platform import megatron_flags
from megatron_scmoe.platform.command_line import staged_outputs
from tests.tools import REPOSITORY, TOOLS

PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.fixture
def said(monkeypatch, capsys):
    """Call the program; return its exit status and the one line that it says on standard error."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            program.main(words)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return ended.value.code, error.rstrip("\n")

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["convrt"], "convrt: there is no such command; the nearest is convert; accepted: train, "),
        (["preprocess_data"], "preprocess_data: there is no such command; the nearest is preproc"),
        (["nothing"], "nothing: there is no such command; accepted: train, evaluate, generate, "),
        (["--load", "x"], "--load: flags stand behind a command; accepted: train, evaluate, gene"),
        ([], "no command is named; accepted: train, evaluate, generate, "),
    ],
)
def test_what_is_no_command_is_refused(words, told, said):
    status, line = said(*words)
    assert status == 2
    assert line.startswith(f"scmoe: error: {told}")
    assert all(name in line for name in program.COMMANDS)


@pytest.mark.parametrize("name", sorted(program.COMMANDS.keys() - {"train"}))
def test_errors_name_the_command(name, said):
    status, line = said(name)
    assert status == 2
    assert line.startswith(f"scmoe {name}: error: ")
    assert line.endswith(f"(see scmoe {name} --help)")


@pytest.mark.parametrize("name", sorted(program.COMMANDS.keys() - {"train"}))
def test_sigterm_leaves_nothing_half_written(name, tmp_path, monkeypatch, said):
    def write() -> None:
        with staged_outputs("--output", [tmp_path / "out"]) as (part,):
            part.touch()
            assert list(tmp_path.iterdir())
            signal.raise_signal(signal.SIGTERM)

    module = importlib.import_module(f"megatron_scmoe.cli.{name.replace('-', '_')}")
    monkeypatch.setattr(module, "main", write)
    signal.signal(signal.SIGTERM, _nobody_handles_it)
    with pytest.raises(SystemExit) as ended:
        program.main([name])
    assert ended.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def _nobody_handles_it(number: int, _) -> None:
    raise AssertionError("SIGTERM would have ended the process at once")


def test_ranks_that_write_nothing_end_at_once(monkeypatch, said):
    monkeypatch.setenv("LOCAL_RANK", "1")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    said("generate", "--nothing")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_nohup_ignores_stays_ignored(said):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    said("serve", "--nothing")
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)


def test_errors_name_a_command_of_a_command(said):
    status, line = said("convert", "inspect", "a", "--nothing")
    assert (status, line.partition(": ")[0]) == (2, "scmoe convert")


def test_every_module_of_a_command_is_one():
    modules = (REPOSITORY / "megatron_scmoe" / "cli").glob("*.py")
    with_main = {file.stem for file in modules if "\ndef main(" in file.read_text()}
    assert {name.replace("-", "_") for name in program.COMMANDS} == with_main - {"program"}


def test_scripts_of_a_checkout_run_the_command_of_their_name():
    scripts = {file.stem: file.read_text() for file in TOOLS.glob("*.py")}
    scripts["train"] = (REPOSITORY / "pretrain_gpt_scmoe.py").read_text()
    ran = {
        name: found[1]
        for name, text in scripts.items()
        if (found := re.search(r"\n    run\(\"([a-z-]+)\"\)\n", text))
    }
    assert ran == {name.replace("-", "_"): name for name in program.COMMANDS}


def test_a_missing_package_is_named_with_the_extra_that_has_it():
    code = (
        "import sys; sys.modules['matplotlib'] = None; "
        "from megatron_scmoe.cli.program import main; main(['plot-schedule', '--help'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60
    )
    assert run.returncode == 2
    assert run.stderr == (
        "scmoe plot-schedule: error: the Python package matplotlib is not installed; "
        "accepted: pip install 'megatron-scmoe[plot]'\n"
    )


@pytest.mark.parametrize(("package", "extra"), program._EXTRAS.items())
def test_the_extra_installs_the_package(package, extra):
    assert any(
        line.startswith(package) for line in PYPROJECT["project"]["optional-dependencies"][extra]
    )


def test_help_has_a_line_for_each_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, command in program.COMMANDS.items():
        assert f"  {name:<17}{command.summary}" in lines


def test_help_of_training_says_how_to_start_ranks(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    shown = {}
    monkeypatch.setattr(
        megatron_flags, "show_help", lambda started, about: shown.update(usage=started)
    )
    with pytest.raises(SystemExit) as ended:
        program.main(["train", "--help"])
    assert (ended.value.code, shown) == (0, {"usage": "-m megatron_scmoe.cli train"})


def test_the_version_says_where_it_is_installed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit):
        program.main(["--version"])
    assert capsys.readouterr().out.split()[-1] == str(Path(program.__file__).parents[1])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_knows_few_characters_is_shown_the_others_by_their_numbers(encoding):
    code = (
        "from megatron_scmoe.platform.command_line import run_tool\n"
        "run_tool(lambda: print('A \\u65e5 \\udc80'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    shown = "\u65e5" if encoding == "utf-8" else r"\u65e5"
    assert done.stdout.decode(encoding) == f"A {shown} \\udc80\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_the_shell_closed_leads_nowhere(closed, tmp_path):
    """And a file that is opened then does not get its number, which libraries print to."""
    code = (
        "import sys; from megatron_scmoe.platform.command_line import end, run_tool\n"
        "def main():\n"
        "    print('told')\n"
        "    assert open(sys.argv[1], 'w').fileno() > 2\n"
        "    end('why', status=2)\n"
        "run_tool(main)"
    )
    done = subprocess.run(
        ["bash", "-c", f'"$@" {closed}', "", sys.executable, "-c", code, tmp_path / "x"],
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ("" if closed == ">&-" else "told\n")
    assert done.stderr == ("" if closed == "2>&-" else "why\n")
