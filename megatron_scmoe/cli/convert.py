"""Convert checkpoints: Megatron to Hugging Face and back, dense to ScMoE, and look into them.

    scmoe convert megatron-to-hf --load checkpoints/ --output model/
    scmoe convert hf-to-megatron --input model/ --save checkpoints/
    scmoe convert upcycle --input llama/ --save checkpoints/ --num-experts 8 --topk 2
    scmoe convert inspect checkpoints/ --keys

It needs no GPU, and memory for the largest shard. A folder appears when it is complete. Rows that pad
Megatron's vocabulary are left out on the way to Hugging Face, and added on the way back; see
docs/checkpoints.md.
"""

import sys
from argparse import ArgumentTypeError, Namespace, _SubParsersAction
from dataclasses import fields
from pathlib import Path
from typing import get_args

from megatron_scmoe.cli import program
from megatron_scmoe.cli.process import quiet_imports
from megatron_scmoe.config import Combine, RouterNorm, Tap
from megatron_scmoe.platform.command_line import OneLineParser, positive


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Convert checkpoints, and look into them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    args = parser.parse_args(argv)
    quiet_imports()
    print("\n".join(args.run(args)))


def add_megatron_to_hf(commands: _SubParsersAction) -> None:
    from megatron_scmoe.checkpoints.formats.registry import NAMES

    parser = commands.add_parser("megatron-to-hf", help="write a model folder for transformers")
    parser.add_argument(
        "--load", type=Path, required=True, metavar="CKPT",
        help="what --save named in training, or an iter_ folder",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--format", choices=NAMES, default="scmoe", help="model_type to write")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE",
        help="of a safetensors file, and of the memory used",
    )  # fmt: skip
    parser.add_argument(
        "--keep-padding", action="store_true",
        help="write the rows too that pad Megatron's vocabulary and are no tokens",
    )  # fmt: skip
    add_shared(parser, "the checkpoint's")
    parser.set_defaults(run=run_megatron_to_hf)


def run_megatron_to_hf(args: Namespace) -> list[str]:
    from megatron_scmoe.checkpoints.convert import megatron_to_hf

    return megatron_to_hf(
        args.load,
        args.output,
        model_type=args.format,
        dtype=dtype(args),
        max_shard_size=args.max_shard_size,
        tokenizer=args.tokenizer,
        keep_padding=args.keep_padding,
        force=args.force,
    )


def add_hf_to_megatron(commands: _SubParsersAction) -> None:
    parser = commands.add_parser("hf-to-megatron", help="write a checkpoint for --load")
    parser.add_argument(
        "--input", type=Path, required=True, metavar="DIR",
        help="model folder; its config.json says what it is",
    )  # fmt: skip
    add_save(parser)
    add_shared(parser, "the folder's")
    parser.set_defaults(run=run_hf_to_megatron)


def run_hf_to_megatron(args: Namespace) -> list[str]:
    from megatron_scmoe.checkpoints.convert import hf_to_megatron

    return hf_to_megatron(
        args.input,
        args.save,
        dtype=dtype(args),
        tokenizer=args.tokenizer,
        padding=padding(args),
        force=args.force,
    )


def add_upcycle(commands: _SubParsersAction) -> None:
    from megatron_scmoe.checkpoints.upcycle_settings import INITS, Upcycling

    parser = commands.add_parser("upcycle", help="make a ScMoE checkpoint of a dense or MoE model")
    parser.add_argument(
        "--input", type=Path, required=True, metavar="DIR_OR_CKPT",
        help="folder of a Llama, Mistral, Qwen2, Qwen3 or GPT-2 model, or a stock Megatron checkpoint",
    )  # fmt: skip
    add_save(parser)
    parser.add_argument(
        "--num-experts", type=int, metavar="N", help="routed experts of a MoE block"
    )
    parser.add_argument("--topk", type=int, metavar="K", help="routed experts a token goes to")
    parser.add_argument(
        "--expert-ffn", type=int, metavar="F",
        help="intermediate size of a routed expert, a slice of the dense MLP (default: all of it)",
    )  # fmt: skip
    parser.add_argument(
        "--init", choices=INITS, default="copy",
        help="up-projections of the routed experts: the dense MLP's; with a random part drawn anew; "
        "with noise. Each keeps the logits while --routed-scale is 0",
    )  # fmt: skip
    parser.add_argument("--tap", choices=get_args(Tap), default="pos2", help="--scmoe-tap")
    parser.add_argument(
        "--combine", choices=get_args(Combine),
        help="--scmoe-combine (default: cg1; of a stock MoE model, what it has)",
    )  # fmt: skip
    parser.add_argument(
        "--router-norm", choices=get_args(RouterNorm), default="own", help="--scmoe-router-norm"
    )
    parser.add_argument(
        "--every-block", action="store_true", help="MoE in every block, not every second; tap pos1"
    )
    floats = {
        "--drop-ratio": "of --init drop: part of the intermediate dimensions drawn anew",
        "--noise-scale": "of --init noise: its deviation, in deviations of the weights",
        "--routed-scale": "on the routed experts' down-projections; above 0 the logits change",
    }
    for flag, meaning in floats.items():
        default = getattr(Upcycling, flag[2:].replace("-", "_"))
        parser.add_argument(flag, type=float, default=default, metavar="X", help=meaning)
    parser.add_argument(
        "--seed", type=count, default=Upcycling.seed, metavar="N", help="of the inits"
    )
    add_shared(parser, "the source's")
    parser.set_defaults(run=run_upcycle)


def run_upcycle(args: Namespace) -> list[str]:
    from megatron_scmoe.checkpoints.upcycle import upcycle
    from megatron_scmoe.checkpoints.upcycle_settings import Upcycling

    args.dtype, args.padding = dtype(args), padding(args)
    how = {field.name: getattr(args, field.name) for field in fields(Upcycling)}
    return upcycle(args.input, args.save, Upcycling(**how), args.force)


def add_inspect(commands: _SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="say what a checkpoint or a model folder is")
    parser.add_argument("path", type=Path, metavar="CKPT_OR_DIR", help="what is looked into")
    parser.add_argument("--keys", action="store_true", help="list every tensor")
    parser.add_argument(
        "--verify", action="store_true",
        help="read all of a Megatron checkpoint, and compare its tensors with their checksums",
    )  # fmt: skip
    parser.set_defaults(run=run_inspect)


def run_inspect(args: Namespace) -> list[str]:
    from megatron_scmoe.checkpoints.inspect import describe

    return describe(args.path, args.keys, args.verify)


def add_save(parser: OneLineParser) -> None:
    """Flags of all that write a Megatron checkpoint; :func:`padding` reads those of the vocabulary."""
    parser.add_argument("--save", type=Path, required=True, metavar="CKPT", help="folder to make")
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=positive, metavar="N",
        help="pad the vocabulary with rows of zeros to a multiple of it (default: 128, Megatron's)",
    )  # fmt: skip
    parser.add_argument(
        "--target-tensor-parallel", type=positive, metavar="N",
        help="the largest --tensor-model-parallel-size that will load it, which multiplies that "
        "(default: 1)",
    )  # fmt: skip


def padding(args: Namespace):
    """What the flags say of the vocabulary's rows; None if they were not given."""
    from megatron_scmoe.checkpoints.vocabulary import Padding

    given = (args.make_vocab_size_divisible_by, args.target_tensor_parallel)
    if given == (None, None):
        return None
    return Padding(given[0] or Padding.multiple, given[1] or Padding.tensor_parallel)


def add_shared(parser: OneLineParser, whose: str) -> None:
    """Flags of all that write; ``whose`` tokenizer --tokenizer replaces."""
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="cast the weights (default: as they are)"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH",
        help=f"SentencePiece model or folder instead of {whose} tokenizer; none: leave it out",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")


def dtype(args: Namespace):
    """The torch.dtype of --dtype; None if it was not given."""
    from megatron_scmoe.checkpoints.model_arguments import DTYPES

    return DTYPES[args.dtype] if args.dtype else None


COMMANDS = [add_megatron_to_hf, add_hf_to_megatron, add_upcycle, add_inspect]
"""What adds each subcommand's parser; it sets ``run`` to a function from arguments to lines."""


def count(text: str) -> int:
    """The value of a flag that is 0 or more."""
    if not text.isdigit():
        raise ArgumentTypeError(f"{text}: accepted: 0 or more")
    return int(text)


if __name__ == "__main__":
    program.main(["convert", *sys.argv[1:]])
