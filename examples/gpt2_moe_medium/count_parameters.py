"""Print how many parameters the example's model has, in all and active for a token.

    python examples/gpt2_moe_medium/count_parameters.py
    NUM_EXPERTS=16 python examples/gpt2_moe_medium/count_parameters.py

The model is built from the flags in config.sh, with GPT-2's vocabulary, on one rank; nothing is
initialised, so it takes hardly any memory, and no GPU.
"""

import contextlib
import io
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent
sys.path.insert(0, str(EXAMPLE.parents[1]))  # the repository, where the package is not installed

VOCABULARY = 50257  # GPT-2's; Megatron pads it to a multiple of 128
# What a count needs besides the model's flags; Transformer Engine need not be there.
NEUTRAL_FLAGS = (
    "--transformer-impl local --moe-token-dispatcher-type alltoall --no-initialization"
    " --micro-batch-size 1 --lr 1 --train-iters 1 --mock-data --tokenizer-type NullTokenizer"
    f" --vocab-size {VOCABULARY}"
).split()


def main() -> None:
    """Print both counts in millions, and nothing of what Megatron says on the way."""
    from megatron_scmoe.platform.command_line import OneLineParser

    OneLineParser(description=__doc__.split("\n")[0]).parse_args()
    from megatron_scmoe.platform import cpu_backend

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cpu_backend.enable_if_no_gpu()  # before anything of Megatron is imported
    with contextlib.redirect_stdout(io.StringIO()):
        total, active = count(model_flags())
    print(f"{total / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M of them active for a token")


def model_flags() -> list[str]:
    """The flags in config.sh that say what the model is, for the variables of the environment."""
    script = (
        'PROGRAM=config.sh; EXAMPLE_DIR=$0; source "$0/../launch.sh"; source "$0/config.sh"; '
        'printf "%s\\0" "${MODEL_FLAGS[@]}" "${SCMOE_FLAGS[@]}"'
    )
    words = subprocess.run(
        ["bash", "-euc", script, EXAMPLE],
        env={"GPUS_PER_NODE": "8"} | os.environ,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return words.split("\0")[:-1]


def count(flags: list[str]) -> tuple[int, int]:
    """Parameters in all, and those a token passes: of the routed experts, the top k.

    Args:
        flags: of Megatron and ScMoE.
    """
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.training.argument_utils import core_transformer_config_from_args

    from megatron_scmoe.model.layer_spec import build_block_spec
    from megatron_scmoe.platform import megatron_workarounds
    from megatron_scmoe.training.pretrain import parse_settings

    sys.argv = [sys.argv[0], *flags, *NEUTRAL_FLAGS]
    args, scmoe = parse_settings()
    megatron_workarounds.leave_out_missing_fusions(args)
    config = core_transformer_config_from_args(args)
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    model = GPTModel(
        config,
        build_block_spec(config, scmoe),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    return total, total - routed + routed * args.moe_router_topk // args.num_experts


if __name__ == "__main__":
    main()
