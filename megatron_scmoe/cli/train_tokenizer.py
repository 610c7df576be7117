"""Train a SentencePiece tokenizer that Megatron takes as it is.

    scmoe train-tokenizer --input corpus/ --output-prefix tok/code

writes `tok/code.model` and `tok/code.vocab`, for
`--tokenizer-type SentencePieceTokenizer --tokenizer-model tok/code.model`.

Megatron's wrapper takes the end-of-document token from SentencePiece's `eos` and the padding
token from its `pad`, which SentencePiece leaves out unless told; so all four special pieces have
ids of their own here: unk 0, bos 1, eos 2 (= Megatron's `eod`), pad 3.

The tokenizer loses nothing: no normalisation, no dummy prefix, all white space kept, and bytes
as the last resort, so that decode(encode(text)) == text. (One exception is SentencePiece's own:
U+2581, which it writes for a space, comes back as one.) The same text and flags give the same
bytes.
"""

import io
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tqdm import tqdm

from megatron_scmoe.cli import program
from megatron_scmoe.cli.documents import (
    BadLines,
    Document,
    add_input_arguments,
    find_files,
    no_text,
    read_documents,
)
from megatron_scmoe.platform.command_line import (
    OneLineParser,
    UsageError,
    file_prefix,
    refuse_overwrite,
    staged_outputs,
)

MODEL_TYPES = ("bpe", "unigram")
SPECIAL_PIECES: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}
SMALLEST_VOCAB = len(SPECIAL_PIECES) + 256 + 1  # special pieces, one per byte, one of text
USUAL_VOCAB = 4096
# A longer line is learnt from in parts of so many characters: SentencePiece slows down with their
# length, and takes none beyond 1 GiB.
LONGEST_LINE = 1 << 16
SHORTEST_LIMIT = 10  # bytes; SentencePiece refuses to limit lines to less
# The number of threads is part of the result (unigram sums its counts per thread): fixed.
THREADS = 2


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Train a SentencePiece tokenizer for Megatron.")
    add_input_arguments(parser)
    parser.add_argument(
        "--output-prefix", type=file_prefix, required=True, metavar="PREFIX",
        help="writes PREFIX.model and PREFIX.vocab",
    )  # fmt: skip
    parser.add_argument(
        "--vocab-size", type=int, metavar="N",
        help=f"pieces, special and byte pieces included, {SMALLEST_VOCAB} or more "
        f"(default: {USUAL_VOCAB}, or as many as a small text has)",
    )  # fmt: skip
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="bpe", help="algorithm")
    parser.add_argument(
        "--character-coverage", type=float, default=0.9995, metavar="SHARE",
        help="share of the characters given pieces of their own; the rest are spelled in bytes",
    )  # fmt: skip
    parser.add_argument(
        "--max-characters", type=int, default=20_000_000, metavar="N",
        help="train on an even sample of the lines with about N characters; 0: on all",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="overwrite an existing tokenizer")
    args = parser.parse_args(argv)

    outputs = tokenizer_files(args.output_prefix)
    refuse_overwrite("--output-prefix", outputs, args.force)
    bad_lines = BadLines(skip=args.skip_bad_lines)
    documents = read_documents(find_files(args.input, args.suffix), args.json_key, bad_lines)
    started = time.perf_counter()
    size = train_tokenizer(
        tqdm(documents, desc="reading", unit=" documents", disable=None),
        args.output_prefix,
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        character_coverage=args.character_coverage,
        max_characters=args.max_characters,
        bad_lines=bad_lines,
    )
    if bad_lines.count:
        print(bad_lines.summary())
    print(
        f"wrote {outputs[0]} and {outputs[1].name}: {size} pieces, "
        f"{time.perf_counter() - started:.1f} s"
    )


def tokenizer_files(prefix: Path) -> list[Path]:
    """The two files of a tokenizer: the model, and its vocabulary for people to read."""
    return [Path(f"{prefix}.model"), Path(f"{prefix}.vocab")]


def train_tokenizer(
    documents: Iterable[Document],
    prefix: Path,
    *,
    vocab_size: int | None,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    max_characters: int = 0,
    bad_lines: BadLines | None = None,
) -> int:
    """Train on the lines of `documents`, write PREFIX.model and PREFIX.vocab, return the size.

    With `vocab_size` None it is the usual one, or the largest that the text has pieces for.
    `bad_lines` is what `read_documents` counts in, if it does. Raises UsageError when a value is
    out of range, there is no text, or the text has fewer (or needs more) pieces than `vocab_size`;
    nothing is written then.
    """
    if vocab_size is not None and vocab_size < SMALLEST_VOCAB:
        raise UsageError(
            f"--vocab-size {vocab_size}: too small; accepted is {SMALLEST_VOCAB} or more "
            "(special pieces and one piece per byte come first)"
        )
    if model_type not in MODEL_TYPES:
        raise UsageError(f"--model-type {model_type}: accepted are {', '.join(MODEL_TYPES)}")
    if not 0.0 < character_coverage <= 1.0:
        raise UsageError(f"--character-coverage {character_coverage}: accepted is 0 < SHARE <= 1")
    if max_characters < 0:
        raise UsageError(f"--max-characters {max_characters}: accepted is 0 (all) or more")

    with staged_outputs("--output-prefix", tokenizer_files(prefix)) as (model_file, vocab_file):
        lines = sample_lines(split_lines(documents), max_characters)
        if not lines:
            raise no_text(bad_lines)
        characters = sum(map(len, lines))
        print(
            f"training {model_type} on {len(lines):,} lines, {characters / 1e6:.1f} M characters",
            file=sys.stderr,
        )
        try:
            model = _train(lines, vocab_size or USUAL_VOCAB, model_type, character_coverage)
        except _VocabularyTooLarge as error:
            if vocab_size is not None:
                raise
            model = _train(lines, error.largest, model_type, character_coverage)
        model_file.write_bytes(model)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = range(processor.get_piece_size())
        vocab_file.write_text(
            "".join(f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in pieces),
            encoding="utf-8",
        )
    return len(pieces)


def split_lines(documents: Iterable[Document]) -> Iterator[str]:
    """The non-empty lines; a newline is a piece of its own, so none is learnt across lines."""
    for document in documents:
        for line in document.text.split("\n"):
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start : start + LONGEST_LINE]


def sample_lines(lines: Iterable[str], max_characters: int) -> list[str]:
    """Every n-th line, with the smallest n that keeps at most `max_characters` (0: all)."""
    kept = list(lines)
    total = sum(map(len, kept))
    if not max_characters or total <= max_characters:
        return kept
    return kept[:: -(-total // max_characters)]


class _VocabularyTooLarge(UsageError):
    def __init__(self, vocab_size: int, largest: int):
        super().__init__(
            f"--vocab-size {vocab_size}: too large for this text; accepted is {largest} or less"
        )
        self.largest = largest


def _train(lines: list[str], vocab_size: int, model_type: str, coverage: float) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # Indentation is most of a program's white space: runs of spaces become pieces.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=max(SHORTEST_LIMIT, *(len(line.encode()) + 1 for line in lines)),
            num_threads=THREADS,
            minloglevel=2,
            **SPECIAL_PIECES,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> UsageError:
    """SentencePiece's error, which names its own source lines, in terms of our flags."""
    if most := re.search(r"Vocabulary size too high \(\d+\).*<= (\d+)", message):
        return _VocabularyTooLarge(vocab_size, int(most[1]))
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UsageError(
            f"--vocab-size {vocab_size}: too small for this text; accepted is {least[1]} or more, "
            "or a smaller --character-coverage"
        )
    return UsageError(f"--input: SentencePiece cannot train on it ({' '.join(message.split())})")


if __name__ == "__main__":
    program.main(["train-tokenizer", *sys.argv[1:]])
