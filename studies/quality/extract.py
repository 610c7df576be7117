"""Plain text of the files of a package: HTML, manual pages, dictionaries, docstrings, text."""

import ast
import gzip
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import lxml.html
from lxml.etree import ParserError

NOT_TEXT = "//script|//style|//nav|//header|//footer|//head|//form|//comment()"
BLOCKS = set(
    "address article aside blockquote br dd details div dl dt figcaption h1 h2 h3 h4 h5 h6 hr li "
    "main ol p pre section summary table tr ul".split()
)
SHORTEST_DOCSTRING = 80
ENTRY_GROUP = 4000
"""Characters of the dictionary entries that make one document."""


def debian_files(package: Path, patterns: list[str]) -> dict[str, bytes]:
    """The files of a Debian package whose paths below usr/share/ match a pattern."""
    unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    assert unpack.stdout is not None
    found = {}
    with tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
        for member in archive:
            path = member.name.removeprefix("./usr/share/")
            wanted = any(fnmatchcase(path, pattern) for pattern in patterns)
            content = archive.extractfile(member) if member.isfile() and wanted else None
            if content is not None:
                found[path] = content.read()
        while unpack.stdout.read(1 << 20):  # what pads the archive
            pass
    if unpack.wait():
        raise OSError(f"{package}: dpkg-deb cannot read it")
    return found


def wheel_files(package: Path) -> dict[str, bytes]:
    """The modules of a wheel, tests left out."""
    with zipfile.ZipFile(package) as archive:
        return {
            name: archive.read(name)
            for name in archive.namelist()
            if name.endswith(".py") and not re.search(r"(^|[/_])tests?([/_.]|$)", name)
        }


def documents(path: str, content: bytes, mandoc: Path) -> Iterator[tuple[str, str]]:
    """Name and text of what a file holds: one document, or of a dictionary many.

    Args:
        mandoc: the program that formats manual pages.
    """
    if path.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    suffix = PurePosixPath(path.removesuffix(".gz")).suffix
    if path.startswith("man/"):
        yield path, man_text(content, mandoc)
    elif suffix == ".dz":
        yield from dictionary_documents(path, content.decode("utf-8", "replace"))
    elif suffix in (".html", ".htm"):
        yield path, html_text(content)
    elif suffix == ".py":
        yield path, docstrings(content)
    elif path.startswith("games/fortunes/"):
        if not suffix:
            text = content.decode("utf-8", "replace")
            yield from dictionary_documents(path, text.replace("\n%\n", "\n\n"))
    else:
        yield path, content.decode("utf-8", "replace")


def docstrings(source: bytes) -> str:
    """The docstrings of a module, and the texts that Ansible's modules document themselves by."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            is_text = names == {"DOCUMENTATION"} and isinstance(node.value.value, str)
            text = node.value.value if is_text else None
        else:
            continue
        if text and len(text) >= SHORTEST_DOCSTRING:
            found.append(text)
    return "\n\n".join(found)


def html_text(content: bytes) -> str:
    """The text of a page, a blank line between blocks, without menus, headers and scripts."""
    try:
        page = lxml.html.document_fromstring(content)
    except (ParserError, ValueError):  # nothing in it
        return ""
    for node in page.xpath(NOT_TEXT):
        if node.getparent() is not None:
            node.drop_tree()
    main = page.xpath("//main|//*[@role='main']") or [page]
    parts: list[str] = []
    _collect(main[0], parts, in_pre=False)
    return "".join(parts)


def man_text(content: bytes, mandoc: Path) -> str:
    """A manual page, formatted without headers, indentation and bold."""
    done = subprocess.run(
        [mandoc, "-T", "utf8", "-O", "width=400,indent=0"], input=content, capture_output=True
    )
    text = re.sub(r".\x08", "", done.stdout.decode("utf-8", "replace"))
    lines = [line.strip() for line in text.split("\n")]
    return "\n".join(lines[1:-2])  # the page's header and footer


def dictionary_documents(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Groups of the entries of a dictd dictionary; a headword begins at the margin."""
    group: list[str] = []
    size = number = 0
    for entry in re.split(r"\n(?=\S)", text):
        group.append(entry)
        size += len(entry)
        if size > ENTRY_GROUP:
            yield f"{name}#{number}", "\n".join(group)
            group, size, number = [], 0, number + 1
    if group:
        yield f"{name}#{number}", "\n".join(group)


def _collect(node, parts: list[str], in_pre: bool) -> None:
    """The text of an element in order; white space counts in <pre> alone."""
    if not isinstance(node.tag, str):
        return
    in_pre = in_pre or node.tag == "pre"
    is_block = node.tag in BLOCKS
    if is_block:
        parts.append("\n\n" if node.tag not in ("br", "tr", "dd") else "\n")
    if node.text:
        parts.append(node.text if in_pre else re.sub(r"\s+", " ", node.text))
    for child in node:
        _collect(child, parts, in_pre)
        if child.tail:
            parts.append(child.tail if in_pre else re.sub(r"\s+", " ", child.tail))
    if node.tag in ("td", "th"):
        parts.append(" ")
    if is_block:
        parts.append("\n\n" if node.tag not in ("br", "tr", "dd") else "\n")
