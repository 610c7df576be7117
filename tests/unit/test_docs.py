"""What the documentation names exists: files, flags, symbols, variables, links and their anchors.

Names are taken from `code spans` and from code blocks. What a page names of other programs (torchrun,
Slurm) or what a command makes is listed here, with its kind.
"""

import argparse
import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import megatron.training
import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.cli.program import COMMANDS
from megatron_scmoe.platform.megatron_flags import add_run_args
from tests.tools import REPOSITORY, TOOLS, tool

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "examples/*/*.md", "benchmarks/*.md")
    for path in REPOSITORY.glob(pattern)
)
FOLDERS = ("benchmarks", "docs", "examples", "megatron_scmoe", "studies", "tests", "tools")
SUFFIXES = (".py", ".md", ".sh", ".sbatch", ".json", ".toml", ".cff", ".txt", ".png")

MADE = {
    # by Hugging Face's libraries and by the converters, in a model folder
    "config.json", "generation_config.json", "tokenizer.json", "modeling_scmoe.py",
    "configuration_scmoe.py", "README.md",
    # by generation, in a folder of experts
    "experts.json",
    # by a user
    "times.json", "tune.json", "trace.json", "new.json", "held-out.txt", "a.txt",
    # by Megatron-LM: a checkout's script
    "pretrain_gpt.py",
}  # fmt: skip
"""Files that a command makes, or a user has, whatever the folder."""

FOREIGN_FLAGS = {
    "torchrun": {
        *("--nproc-per-node", "--nnodes", "--standalone", "--rdzv-backend", "--rdzv-endpoint")
    },
    "srun": {"--nodes", "--ntasks-per-node", "--mpi", "--network"},
    "sbatch": {"--nodes", "--requeue", "--dependency", "--export", "--signal"},
    "docker": {"--build-arg"},
    "git": {"--depth"},
    "nvidia-smi": {"--query-gpu", "--format"},
    "pip": {"--no-deps"},
    "apt-get": {"--no-install-recommends"},
}
FOREIGN_VARIABLES = ("NCCL_", "NVTE_", "CUDA_", "SLURM_", "OMP_", "TORCH_", "HF_")

TENSORS = re.compile(
    r"^(\.\.\.|(mlp|model|decoder|embedding|output_layer|lm_head)\b)|\.(weight|bias)$"
)
"""Names of tensors; tests/unit/checkpoints/test_convert.py compares them."""


# What a page says.


@functools.cache
def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text()


def blocks(page: str) -> list[str]:
    """Code blocks: fenced, or indented behind an empty line; lines that go on are joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?<=\n\n)((?:    .*\n|\n)+)", rest)
    return [re.sub(r"\\\n *", "", block) for block in (*fenced, *indented)]


def spans(page: str) -> list[str]:
    rest = re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    rest = "\n".join(line for line in rest.splitlines() if not line.startswith("    "))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]


def commands(page: str) -> Iterator[str]:
    """Lines of code blocks without their comments, and spans of several words."""
    for block in blocks(page):
        yield from (re.sub(r"(^|\s)#.*", "", line).strip() for line in block.splitlines())
    yield from spans(page)


# What there is.


@functools.cache
def files() -> frozenset[str]:
    """All files of the repository."""
    found = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*")]
    return frozenset(
        path.relative_to(REPOSITORY).as_posix()
        for path in (*found, *REPOSITORY.iterdir())
        if path.is_file() and "__pycache__" not in path.parts
    )


@functools.cache
def sources() -> dict[str, str]:
    """Text of all programs and scripts."""
    kinds = (".py", ".sh", ".sbatch", "Makefile", "Dockerfile", ".toml")
    return {name: (REPOSITORY / name).read_text() for name in files() if name.endswith(kinds)}


@functools.cache
def words(origin: str) -> frozenset[str]:
    """The identifiers in the project's own programs, or in those of a package it is built on."""
    if origin == "own":
        texts = [text for name, text in sources().items() if name != "tests/unit/test_docs.py"]
    else:
        transformers = Path(importlib.util.find_spec("transformers").origin)
        folder = {
            "megatron": Path(megatron.core.__file__).parents[1],
            "transformers": transformers.parent / "models" / "longcat_flash",
        }[origin]
        texts = [file.read_text(errors="replace") for file in folder.rglob("*.py")]
    return frozenset(word for text in texts for word in re.findall(r"[A-Za-z_]\w+", text))


class _Built(Exception):
    """Carries the parser of a command line out of its ``main``."""


@functools.cache
def flags_of_tool(name: str) -> frozenset[str]:
    """All flags of a command line in tools/, those of its subcommands included."""

    def caught(self, *_, **__):
        raise _Built(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(argparse.ArgumentParser, "parse_args", caught)
    try:
        tool(name).main([])
    except _Built as built:
        return _flags_of(built.args[0])
    finally:
        patch.undo()
    raise AssertionError(f"tools/{name}.py parses no command line")


def _flags_of(parser: argparse.ArgumentParser) -> frozenset[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(_flags_of, action.choices.values()))
    return frozenset(found)


def flags_of_command(name: str) -> frozenset[str]:
    """All flags of a command of the program ``scmoe``; none if there is no such command."""
    if name not in COMMANDS:
        return frozenset()
    return flags_of_training() if name == "train" else flags_of_tool(name.replace("-", "_"))


@functools.cache
def flags_of_training() -> frozenset[str]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return _flags_of(add_run_args(add_megatron_arguments(parser)))


@functools.cache
def flags_of_script(name: str) -> frozenset[str]:
    """Flags of a benchmark or an example's script, as its source and its own options name them."""
    related = [text for file, text in sources().items() if Path(file).parent == Path(name).parent]
    return frozenset(re.findall(r"--[a-z][\w-]*", "\n".join(related)))


def accepted_flags(command: str) -> frozenset[str]:
    """The flags that the program of a command takes; of no program that is known: all there are."""
    program = re.findall(r"[\w./$-]+\.(?:py|sh|sbatch)\b", command)
    name = Path(program[-1]).name if program else ""
    foreign = {flag for word in command.split() for flag in FOREIGN_FLAGS.get(word, ())}
    if name.endswith(("train.sh", "train.sbatch")):
        passed = flags_of_training() if " -- " in command else frozenset()
        return flags_of_script("examples/launch.sh") | passed | foreign | {"--"}
    if name in ("pretrain_gpt_scmoe.py", "pretrain_gpt.py"):
        return flags_of_training() | foreign
    if subcommand := re.search(r"(?:^scmoe|-m megatron_scmoe\.cli) ([a-z][a-z-]*)", command):
        return flags_of_command(subcommand[1]) | foreign
    if name and (TOOLS / name).exists():
        known = flags_of_tool(Path(name).stem)
        return known | foreign | (flags_of_training() if " -- " in command else frozenset())
    if name and (REPOSITORY / "benchmarks" / name).exists():
        passed = flags_of_training() if " --flags " in command else frozenset()
        return flags_of_script(f"benchmarks/{name}") | passed | foreign
    if study := re.search(r"-m studies\.quality\.(\w+)", command):
        return flags_of_script(f"studies/quality/{study[1]}.py") | foreign
    return flags_of_training().union(
        *(flags_of_tool(file.stem) for file in TOOLS.glob("*.py")),
        flags_of_script("benchmarks/step_time.py"),
        flags_of_script("examples/launch.sh"),
        *FOREIGN_FLAGS.values(),
    )


# What must hold.


def test_there_are_pages():
    assert {"README.md", "docs/architecture.md", "examples/longcat_flash/README.md"} <= set(PAGES)
    assert all(spans(page) for page in PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    missing = [name for name in named_files(page) if not exists(name, page)]
    assert missing == []


def named_files(page: str) -> Iterator[str]:
    for command in commands(page):
        inputs = re.sub(r"--(output|json|plot) \S+", "", command)
        for word in re.findall(r"[\w.*{}<>$/+-]+(?:::\w+)?", inputs):
            path = word.partition("::")[0]
            below = path.split("/")[0] in FOLDERS and "/" in path
            if below or (path.endswith(SUFFIXES) and not path.startswith((".", "$", "*"))):
                yield word


def exists(name: str, page: str) -> bool:
    path, _, test = name.partition("::")
    here = Path(page).parent
    places = [Path(path), here / path, Path("megatron_scmoe") / path]
    if "*" in path:
        return any(REPOSITORY.glob(path))
    found = next((place for place in places if (REPOSITORY / place).exists()), None)
    if found is None and "/" not in path:
        same = [Path(file) for file in files() if Path(file).name == path]
        found = same[0] if same else None
    if found is None:
        elsewhere = "/" in path and path.split("/")[0] not in FOLDERS
        return Path(path).name in MADE or elsewhere
    defined = (text for file, text in sources().items() if file.startswith(found.as_posix()))
    return not test or any(f"def {test}(" in text for text in defined)


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page):
    missing = [
        (flag, command)
        for command in commands(page)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w*-])", command)
        if flag not in accepted_flags(command)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_symbols_exist(page):
    assert [span for span in spans(page) if is_symbol(span) and not symbol_exists(span)] == []


def is_symbol(span: str) -> bool:
    """Dotted names, calls, and single words that are written as programs write names."""
    name = span.partition("(")[0]
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) or TENSORS.search(name):
        return False
    if span.endswith(SUFFIXES):
        return False
    camel = re.search(r"[a-z][A-Z]|[A-Z]{2}[a-z]", name)
    return "." in name or "(" in span or "_" in name.strip("_") or bool(camel)


def symbol_exists(span: str) -> bool:
    name = span.partition("(")[0]
    if "." not in name:
        return any(name in words(origin) for origin in ("own", "megatron", "transformers"))
    first, *_, last = name.split(".")
    in_class = any(
        re.search(rf"^class {first}\b", text, re.MULTILINE) and re.search(rf"\b{last}\b", text)
        for text in sources().values()
    )
    in_megatron = {first, last} <= words("megatron") and first[0].isupper()
    named = VARIABLES.get(first, first) + name[len(first) :]
    packages = ("megatron_scmoe.", "transformers.", "torch.", "")
    found = any(resolves(package + named) for package in packages)
    return in_class or in_megatron or found or is_imported_where_installed(name)


VARIABLES = {"tokenizer": "PreTrainedTokenizerFast", "model": "PreTrainedModel"}
"""What pages call an object of a class in transformers."""


def is_imported_where_installed(name: str) -> bool:
    """Whether a dotted name is what a module of Megatron imports under ``try``."""
    module, _, last = name.rpartition(".")
    if not module.startswith("megatron.") or not resolves(module):
        return False
    source = getattr(importlib.import_module(module), "__file__", None)
    return bool(source and re.search(rf"^ +import {last}$", Path(source).read_text(), re.MULTILINE))


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES)
def test_variables_exist(page):
    named = {
        name
        for command in commands(page)
        for name in re.findall(r"(?:^|[\s$`{])([A-Z][A-Z0-9]*_[A-Z0-9_]+)\b", command)
        if not name.startswith(FOREIGN_VARIABLES)
    }
    local = set(re.findall(r"\b([A-Z][A-Z0-9_]*)=", "\n".join(blocks(page))))
    programs = "\n".join(
        text for name, text in sources().items() if name != "tests/unit/test_docs.py"
    )
    assert {name for name in named - local if not re.search(rf"\b{name}\b", programs)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_results_exist(page):
    named = re.findall(r"`(\d+xh[12]00-[\w-]+|cpu-2hosts-[\w-]+)`", text_of(page))
    results = {file.stem for file in (REPOSITORY / "benchmarks" / "results").glob("*.json")}
    assert set(named) - results == set()


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = {word for command in commands(page) for word in re.findall(r"^make ([a-z-]+)", command)}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    dead = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if not leads(link, page)]
    assert dead == []


def leads(link: str, page: str) -> bool:
    if link.startswith(("http://", "https://")):
        return True
    path, _, anchor = link.partition("#")
    target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def test_programs_cite_pages_that_exist():
    cited = {
        (name, page)
        for name, text in sources().items()
        if not name.startswith("tests/")
        for page in re.findall(r"[\w/]*\w\.md\b", text)
    }
    assert {(name, page) for name, page in cited if not exists(page, name)} == set()


def test_architecture_lists_every_module():
    listed = set(
        re.findall(r"^\| `([\w/]+\.py)` \|", text_of("docs/architecture.md"), re.MULTILINE)
    )
    package = REPOSITORY / "megatron_scmoe"
    modules = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if not file.stem.startswith("__")
    }
    assert modules - listed == set()


class TestTheTestItself:
    """Each check finds what is wrong in a page that is."""

    @pytest.fixture
    def page(self, monkeypatch):
        def make(text: str) -> str:
            monkeypatch.setitem(globals(), "text_of", lambda page: text)
            return "docs/made-up.md"

        return make

    @pytest.mark.parametrize(
        ("check", "wrong"),
        [
            (test_files_exist, "see `tools/nothing.py`"),
            (test_files_exist, "see `nothing.sh`"),
            (test_files_exist, "x\n\n    python tools/nothing.py --help\n"),
            (test_files_exist, "see `tests/gpu::test_of_nothing`"),
            (test_flags_exist, "give `--scmoe-nothing`"),
            (test_flags_exist, "x\n\n    python tools/evaluate.py --load x --num-layers 3\n"),
            (test_flags_exist, "x\n\n    scmoe evaluate --load x --num-layers 3\n"),
            (test_flags_exist, "x\n\n    scmoe nothing --load x\n"),
            (test_flags_exist, "x\n\n    torchrun x \\\n      pretrain_gpt_scmoe.py --text x\n"),
            (test_symbols_exist, "call `exchange.nothing`"),
            (test_symbols_exist, "call `megatron_scmoe.nothing.at_all(x)`"),
            (test_symbols_exist, "a `NothingOfThisName`"),
            (test_symbols_exist, "the field `nothing_of_this_name`"),
            (test_variables_exist, "set `$NOTHING_OF_THIS`"),
            (test_results_exist, "in `9xh200-nothing`"),
            (test_make_targets_exist, "say `make nothing`"),
            (test_links_lead_somewhere, "[here](nothing.md)"),
            (test_links_lead_somewhere, "[here](overlap.md#nothing)"),
        ],
    )
    def test_finds_what_is_wrong(self, check, wrong, page):
        with pytest.raises(AssertionError):
            check(page(wrong + "\n"))
