"""Checkpoints of small models that read and write text, with a tokenizer."""

from pathlib import Path

from tests import checkpoints
from tests.harness import run_distributed
from tests.tools import REPOSITORY, run_tool

VOCAB, ROWS = 360, 384
"""Tokens of the tokenizer, and rows of the embedding, as Megatron pads them."""

LENGTH = 48
"""The longest text, in tokens."""

PROMPTS = ["The tap", "A", "Each block is Megatron's own", "overlap and", "two rails"]
"""Texts of unequal length."""

LEARNED, TAPS_INPUT = "GPT-2", "pos3, shared norm, CG-2"
"""Kinds of models; the first has learned positions."""


def train_tokenizer(folder: Path) -> Path:
    """A SentencePiece tokenizer in a folder."""
    run_tool(
        "train_tokenizer",
        *("--input", REPOSITORY / "docs" / "architecture.md", "--vocab-size", VOCAB),
        *("--output-prefix", folder / "small"),
    )
    return folder / "small.model"


def save(folder: Path, tokenizer: Path, *variants: str) -> None:
    """Save a model with random weights of each variant, in a folder of its name."""
    run_distributed(_save, 1, str(folder), str(tokenizer), variants)


def _save(folder: str, tokenizer: str, variants: tuple[str, ...]) -> None:
    checkpoints.models.init_parallel()
    sizes = ["--vocab-size", str(VOCAB), "--max-position-embeddings", str(LENGTH)]
    for variant in variants:
        args = checkpoints.arguments(variant, *sizes)
        args.tokenizer_type, args.tokenizer_model = "SentencePieceTokenizer", tokenizer
        args.vocab_size, args.padded_vocab_size = VOCAB, ROWS
        checkpoints.save(args, Path(folder, variant))
