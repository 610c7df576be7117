"""Small random models of the exported code (megatron_scmoe/checkpoints/hf), of several kinds."""

import pytest
import torch

from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import ScMoEForCausalLM

VOCAB = 64
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=40,
    shared_expert_intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts=4,
    num_experts_per_tok=2,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
VARIANTS = {
    "pos2, CG-1": {},
    "pos3, shared norm, CG-2": dict(
        tap="pos3", router_norm="shared", combine="cg2", post_norm=True
    ),
    "GPT-2 with biases, tied": dict(
        norm_type="LayerNorm",
        position_embedding="learned_absolute",
        gated_mlp=False,
        hidden_act="gelu",
        linear_bias=True,
        tie_word_embeddings=True,
    ),
    "sigmoid in fp32, expert bias, groups, QK norm": dict(
        router_score_function="sigmoid",
        router_expert_bias=True,
        router_dtype="float32",
        num_experts=8,
        router_num_groups=4,
        router_group_topk=2,
        router_scaling_factor=2.5,
        qk_norm=True,
    ),
    "every block, no shared expert": dict(
        tap="pos1", moe_layers=[1] * 4, combine="add", shared_expert_intermediate_size=None
    ),
}
TIED = "GPT-2 with biases, tied"
SIGMOID = "sigmoid in fp32, expert bias, groups, QK norm"
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))

all_variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "pos2, CG-1", **changes) -> ScMoEForCausalLM:
    """A model with random weights, the same each time; norms and biases differ from their start."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = ScMoEForCausalLM(ScMoEConfig(**(BASE | VARIANTS[variant] | changes)))
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1:
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_close(actual, expected, tolerance=1e-5) -> None:
    assert (actual.float() - expected.float()).abs().max() <= tolerance
