"""The tokenizer that goes with a model: from Megatron's arguments to a Hugging Face folder and back."""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from megatron.core.tokenizers.utils.build_tokenizer import SP_TOKENIZERS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Model, Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

from megatron_scmoe.errors import ConversionError

NONE = "none"
"""What ``--tokenizer`` takes to leave the tokenizer out."""

SENTENCEPIECE_FILE = "tokenizer.model"

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x, *args):\n    if x > 10_000:\n\t\treturn {'a': [x ** 2, -1.5e-3]}\n\n\n",
    "  two spaces   three    four, and at the end  ",
    "Größe, naïve café, Ελληνικά, русский, 中文字符, 日本語, العربية, हिन्दी",
    "emoji 🙂🚀, symbols ∑∞≠, a zero-width\u200bspace, combining e\u0301, ﬁ ligature",
    "0123456789 3.14159 https://example.org/path?query=1#part user@example.org",
    "CamelCase snake_case UPPER lower MiXeD ... !!! ??? ((())) [[]] <>",
    "",
    " ",
    "\n",
)
"""Texts on which a converted tokenizer must give SentencePiece's ids."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer that can be written to a folder.

    ``tokens`` counts its ids, None if that is not known; the others are ids or None.
    """

    description: str
    tokens: int | None
    save: Callable[[Path], None]
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def find_tokenizer(args: argparse.Namespace, given: str | None = None) -> TokenizerFiles:
    """The tokenizer that Megatron's arguments name.

    Args:
        args: the arguments in a checkpoint.
        given: what ``--tokenizer`` says instead: a SentencePiece model, a folder with a tokenizer of
            Hugging Face, or "none".

    Raises:
        ConversionError: if it is not there or cannot be converted.
    """
    kind, named = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    if given == NONE or (given is None and kind in (None, "NullTokenizer")):
        reason = "--tokenizer none" if given else f"the checkpoint's is {kind}"
        return TokenizerFiles(
            f"no tokenizer ({reason})", getattr(args, "vocab_size", None), lambda folder: None
        )
    if given is None and kind not in (*SP_TOKENIZERS, "HuggingFaceTokenizer"):
        raise ConversionError(
            f"--tokenizer-type {kind}: it cannot be converted; give --tokenizer PATH or none"
        )
    if given is None and not named:
        raise ConversionError(
            f"the checkpoint's {kind} names no file; accepted: --tokenizer PATH or none"
        )
    path = Path(str(named) if given is None else given).expanduser()
    if path.is_dir():
        return _hugging_face(path)
    if not path.is_file():
        raise ConversionError(f"tokenizer {path}: no such file; give --tokenizer PATH or none")
    return _sentencepiece(path)


def tokenizer_flags(
    folder: Path, rows: int, sentencepiece_first: bool = True, given: str | None = None
) -> tuple[list[str], int | None]:
    """Megatron's flags for the tokenizer in a Hugging Face folder; its NullTokenizer if it has none.

    Args:
        rows: of the embedding in the folder.
        sentencepiece_first: take SentencePiece's own file where there is one beside the others,
            unless they have tokens that it has not.
        given: what ``--tokenizer`` says instead: a SentencePiece model, a folder, or "none".

    Returns:
        The flags, without ``--vocab-size``, and how many entries the tokenizer has, if there is one.

    Raises:
        ConversionError: if it cannot be loaded, or has more entries than the embedding has rows.
    """
    path = Path(folder if given is None else given).expanduser().resolve()
    if given == NONE:
        return ["--tokenizer-type", "NullTokenizer"], None
    if path.is_dir() and sentencepiece_first and _is_whole(path / SENTENCEPIECE_FILE):
        path = path / SENTENCEPIECE_FILE
    entries: int | None
    if path.is_file():
        kind, entries = "SentencePieceTokenizer", _load(path).get_piece_size()
    elif has_tokenizer(path):
        kind, entries = "HuggingFaceTokenizer", _hugging_face(path).tokens
    elif given is not None:
        raise ConversionError(f"--tokenizer {given}: no tokenizer is there; accepted: PATH or none")
    else:
        return ["--tokenizer-type", "NullTokenizer"], None
    if entries is not None and entries > rows:
        raise ConversionError(
            f"{path}: its tokenizer has {entries} entries, the embedding {rows} rows; accepted: "
            "--tokenizer PATH of another one, or --tokenizer none"
        )
    return ["--tokenizer-type", kind, "--tokenizer-model", str(path)], entries


def _is_whole(model: Path) -> bool:
    """Whether SentencePiece's file is there and has all tokens of transformers' files beside it.

    Transformers adds tokens to its own files alone.
    """
    if not model.is_file():
        return False
    if not any((model.parent / name).is_file() for name in ("tokenizer.json", "added_tokens.json")):
        return True
    tokens = _hugging_face(model.parent).tokens
    return tokens is None or tokens <= _load(model).get_piece_size()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of Hugging Face."""
    return any((folder / name).is_file() for name in _FILES)


_FILES = ("tokenizer.json", SENTENCEPIECE_FILE, "vocab.json", "tokenizer_config.json")


def fast_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """A SentencePiece model, unigram or BPE, as a fast tokenizer of transformers.

    Raises:
        ConversionError: if it is none, or the fast tokenizer gives other ids for :data:`SAMPLES`.
    """
    processor = _load(model)
    proto = SentencePieceExtractor(str(model)).proto
    backend = _backend(proto)
    special = {}
    for name in ("unk", "bos", "eos", "pad"):
        index = getattr(processor, f"{name}_id")()
        if index >= 0:
            special[f"{name}_token"] = processor.id_to_piece(index)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special
    )
    for text in SAMPLES:
        if fast.encode(text, add_special_tokens=False) != processor.encode(text):
            raise ConversionError(
                f"{model}: transformers' fast tokenizer gives other ids for {text!r}; "
                "--tokenizer none leaves it out"
            )
    return fast


def generation_config(tokenizer: TokenizerFiles) -> str:
    """``generation_config.json``: the special tokens."""
    fields = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(given, indent=2) + "\n"


def _sentencepiece(path: Path) -> TokenizerFiles:
    fast = fast_tokenizer(path)

    def save(folder: Path) -> None:
        _save(fast, folder)
        shutil.copyfile(path, folder / SENTENCEPIECE_FILE)

    return _files(f"a fast tokenizer made of SentencePiece's {path.name}", fast, save)


def _hugging_face(path: Path) -> TokenizerFiles:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its library may raise anything
        line = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConversionError(f"tokenizer {path}: it cannot be loaded ({line})") from error
    return _files(type(tokenizer).__name__, tokenizer, lambda folder: _save(tokenizer, folder))


def _save(tokenizer, folder: Path) -> None:
    """Write it so that stock classes of transformers 4 and 5 load it, without code of its own.

    It was loaded without that code. Transformers 4 does not know version 5's TokenizersBackend.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("auto_map", None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2) + "\n")


def _files(description: str, tokenizer, save) -> TokenizerFiles:
    return TokenizerFiles(
        description,
        1 + max(tokenizer.get_vocab().values(), default=-1),  # not all ids up to it need exist
        save,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def _load(model: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise ConversionError(f"tokenizer {model}: not a SentencePiece model") from error


def _backend(proto) -> Tokenizer:
    """The steps of SentencePiece: normalise, mark spaces, split into pieces, bytes as last resort."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = type(proto.pieces[0])
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        model: Model = Unigram(pieces, trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        vocab = {name: i for i, (name, _) in enumerate(pieces)}
        never_merged = [piece.piece for piece in proto.pieces if piece.type != kinds.NORMAL]
        model = BPE(
            vocab,
            generate_merges(vocab, pieces, never_merged),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        raise ConversionError("tokenizer: SentencePiece's models 'unigram' and 'bpe' are accepted")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(normalizer)
    tokenizer.decoder = _decoder(normalizer)
    tokenizer.add_tokens(
        [  # symbols hold marked spaces, so they are looked for in normalised text
            AddedToken(piece.piece, normalized=piece.type != kinds.CONTROL)
            for piece in proto.pieces
            if piece.type in (kinds.CONTROL, kinds.USER_DEFINED)
        ]
    )
    tokenizer.add_special_tokens(
        [piece.piece for piece in proto.pieces if piece.type == kinds.CONTROL]
    )
    return tokenizer


def _normalizer(spec) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)


def _decoder(spec) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
