"""Deduplicate, filter, shuffle and split documents."""

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

SHORTEST = 200
"""Characters of a document; shorter ones are left out."""

MOST_LOST = 0.5
"""A document that has lost more of its text as repeated is left out."""

LONGEST_HELD_OUT = 60_000
"""Characters of a held-out document: one long document would be a source by itself."""

LEAST_COMMON = 0.08
"""Share of a document's words that are among COMMON; less is a table, code or another language."""

COMMON = frozenset(
    "a an and are as at be by can for from has have if in is it its may must not of on or that the "
    "their there this to was when which will with you your".split()
)


@dataclass(frozen=True)
class Document:
    """A text, where it comes from, and the source that it is reported under."""

    source: str
    name: str
    text: str


def tidy(text: str) -> str:
    """No trailing or repeated blank space, no characters that print nothing."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u00ad\u200b\ufeff]", "", text.replace("\r\n", "\n"))
    text = re.sub(r"[ \t\u00a0]+\n", "\n", text.replace("\u00a0", " "))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_prose(text: str) -> bool:
    """Whether a text is long enough, mostly letters, and English by its commonest words."""
    words = re.findall(r"[A-Za-z']+", text.lower())
    if len(text) < SHORTEST or sum(map(len, words)) < len(text) / 2:
        return False
    return sum(word in COMMON for word in words) >= LEAST_COMMON * len(words)


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """Each paragraph once in the whole corpus, numbers and letter case left aside.

    The first document with a paragraph keeps it. Documents that lose more than ``MOST_LOST`` of their
    text are left out.
    """
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        paragraphs = document.text.split("\n\n")
        own = []
        for paragraph in paragraphs:
            mark = _mark(paragraph)
            if mark not in seen:
                own.append(paragraph)
                if mark:
                    seen.add(mark)
        text = tidy("\n\n".join(own))
        if len(text) >= max(SHORTEST, MOST_LOST * len(document.text)):
            kept.append(Document(document.source, document.name, text))
    return kept


def shuffled(documents: list[Document], seed: int) -> list[Document]:
    """The documents in an order that depends on their names and the seed alone."""
    ordered = sorted(documents, key=lambda document: (document.source, document.name))
    random.Random(seed).shuffle(ordered)
    return ordered


def split(
    documents: list[Document], held_out: int
) -> tuple[list[Document], dict[str, list[Document]]]:
    """Training documents, and the first of each source with about ``held_out`` characters."""
    train: list[Document] = []
    taken: dict[str, list[Document]] = {document.source: [] for document in documents}
    sizes = dict.fromkeys(taken, 0)
    for document in documents:
        is_short = len(document.text) <= LONGEST_HELD_OUT
        if is_short and sizes[document.source] < held_out:
            taken[document.source].append(document)
            sizes[document.source] += len(document.text)
        else:
            train.append(document)
    return train, {source: taken[source] for source in sorted(taken)}


def _mark(paragraph: str) -> bytes:
    """The same for paragraphs that differ in numbers, case and signs; empty for very short ones."""
    letters = re.sub(r"[^a-z]+", " ", paragraph.lower()).strip()
    return hashlib.blake2b(letters.encode(), digest_size=12).digest() if len(letters) > 40 else b""
