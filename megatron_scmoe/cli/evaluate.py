"""Loss and perplexity of a checkpoint on a text, and its logits.

    scmoe evaluate --load checkpoints/ --text held-out.txt
    torchrun --standalone --nproc-per-node 2 -m megatron_scmoe.cli evaluate --load checkpoints/ \
        --text held-out.txt --expert-model-parallel-size 2
    scmoe evaluate --hf model/ --tokens ids.npy --logits-out logits.npy

takes a Megatron checkpoint (torch_dist) of a ScMoE or a stock GPT, saved at any layout and loaded at
any, or a Hugging Face folder. A text, or a one-dimensional array of ids, is cut into sequences, and
each token predicts the next; a last sequence that is short is filled up with id 0, whose logits are
written but which is no part of the loss. A two-dimensional array is taken as its rows, the last token
of each predicting nothing. Rows that pad Megatron's vocabulary are no tokens: the loss leaves them out
of the softmax, and the logits, float32 [sequences, length, tokens], are without them. The loss that
training logs has them in it; where there are any, a second line gives that one.
"""

import io
import os
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np

from megatron_scmoe.cli import program
from megatron_scmoe.cli.documents import BYTE_ORDER_MARK, BadLine, decode
from megatron_scmoe.cli.model_flags import LAYOUT, add_checkpoint_flags, layout
from megatron_scmoe.cli.process import initialise_ranks, quiet_imports
from megatron_scmoe.platform.command_line import (
    OneLineParser,
    UsageError,
    check_input,
    check_output,
    is_first_rank,
    refuse_overwrite,
    refuse_same,
)

DEFAULT_HF_LENGTH = 1024


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Loss, perplexity and logits of a checkpoint.")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--load", metavar="CKPT", help="a Megatron checkpoint: what was --save, or an iter_ folder"
    )
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face model folder")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--text", type=Path, metavar="FILE", help="text in UTF-8")
    data.add_argument("--tokens", type=Path, metavar="FILE", help=".npy of ids, [n] or [n, length]")
    parser.add_argument(
        "--logits-out", type=Path, metavar="FILE", help="write the logits to this .npy file"
    )
    parser.add_argument("--force", action="store_true", help="overwrite --logits-out")
    parser.add_argument(
        "--sequence-length", type=int, metavar="N",
        help="tokens in a sequence (default: --seq-length of training; with --hf "
        f"{DEFAULT_HF_LENGTH}, or what the model can)",
    )  # fmt: skip
    parser.add_argument("--micro-batch", type=int, default=1, metavar="N", help="sequences at once")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="evaluate the first N sequences only"
    )
    add_checkpoint_flags(parser)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code in the folder of --hf"
    )
    args = parser.parse_args(argv)
    check_flags(args, parser)

    quiet_imports()
    check_kind(args)
    report = evaluate_hf(args) if args.hf else evaluate_checkpoint(args)
    if is_first_rank():
        print(describe(report))


def check_flags(args: Namespace, parser: OneLineParser) -> None:
    """Refuse what cannot work before seconds go into imports."""
    for name in ("sequence_length", "micro_batch", "limit", *LAYOUT):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: accepted is 1 or more")
    of_load = ("tokenizer_model", "ckpt_step", *LAYOUT)
    of_hf = ("trust_remote_code",)
    for name in of_load if args.hf else of_hf:
        if getattr(args, name) != parser.get_default(name):
            raise UsageError(
                f"--{name.replace('_', '-')}: it goes with {'--load' if args.hf else '--hf'} only"
            )
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.hf and ranks > 1:
        raise UsageError(
            f"--hf under torchrun with {ranks} ranks: transformers' model runs in one process"
        )
    for flag, path in (("--text", args.text), ("--tokens", args.tokens)):
        if path is not None:
            check_input(flag, path)
    if args.logits_out is not None:
        check_output("--logits-out", args.logits_out, [".npy"])
        refuse_overwrite("--logits-out", [args.logits_out], args.force)
        refuse_same("--logits-out", args.logits_out, args.text or args.tokens)
    if args.text is not None and args.text.suffix.lower() in (".jsonl", ".ndjson"):
        raise UsageError(
            f"--text {args.text}: JSON lines, whose braces and names would count as text; accepted is "
            "a file of the text alone"
        )


def check_kind(args: Namespace) -> None:
    """Refuse a folder of the other flag. Imports Megatron."""
    from megatron_scmoe.checkpoints.identify import HUGGING_FACE, MEGATRON, what_is

    flag, other, kind, given = "--load", "--hf", HUGGING_FACE, args.load
    if args.hf:
        flag, other, kind, given = "--hf", "--load", MEGATRON, args.hf
    if what_is(Path(given)) == kind:
        raise UsageError(f"{flag} {given}: it is {kind}; accepted: {other} {given}")


def evaluate_checkpoint(args: Namespace):
    """Evaluate what --load names; on every rank."""
    import torch

    from megatron_scmoe.checkpoints.model_arguments import DTYPES
    from megatron_scmoe.checkpoints.vocabulary import count_tokens
    from megatron_scmoe.evaluation import perplexity
    from megatron_scmoe.training import load_model

    checkpoint = load_model.Checkpoint(args.load, args.ckpt_step)
    kind = checkpoint.args.tokenizer_type
    if args.text is not None and kind == load_model.NULL_TOKENIZER and args.tokenizer_model is None:
        raise UsageError(
            f"--text {args.text}: the checkpoint's tokenizer is {kind}, which reads ids only; "
            "accepted: --tokens FILE, or --tokenizer-model MODEL with --text"
        )
    rows, vocab_size = checkpoint.args.padded_vocab_size, checkpoint.args.vocab_size
    if vocab_size is None or args.text is not None or args.tokenizer_model is not None:
        tokenizer = load_model.tokenizer_of(checkpoint, args.tokenizer_model)
        vocab_size = count_tokens(rows, vocab_size, tokenizer.vocab_size)
    sequences = read_sequences(
        args,
        lambda text: np.array(tokenizer.tokenize(text), dtype=np.int64),
        args.sequence_length or checkpoint.args.seq_length,
    )
    sequences.check(data_flag(args), vocab_size)
    ranks = layout(args)
    checkpoint.check_length(sequences.tokens.shape[1], ranks)
    is_mine = initialise_ranks()
    dtype = DTYPES[args.dtype] if args.dtype else None
    model = load_model.build_model(checkpoint, ranks, dtype)
    report = perplexity.evaluate(model, sequences, vocab_size, args.micro_batch, args.logits_out)
    if is_mine:
        torch.distributed.destroy_process_group()
    return report


def evaluate_hf(args: Namespace):
    """Evaluate what --hf names."""
    from megatron_scmoe.checkpoints.model_arguments import DTYPES
    from megatron_scmoe.evaluation.hugging_face import HuggingFaceModel

    model = HuggingFaceModel(args.hf, args.trust_remote_code)
    length = args.sequence_length or min(DEFAULT_HF_LENGTH, model.max_length)
    sequences = read_sequences(args, model.tokenize, length)
    sequences.check(data_flag(args), model.vocab_size)
    model.check_length(sequences.tokens.shape[1])
    dtype = DTYPES[args.dtype] if args.dtype else None
    return model.evaluate(sequences, args.micro_batch, args.logits_out, dtype)


def read_sequences(args: Namespace, tokenize, length: int):
    """The sequences of --text or --tokens, cut to --limit."""
    from megatron_scmoe.errors import in_words
    from megatron_scmoe.evaluation.sequences import Sequences

    if args.text is not None:
        try:
            text = decode(args.text.read_bytes().removeprefix(BYTE_ORDER_MARK))
        except BadLine as bad:
            reason, accepted = bad.args
            raise UsageError(f"--text {args.text}: {reason}; accepted is {accepted}") from bad
        ids = tokenize(text)
    else:
        try:
            pipe = io.BytesIO(args.tokens.read_bytes()) if args.tokens.is_fifo() else None
            ids = np.load(pipe or args.tokens, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UsageError(
                f"--tokens {args.tokens}: it is no .npy file of ids ({in_words(error)})"
            ) from error
        if not isinstance(ids, np.ndarray):
            raise UsageError(
                f"--tokens {args.tokens}: it is an archive of arrays; accepted is a .npy file of ids"
            )
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
            raise UsageError(
                f"--tokens {args.tokens}: it is {ids.dtype} with {ids.ndim} dimensions; accepted "
                "are integers, [n] or [n, length]"
            )
    sequences: Sequences | None
    if ids.ndim == 2:
        if args.sequence_length not in (None, ids.shape[1]):
            raise UsageError(
                f"--sequence-length {args.sequence_length}: the rows of {args.tokens} have "
                f"{ids.shape[1]} ids"
            )
        sequences = Sequences.from_rows(ids)
    else:
        length = min(length, max(ids.size, 1))  # a row is not filled up
        sequences = Sequences.from_stream(ids, length) if ids.size > 1 else None
    if sequences is None or ids.shape[-1] < 2 or not ids.size:
        raise UsageError(
            f"{data_flag(args)}: it has fewer than two tokens in a sequence; there is no loss"
        )
    return sequences.first(args.limit) if args.limit else sequences


def data_flag(args: Namespace) -> str:
    return f"--text {args.text}" if args.text else f"--tokens {args.tokens}"


def describe(report) -> str:
    text = (
        f"loss {report.loss:.6f} nats per token, perplexity {report.perplexity:.4f} "
        f"({report.tokens:,} tokens in {report.sequences:,} sequences)"
    )
    if report.padded_loss is not None:
        text += (
            f"\nloss {report.padded_loss:.6f} with the rows that pad the vocabulary in the softmax, "
            "as training logs it"
        )
    return text


if __name__ == "__main__":
    program.main(["evaluate", *sys.argv[1:]])
