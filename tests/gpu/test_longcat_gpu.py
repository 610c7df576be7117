"""LongCat-Flash on a GPU: Transformer Engine's norms and projections, fused permutation, bf16."""

import torch

from megatron_scmoe.checkpoints.formats.longcat_flash import megatron_flags
from tests import longcat
from tests.gpu.rank_sets import EXACT
from tests.gpu.test_gpu import FLAGS, pytestmark  # noqa: F401  (skips this module too)
from tests.harness import run_distributed, run_pretrain

# Sizes that Transformer Engine's kernels take.
CONFIG = dict(
    hidden_size=256,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    head_dim=32,
    v_head_dim=64,
    ffn_hidden_size=512,
    expert_ffn_hidden_size=256,
    initializer_range=0.05,
)


def test_logits_are_those_of_transformers(tmp_path):
    [difference] = run_distributed(_difference, 1, str(tmp_path), backend="nccl", environment=EXACT)
    assert difference < 1e-4  # fp32


def _difference(folder: str) -> float:
    from pathlib import Path

    from tests import models

    theirs = longcat.build("zero experts", Path(folder, "longcat"), **CONFIG).cuda()
    checkpoint = longcat.import_folder(Path(folder, "longcat"), Path(folder, "megatron"))
    ours = longcat.build_megatron(
        longcat.load_config(Path(folder, "longcat")),
        transformer_impl="transformer_engine",
        moe_permute_fusion=True,
        moe_grouped_gemm=True,
    )
    longcat.load(ours, checkpoint)
    tokens, _ = models.batch(0)
    with torch.no_grad():
        expected, actual = theirs(tokens).logits, models.forward(ours.eval(), tokens)
    return (actual - expected).abs().max().item()


def test_trains_in_bf16_with_fused_kernels(tmp_path):
    longcat.build("zero experts", tmp_path, **CONFIG)
    config = longcat.load_config(tmp_path)
    flags = megatron_flags(config | dict(vocab_size=1024, max_position_embeddings=256))
    run = run_pretrain([*FLAGS, *flags, "--moe-aux-loss-coeff", "0"], 1)
    assert run.status == 0, run.output[-2000:]
    assert run.losses[30] < run.losses[1] - 1.0


def test_checkpoint_keys_do_not_depend_on_the_implementation():
    [(local, fused)] = run_distributed(_keys, 1, backend="nccl")
    assert local == fused


def _keys() -> tuple[list[str], list[str]]:
    """Of a model with Megatron's norms of latents, and queries that are not compressed."""
    from megatron_scmoe.config import ScMoEConfig
    from tests import models
    from tests.distributed.test_latent_attention import VARIANTS

    _, changes = VARIANTS["queries not compressed"]
    found = []
    for implementation in ("local", "transformer_engine"):
        changes = changes | dict(transformer_impl=implementation)
        (model,) = models.build_scmoe(ScMoEConfig(), **changes)
        state = model.sharded_state_dict(metadata=models.checkpoint_metadata())
        keys = {tensor.key for tensor in state.values() if hasattr(tensor, "key")}
        found.append(sorted(key for key in keys if not key.endswith("_extra_state")))
    return found[0], found[1]
