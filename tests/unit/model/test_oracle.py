"""The model against the oracle: ScMoE from the formulas in plain PyTorch (tests/reference.py)."""

import itertools

import pytest
import torch

from megatron_scmoe.config import ScMoEConfig
from tests import models
from tests.reference import (
    ReferenceConfig,
    ReferenceScMoE,
    canonical_name,
    load_megatron_state,
    megatron_gradients,
)

# fp32 on both sides; Megatron permutes tokens to experts, multiplies them as one matrix and sums in
# another order than the oracle's loop over tokens.
RELATIVE = 2e-5

VARIANTS = [
    (2, tap, combine, router_norm, post_norm)
    for tap, combine, router_norm, post_norm in itertools.product(
        ("pos1", "pos2", "pos3"), ("add", "cg1", "cg2"), ("own", "shared"), (False, True)
    )
] + [
    (1, "pos1", combine, "own", post_norm)
    for combine in ("add", "cg1", "cg2")
    for post_norm in (False, True)
]


COMMON = dict(num_query_groups=2, shared_ffn_hidden_size=40, aux_loss_coeff=0.01)


def compare(moe_every, scmoe, top_k, reference=None, **changes):
    """Build both with the same weights and compare loss, logits and every gradient."""
    if moe_every == 1:
        changes["moe_layer_freq"] = 1
    chunks = models.build_scmoe(scmoe, moe_router_topk=top_k, **changes)
    (model,) = chunks
    config = ReferenceConfig(
        num_layers=4,
        hidden_size=32,
        num_heads=4,
        ffn_hidden_size=48,
        vocab_size=models.VOCAB,
        tap=scmoe.tap,
        moe_every=moe_every,
        router_norm=scmoe.router_norm,
        combine=scmoe.combine,
        post_norm=scmoe.post_norm,
        num_experts=4,
        top_k=top_k,
        expert_ffn_hidden_size=40,
        **(COMMON | (reference or {})),
    )
    oracle = ReferenceScMoE(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # norms and gates off their start values
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer += 0.1 * torch.randn_like(buffer)
    load_megatron_state(
        oracle, {n: p.detach() for n, p in model.state_dict().items() if p is not None}
    )
    tokens, labels = models.batch(0)
    loss, gradients = models.loss_and_gradients(model, tokens, labels)
    evaluation = oracle.evaluate(tokens, labels)
    evaluation.objective.backward()
    assert_close("loss", loss, evaluation.lm_loss)
    assert_close("logits", models.forward(model, tokens), evaluation.logits)
    expected = megatron_gradients(oracle)
    assert {canonical_name(n) for n in gradients} == set(expected)
    for name, gradient in gradients.items():
        assert_close(name, gradient, expected[canonical_name(name)])


def assert_close(name, actual, expected):
    scale = expected.abs().max().clamp(min=1e-6)
    difference = ((actual - expected).abs().max() / scale).item()
    assert difference < RELATIVE, f"{name} differs by {difference:.1e} of its largest entry"


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("moe_every,tap,combine,router_norm,post_norm", VARIANTS)
def test_forward_and_gradients(moe_every, tap, combine, router_norm, post_norm, top_k):
    scmoe = ScMoEConfig(tap=tap, combine=combine, router_norm=router_norm, post_norm=post_norm)
    compare(moe_every, scmoe, top_k)


ROUTER_OPTIONS = {
    "softmax of the kept logits": (dict(pre_softmax=False), dict(moe_router_pre_softmax=False)),
    "sigmoid": (
        dict(score_function="sigmoid", pre_softmax=False),
        dict(moe_router_score_function="sigmoid", moe_router_pre_softmax=False),
    ),
    "sigmoid, expert bias, scaled": (
        dict(score_function="sigmoid", pre_softmax=False, expert_bias=True, scaling_factor=2.5),
        dict(
            moe_router_score_function="sigmoid",
            moe_router_pre_softmax=False,
            moe_router_enable_expert_bias=True,
            moe_router_topk_scaling_factor=2.5,
        ),
    ),
    "z-loss": (dict(z_loss_coeff=1e-3), dict(moe_z_loss_coeff=1e-3)),
    "LayerNorm": (dict(norm="LayerNorm"), dict(normalization="LayerNorm")),
    "no shared expert": (
        dict(shared_ffn_hidden_size=None),
        dict(moe_shared_expert_intermediate_size=None),
    ),
    "plain multi-head attention": (dict(num_query_groups=4), dict(num_query_groups=None)),
}


@pytest.mark.parametrize("option", ROUTER_OPTIONS)
@pytest.mark.parametrize("tap", ["pos1", "pos2", "pos3"])
def test_options_of_megatron_keep_working(tap, option):
    reference, changes = ROUTER_OPTIONS[option]
    compare(2, ScMoEConfig(tap=tap, combine="add"), 2, reference, **changes)


ZERO_EXPERTS = {
    "zero experts": (dict(zero_experts=2), dict(zero_experts=2), {}),
    "zero experts, softmax of the kept": (
        dict(zero_experts=2, pre_softmax=False),
        dict(zero_experts=2),
        dict(moe_router_pre_softmax=False),
    ),
    "biased softmax": (dict(expert_bias=True), dict(expert_bias="proportional"), {}),
    "both, scaled": (
        dict(zero_experts=3, expert_bias=True, scaling_factor=6.0),
        dict(zero_experts=3, expert_bias="sign"),
        dict(moe_router_topk_scaling_factor=6.0),
    ),
}


@pytest.mark.parametrize("option", ZERO_EXPERTS)
@pytest.mark.parametrize("tap", ["pos1", "pos2", "pos3"])
def test_zero_experts_and_biased_choices_with_every_tap(tap, option):
    """Auxiliary loss included, which counts zero experts as experts."""
    reference, scmoe, changes = ZERO_EXPERTS[option]
    compare(2, ScMoEConfig(tap=tap, combine="cg2", **scmoe), 3, reference, **changes)
