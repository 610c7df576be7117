"""Checkpoints of small models of many kinds, saved by Megatron on any layout, and their logits."""

import os
from argparse import Namespace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_scmoe.arguments import scmoe_config_from_args
from megatron_scmoe.checkpoints.model_arguments import arguments_from_flags
from megatron_scmoe.model.layer_spec import build_block_spec
from megatron_scmoe.platform import megatron_workarounds
from tests import models

ROWS = 96
"""Rows of the embedding; models.VOCAB of them are tokens, the others padding."""

_MODEL = """
    --num-layers 4 --moe-layer-freq [0,1]*2 --hidden-size 32 --num-attention-heads 4
    --ffn-hidden-size 48 --moe-ffn-hidden-size 40 --max-position-embeddings 32
    --position-embedding-type rope --normalization RMSNorm --num-experts 4 --moe-router-topk 2
    --attention-dropout 0 --hidden-dropout 0 --moe-token-dispatcher-type alltoall
    --moe-router-pre-softmax --transformer-impl local --no-gradient-accumulation-fusion
    --no-masked-softmax-fusion --no-bias-dropout-fusion --no-bias-swiglu-fusion --no-rope-fusion
    --no-bias-gelu-fusion --tokenizer-type NullTokenizer --vocab-size 64
""".split()
_SHARED = ["--moe-shared-expert-intermediate-size", "24", "--disable-bias-linear"]
_UNTIED = ["--untie-embeddings-and-output-weights"]
_GQA = ["--group-query-attention", "--num-query-groups", "2"]
_USUAL = [*_SHARED, *_UNTIED, *_GQA, "--swiglu"]

VARIANTS = {
    "pos2": _USUAL,
    "pos1, CG-2, post norm": [
        *_USUAL,
        *"--scmoe-tap pos1 --scmoe-combine cg2 --scmoe-post-norm".split(),
    ],
    "pos1, shared norm": [
        *_USUAL,
        *"--scmoe-tap pos1 --scmoe-combine add --scmoe-router-norm shared".split(),
    ],
    "pos2, shared norm, post norm": [
        *_USUAL,
        *"--scmoe-router-norm shared --scmoe-post-norm --norm-epsilon 1e-3".split(),
    ],
    "pos3, direct add": [*_USUAL, *"--scmoe-tap pos3 --scmoe-combine add".split()],
    "pos3, shared norm, CG-2": [
        *_USUAL,
        *"--scmoe-tap pos3 --scmoe-combine cg2 --scmoe-router-norm shared".split(),
    ],
    "every block": [*_USUAL, *"--moe-layer-freq 1 --scmoe-tap pos1".split()],
    "GPT-2": [
        *_SHARED,
        *"--normalization LayerNorm --position-embedding-type learned_absolute".split(),
    ],
    "biases, no shared expert, no positions": [
        *_UNTIED,
        *"--scmoe-combine add --normalization LayerNorm --position-embedding-type none".split(),
    ],
    "squared ReLU, QK norm, wide heads": [
        *_SHARED,
        *_GQA,
        *"--squared-relu --qk-layernorm --add-qkv-bias --kv-channels 16".split(),
    ],
    "quick GEGLU, partial and stretched rope": [
        *_SHARED,
        *_UNTIED,
        *"--quick-geglu --rotary-percent 0.5 --rotary-seq-len-interpolation-factor 2".split(),
        *"--rotary-base 5000".split(),
    ],
    "sigmoid, expert bias, groups": [
        *_USUAL,
        *"--num-experts 8 --moe-router-topk 2 --moe-router-score-function sigmoid".split(),
        *"--moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5".split(),
        *"--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-dtype fp64".split(),
    ],
    "top-1, Llama 3's rope": [
        *_USUAL,
        *"--moe-router-topk 1 --use-rope-scaling --rope-scaling-factor 4".split(),
    ],
}
"""The kinds of models, by what sets each apart; flags of pretrain_gpt_scmoe.py."""

_POST_SOFTMAX = "softmax over the kept"
VARIANTS[_POST_SOFTMAX] = _USUAL

LAYOUTS = {
    "1 rank": (1, []),
    "EP2": (2, ["--expert-model-parallel-size", "2"]),
    "TP2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "PP2": (2, ["--pipeline-model-parallel-size", "2"]),
}
"""Number of ranks and flags."""


def arguments(variant: str, *flags: str, dtype=torch.float32):
    """Megatron's arguments of a variant."""
    model = [
        flag for flag in _MODEL if (variant, flag) != (_POST_SOFTMAX, "--moe-router-pre-softmax")
    ]
    args = arguments_from_flags([*model, *VARIANTS[variant], *flags], dtype, ROWS)
    if args.position_embedding_type == "learned_absolute":
        args.apply_rope_fusion = False
    return args


def build(args) -> GPTModel:
    """The model of these arguments on this rank; process groups are there already."""
    config = core_transformer_config_from_args(args)
    stage = models.parallel_state.get_pipeline_model_parallel_rank()
    return GPTModel(
        config,
        build_block_spec(config, scmoe_config_from_args(args)),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=stage == 0,
        post_process=stage == args.pipeline_model_parallel_size - 1,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
    ).cuda()


def save_all(folder: str, layout: str, variants: list[str]) -> None:
    """Save a model with random weights of each variant, from this layout's ranks."""
    _, flags = LAYOUTS[layout]
    for index, variant in enumerate(variants):
        args = arguments(variant, *flags)
        if index == 0:
            models.init_parallel(
                tp=args.tensor_model_parallel_size,
                pp=args.pipeline_model_parallel_size,
                ep=args.expert_model_parallel_size,
                etp=1,
            )
        save(args, Path(folder, variant))


def save(args, folder: Path) -> None:
    """Save a model with random weights, norms, biases and all, as training would."""
    megatron_workarounds.apply(
        Namespace(async_save=False)
    )  # no server process, which takes seconds
    model = build(args)
    generator = torch.Generator().manual_seed(17 * torch.distributed.get_rank() + 1)
    for tensor in model.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            noise = 0.2 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor * 0.5 + noise.to(tensor.device))
    path = folder / "iter_0000007"
    os.makedirs(path, exist_ok=True)
    metadata = models.checkpoint_metadata()
    state = model.sharded_state_dict(metadata=metadata)
    common = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
    of_content = {name: value for name, value in metadata.items() if value is True}
    dist_checkpointing.save({**state, **common}, str(path), content_metadata=of_content)
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def load(args, checkpoint: Path) -> GPTModel:
    """Megatron's model on this one rank, loaded by Megatron."""
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = 1
    args.expert_model_parallel_size, args.sequence_parallel = 1, False
    models.init_parallel()
    model = build(args)
    state = model.sharded_state_dict(metadata=models.checkpoint_metadata())
    model.load_state_dict(
        {
            key: value
            for key, value in dist_checkpointing.load(state, str(checkpoint)).items()
            if key in model.state_dict()
        },
        strict=True,
    )
    return model


def megatron_logits(args, checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of the same model."""
    model = load(args, checkpoint).eval()
    with torch.no_grad():
        return models.forward(model, tokens)
