"""The corpus of the study of quality: from packages to tokens, without a network."""

import gzip
import json
import lzma
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest

from studies.quality import clean, data, extract, run
from studies.quality.clean import Document

PROSE = (
    "The river that runs by the town is the reason for the mill, and the mill is the reason for "
    "the town. When the water is low it must be still, and those who work there have to wait. "
)


def prose(*numbers: int) -> str:
    """Paragraphs that differ from each other in their words."""
    words = "oak ash elm yew fir box may bay fig nut hop rye oat flax hemp reed".split()
    return "\n\n".join(
        f"{PROSE} It is the {words[n]} of {words[-n]} that is there." for n in numbers
    )


def test_html_keeps_paragraphs_and_code_and_leaves_out_menus():
    page = (
        b"<!-- a --><html><head><title>t</title></head><body><nav>menu</nav><p>One\n <b>two</b> "
        b"three.<script>x</script></p><pre>a\n  b</pre></body></html><!-- b -->"
    )
    assert clean.tidy(extract.html_text(page)) == "One two three.\n\na\n  b"


def test_docstrings_are_all_that_is_taken_of_code():
    long = "Multiply the matrix by the vector, as often as it takes for the sum not to change any more."
    source = f'def f():\n    """{long}"""\n    return "{long}"\n\ndef g():\n    """Short."""\n'
    assert extract.docstrings(source.encode()) == long
    assert extract.docstrings(b"print 'Python 2'") == ""


def test_a_dictionary_falls_into_whole_entries():
    entries = [f"word{n}\n   {'meaning ' * 100}" for n in range(12)]
    documents = list(extract.dictionary_documents("d", "\n".join(entries)))
    assert len(documents) == 3
    assert all(text.startswith("word") for _, text in documents)
    assert "\n".join(text for _, text in documents) == "\n".join(entries)


def test_prose_is_english_and_mostly_letters():
    assert clean.is_prose(prose(1))
    assert not clean.is_prose("Die Mühle am Fluss ist der Grund, warum es die Stadt gibt. " * 10)
    assert not clean.is_prose("1 + 2 = 3; the of and to in 4711 | " * 20)
    assert not clean.is_prose(PROSE[:100])


def test_a_paragraph_is_kept_once_whatever_its_numbers_and_letter_case():
    first = Document("a", "first", prose(1, 2, 3))
    second = Document("a", "second", f"{prose(4, 5)}\n\n{prose(1).upper()} 1999")
    third = Document("b", "third", f"{prose(2, 3)}\n\n{prose(6)}")
    kept = clean.deduplicate([first, second, third])
    assert [document.text for document in kept] == [prose(1, 2, 3), prose(4, 5)]


def test_held_out_documents_are_of_every_source_and_not_trained_on():
    documents = [Document("ab"[n % 2], f"{n}", "x" * 100) for n in range(20)]
    train, held_out = clean.split(clean.shuffled(documents, seed=1), held_out=250)
    assert {source: len(found) for source, found in held_out.items()} == {"a": 3, "b": 3}
    assert sorted(train + held_out["a"] + held_out["b"], key=lambda d: int(d.name)) == documents


def test_the_order_of_documents_depends_on_the_seed_alone():
    documents = [Document("a", f"{n}", "") for n in range(20)]
    once, again = clean.shuffled(documents, 1), clean.shuffled(documents[::-1], 1)
    assert once == again != clean.shuffled(documents, 2)


@pytest.fixture
def built(tmp_path):
    """The data of a corpus of one Debian package and one wheel."""
    package = tmp_path / "package"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "DEBIAN" / "control").write_text(
        "Package: mill-doc\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    doc = package / "usr" / "share" / "doc" / "mill"
    doc.mkdir(parents=True)
    for number in range(1, 13):
        body = prose(number).replace("\n\n", "</p><p>")
        (doc / f"{number}.html").write_text(f"<html><body><p>{body}</p></body></html>")
    (doc / "more.txt.gz").write_bytes(gzip.compress(prose(13, 14).encode()))
    (doc / "other.css").write_text(prose(15))
    packages = tmp_path / "out" / "packages"
    packages.mkdir(parents=True)
    subprocess.run(
        ["dpkg-deb", "--build", package, packages / "mill-doc_1_all.deb"],
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(packages / "oats-1-py3-none-any.whl", "w") as wheel:
        for number in range(6):
            text = prose(number).replace("mill", f"field{'abcdef'[number]}")
            wheel.writestr(f"oats/m{number}.py", f'"""{text}"""\n')
        wheel.writestr("oats/tests/m.py", f'"""{prose(7)}"""\n')
    corpus = tmp_path / "corpus.toml"
    corpus.write_text(
        '[books]\nat_most = 1\n[books.debian]\nmill-doc = ["doc/mill/*.html", "doc/mill/*.txt*"]\n'
        '[python]\nat_most = 1\n[python.pypi]\noats = "1"\n'
    )
    words = f"{tmp_path / 'out'} --corpus {corpus} --manifest {tmp_path / 'm.json'} --workers 1"
    data.main([*words.split(), *"--vocab-size 300 --max-tokens 1500 --held-out 300".split()])
    return tmp_path


def test_packages_become_tokens_that_megatron_reads(built):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = json.loads((built / "m.json").read_text())
    assert set(manifest["packages"]) == {"mill-doc_1_all.deb", "oats-1-py3-none-any.whl"}
    assert set(manifest["held_out"]) == {"books", "python"}
    with (
        lzma.open(built / "out" / data.ARCHIVE) as stream,
        tarfile.open(fileobj=stream) as archive,
    ):
        archive.extractall(built / "unpacked", filter="data")
    found = IndexedDataset(str(built / "unpacked" / "tokens" / "train_text_document"))
    assert int(np.sum(found.sequence_lengths)) == manifest["train"]["tokens"] <= 1500
    assert len(found) == manifest["train"]["documents"] > 0
    assert sum(manifest["train"]["tokens_by_source"].values()) == manifest["train"]["tokens"]
    assert found[0].dtype == np.uint16
    assert found[0][-1] == 2  # the end of the document


@pytest.mark.slow
def test_a_model_is_trained_on_them_and_evaluated_by_source(built):
    """Four steps of ScMoE on a CPU, in a process of its own."""
    tokens = built / "out" / "tokens"
    words = f"--tokens {tokens} --arms pos2 --size tiny --train-tokens 1000 --gpus 0"
    run.main([*words.split(), "--out", str(built / "results")])
    (file,) = (built / "results").iterdir()
    result = json.loads(file.read_text())
    held_out = json.loads((built / "m.json").read_text())["held_out"]
    assert {name: found["tokens"] + 1 for name, found in result["validation"].items()} == {
        name: source["tokens"] for name, source in held_out.items()
    }
    losses = [found["loss"] for found in result["validation"].values()]
    assert all(7 < loss < 9.5 for loss in losses), losses  # log 8192 is 9.0
    assert result["parameters"] == result["total_parameters"] + result["embedding_parameters"]
    assert result["routers"]["1"]["experts_per_token"] == 1
    assert 0 < result["gates"]["1"][0] < 1
    assert result["guesses"]["all"]["tokens"] > result["guesses"]["repeated"]["tokens"] > 0
    assert sorted(path.name for path in tokens.iterdir() if path.is_dir()) == []
