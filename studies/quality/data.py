"""Build the study's data: real English text from packages that everyone can download.

    python -m studies.quality.data FOLDER

downloads the packages of corpus.toml with apt-get and pip into FOLDER/packages, writes their text to
FOLDER/text, trains a tokenizer, tokenizes into FOLDER/tokens, and packs these into
FOLDER/quality.tar.xz, which is all that training needs. It wants Debian 12's apt sources. Packages
and text that are there already are not made again. manifest.json, beside this file, says what came out.
"""

import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from megatron_scmoe.cli import preprocess_data, train_tokenizer
from megatron_scmoe.platform.atomic_write import atomic_write
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, positive, run_tool
from studies.quality import clean, extract
from studies.quality.clean import Document

HERE = Path(__file__).parent
VOCABULARY = 8192
ARCHIVE = "quality.tar.xz"
SEED = 17
XZ = "--lzma2=preset=6,dict=16MiB,lc=3,lp=1,pb=1 --block-size=16MiB"
"""Tokens are two bytes: the position within them tells much about a byte."""


def main(argv: list[str] | None = None) -> None:
    """Build everything."""
    parser = OneLineParser(description="Build the data of the study of quality.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where everything goes")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus.toml", help="what it is of")
    parser.add_argument("--manifest", type=Path, default=HERE / "manifest.json", help="written")
    parser.add_argument(
        "--max-tokens", type=positive, default=36_000_000, metavar="N", help="to train on"
    )
    parser.add_argument(
        "--held-out", type=positive, default=1_000_000, metavar="N", help="characters, by source"
    )
    parser.add_argument("--vocab-size", type=positive, default=VOCABULARY, help="of the tokenizer")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes")
    args = parser.parse_args(argv)

    corpus = tomllib.loads(args.corpus.read_text())
    packages, text = args.folder / "packages", args.folder / "text"
    packages.mkdir(parents=True, exist_ok=True)
    download(corpus, packages)
    if not text.is_dir():
        write_text(text, *collect(corpus, packages, args.held_out, args.workers))
    tokenize(args.folder, list(corpus), args.vocab_size, args.workers)
    shorten(tokens_of(args.folder, "train"), args.max_tokens)
    pack(args.folder)
    manifest = {
        "packages": {file.name: _sha256(file) for file in used(corpus, packages)},
        "vocabulary": args.vocab_size,
        "train": _describe(args.folder, "train", corpus),
        "held_out": {source: _describe(args.folder, source, corpus) for source in sorted(corpus)},
        "archive_bytes": (args.folder / ARCHIVE).stat().st_size,
    }
    with atomic_write(args.manifest) as (file,):
        file.write_text(json.dumps(manifest, indent=1) + "\n")
    print(json.dumps({name: value for name, value in manifest.items() if name != "packages"}))


def download(corpus: dict, folder: Path) -> None:
    """Download what is not there; apt-get takes the version of the Debian release at hand."""
    for source in corpus.values():
        patterns = itertools.chain(*source.get("debian", {}).values())
        formatter = ["mandoc"] if any(pattern.startswith("man/") for pattern in patterns) else []
        for name in [*source.get("debian", {}), *formatter]:
            if not list(folder.glob(f"{name}_*.deb")):
                _call("apt-get", "download", "-q", name, folder=folder)
        for name, version in source.get("pypi", {}).items():
            if not list(folder.glob(f"{name.replace('-', '_')}-*.whl")):
                words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
                _call(*words, "--only-binary=:all:", f"{name}=={version}", folder=folder)


def used(corpus: dict, folder: Path) -> list[Path]:
    """The packages of the corpus."""
    debian = [name for source in corpus.values() for name in source.get("debian", {})]
    wheels = [name for source in corpus.values() for name in source.get("pypi", {})]
    return sorted([_debian(folder, name) for name in debian] + [_wheel(folder, n) for n in wheels])


def read(corpus: dict, packages: Path, workers: int) -> list[Document]:
    """The documents of all packages that are prose, as many characters of each as its source takes."""
    jobs: list[tuple[str, int, Path, list[str] | None]] = []
    for source, content in corpus.items():
        limit = int(content["at_most"] * 1e6)
        for name, patterns in content.get("debian", {}).items():
            jobs.append((source, limit, _debian(packages, name), patterns))
        for name in content.get("pypi", {}):
            jobs.append((source, limit, _wheel(packages, name), None))
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(workers) as pool:
        mandoc = _unpacked_mandoc(packages, Path(folder))
        parts = list(pool.map(_read_package, jobs, [mandoc] * len(jobs)))
    return [document for part in parts for document in part]


def collect(
    corpus: dict, packages: Path, held_out: int, workers: int
) -> tuple[list[Document], dict[str, list[Document]]]:
    """What is trained on, and what is held out by source: about so many characters of each."""
    documents = read(corpus, packages, workers)
    print(f"{len(documents):,} documents", flush=True)
    documents = clean.deduplicate(clean.shuffled(documents, SEED))
    print(f"{len(documents):,} are left without repeated paragraphs", flush=True)
    return clean.split(documents, held_out)


def write_text(folder: Path, train: list[Document], held_out: dict[str, list[Document]]) -> None:
    """A file of JSON lines for what is trained on and for each source; all or nothing."""
    with atomic_write(folder) as (part,):
        part.mkdir()
        for name, documents in ({"train": train} | held_out).items():
            with open(part / f"{name}.jsonl", "w") as file:
                for document in documents:
                    about = {"source": document.source, "name": document.name}
                    file.write(json.dumps(about | {"text": document.text}) + "\n")


def tokenize(folder: Path, sources: list[str], vocabulary: int, workers: int) -> None:
    """Train the tokenizer on the training text, and tokenize all parts, by the project's commands."""
    (folder / "tokens").mkdir(exist_ok=True)
    prefix = folder / "tokens" / "tokenizer"
    train = str(folder / "text" / "train.jsonl")
    words = ["--vocab-size", str(vocabulary), "--max-characters", "8000000", "--force"]
    train_tokenizer.main(["--input", train, "--output-prefix", str(prefix), *words])
    for name in ("train", *sources):
        preprocess_data.main(
            [
                *("--input", str(folder / "text" / f"{name}.jsonl")),
                *("--tokenizer-model", f"{prefix}.model", "--workers", str(workers)),
                *("--output-prefix", str(folder / "tokens" / name), "--force"),
            ]
        )


def tokens_of(folder: Path, name: str) -> Path:
    """What Megatron's --data-path takes."""
    return folder / "tokens" / f"{name}_text_document"


def shorten(prefix: Path, most: int) -> None:
    """Cut a dataset behind the last document with which it has at most so many tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    data = IndexedDataset(str(prefix))
    kept = int(np.searchsorted(np.cumsum(data.sequence_lengths), most, side="right"))
    if kept == 0:
        raise UsageError(f"--max-tokens {most}: the first document has more")
    if kept < len(data):
        with atomic_write(_bin(prefix), _index(prefix)) as (bin_file, index_file):
            builder = IndexedDatasetBuilder(str(bin_file), dtype=data[0].dtype.type)
            for row in range(kept):
                builder.add_document(data[row], [len(data[row])])
            builder.finalize(str(index_file))


def pack(folder: Path) -> None:
    """All that training needs, in one compressed file."""
    names = sorted(
        f"tokens/{path.name}"
        for path in (folder / "tokens").iterdir()
        if path.suffix in (".bin", ".idx", ".vocab")
    )
    with atomic_write(folder / ARCHIVE) as (file,):
        words = ["tar", "-cf", str(file.absolute()), "-I", f"xz -T4 {XZ}", *names]
        _call(*words, folder=folder)


def _debian(folder: Path, name: str) -> Path:
    return next(folder.glob(f"{name}_*.deb"))


def _wheel(folder: Path, name: str) -> Path:
    return next(folder.glob(f"{name.replace('-', '_')}-*.whl"))


def _read_package(job: tuple[str, int, Path, list[str] | None], mandoc: Path) -> list[Document]:
    """The prose of files in random order, until there is enough."""
    source, limit, package, patterns = job
    if patterns is None:
        files = extract.wheel_files(package)
    else:
        files = extract.debian_files(package, patterns)
    name = re.split("[_-]" if patterns is None else "_", package.name)[0]
    paths = sorted(files)
    random.Random(SEED).shuffle(paths)
    chosen: list[Document] = []
    size = 0
    for path in paths:
        for part, text in extract.documents(path, files[path], mandoc):
            if size < limit and clean.is_prose(tidied := clean.tidy(text)):
                chosen.append(Document(source, f"{name}/{part}", tidied))
                size += len(tidied)
        if size >= limit:
            break
    return chosen


def _unpacked_mandoc(packages: Path, folder: Path) -> Path:
    for package in packages.glob("mandoc_*.deb"):
        _call("dpkg-deb", "-x", str(package.absolute()), ".", folder=folder)
    return folder / "usr" / "bin" / "mandoc"


def _call(*words: str, folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip()).split("\n")[-1]
        raise UsageError(f"{' '.join(words)}: {reason}")


def _describe(folder: Path, name: str, corpus: dict) -> dict:
    """Of a dataset: tokens, UTF-8 bytes that one stands for, documents and characters by source."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = tokens_of(folder, name)
    data = IndexedDataset(str(prefix))
    with open(folder / "text" / f"{name}.jsonl") as lines:
        documents = [json.loads(line) for line in itertools.islice(lines, len(data))]
    tokens = int(data.sequence_lengths.sum())
    size = sum(len(document["text"].encode()) for document in documents)
    found = {
        "documents": len(documents),
        "tokens": tokens,
        "bytes_per_token": round(size / tokens, 3),
        "sha256": _sha256(_bin(prefix)),
    }
    if name == "train":
        by_source = Counter[str]()
        for document, length in zip(documents, data.sequence_lengths):
            by_source[document["source"]] += int(length)
        found["tokens_by_source"] = {source: by_source[source] for source in sorted(corpus)}
    return found


def _bin(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def _index(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run_tool(main)
