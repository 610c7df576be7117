"""Megatron's multi-latent attention in its local implementation: the same gradients under TP."""

import pytest
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.config import ScMoEConfig
from tests import models
from tests.harness import run_distributed

LATENTS = dict(
    multi_latent_attention=True,
    num_query_groups=None,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=6,
    rope_type="rope",
    apply_rope_fusion=False,
    init_method_std=0.2,
)
SCALED = ScMoEConfig(mla_scale=True, mla_norm_epsilon=1e-6)

VARIANTS = {
    "LongCat-Flash's norms": (SCALED, LATENTS | dict(qk_layernorm=True)),
    "Megatron's norms": (ScMoEConfig(), LATENTS | dict(qk_layernorm=True)),
    "no norms": (ScMoEConfig(), LATENTS),
    "queries not compressed": (ScMoEConfig(), LATENTS | dict(q_lora_rank=None, qk_layernorm=True)),
}


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """For each variant every gradient of one step, whole and by checkpoint key, on two layouts."""
    root = tmp_path_factory.mktemp("gradients")
    for variant in range(len(VARIANTS)):
        for kind in ("start", "1 rank", "TP2+SP"):
            (root / f"{variant} {kind}").mkdir()
    for layout in ("1 rank", "TP2+SP"):
        run_distributed(_save_gradients, models.LAYOUTS[layout]["world_size"], str(root), layout)
    return {
        name: [read_megatron(root / f"{i} {kind}").tensors for kind in ("1 rank", "TP2+SP")]
        for i, name in enumerate(VARIANTS)
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_parallel_ranks_sum_the_gradients_of_all_heads(gradients, variant):
    one_rank, split = gradients[variant]
    assert split.keys() == one_rank.keys()
    for name, tensor in one_rank.items():
        expected = tensor.load()
        assert expected.abs().max() > 0, name
        # fp32; sums over rows and columns split over ranks run in another order.
        difference = (split[name].load() - expected).abs().max()
        assert difference <= 2e-5 * expected.abs().max(), name


def _save_gradients(root: str, layout: str) -> None:
    """Save the gradients of one step as if they were the weights; one rank draws the weights."""
    for index, (scmoe, changes) in enumerate(VARIANTS.values()):
        (model,) = models.build_scmoe(scmoe, models.LAYOUTS[layout], **changes)
        start = f"{root}/{index} start"
        if layout == "1 rank":
            _save(model, start)
        state = model.sharded_state_dict(metadata=models.checkpoint_metadata())
        model.load_state_dict(dist_checkpointing.load(state, start), strict=True)
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        models.run_micro_batches([wrapped], 0, 2)
        for parameter in model.parameters():
            parameter.data.copy_(parameter.main_grad)
        _save(model, f"{root}/{index} {layout}")


def _save(model, folder: str) -> None:
    dist_checkpointing.save(model.sharded_state_dict(metadata=models.checkpoint_metadata()), folder)
