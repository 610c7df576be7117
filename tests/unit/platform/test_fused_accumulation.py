"""Gradients accumulated by their own GEMM without Apex."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_scmoe.platform import cpu_backend, fused_accumulation, megatron_workarounds

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None, reason="Apex is here"
)


@pytest.fixture(autouse=True)
def _unsupplied(monkeypatch):
    """What is supplied is taken away behind each test."""
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a machine with a GPU and Transformer Engine."""
    monkeypatch.setattr(cpu_backend, "is_enabled", lambda: False)
    monkeypatch.setattr(megatron_workarounds, "HAVE_TE", True)


def settled(**changes) -> SimpleNamespace:
    """Arguments of a run, once missing fusions are left out."""
    args = SimpleNamespace(
        transformer_impl="transformer_engine",
        gradient_accumulation_fusion=True,
        defer_embedding_wgrad_compute=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        num_experts=None,
        **changes,
    )
    megatron_workarounds.leave_out_missing_fusions(args)
    return args


def test_the_fusion_stays_on_with_transformer_engine(on_a_gpu, recwarn):
    assert settled().gradient_accumulation_fusion
    assert layers._grad_accum_fusion_available
    assert not [warning for warning in recwarn if "Apex" in str(warning.message)]


def test_the_fusion_is_left_out_with_a_warning_without_it(on_a_gpu, monkeypatch):
    monkeypatch.setattr(megatron_workarounds, "HAVE_TE", False)
    with pytest.warns(UserWarning, match="no Apex: no fused accumulation"):
        assert not settled().gradient_accumulation_fusion
    assert not layers._grad_accum_fusion_available


def test_what_was_turned_off_stays_off(on_a_gpu):
    args = SimpleNamespace(**vars(settled()) | {"gradient_accumulation_fusion": False})
    layers._grad_accum_fusion_available = False
    megatron_workarounds.leave_out_missing_fusions(args)
    assert not args.gradient_accumulation_fusion
    assert not layers._grad_accum_fusion_available


@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 5)], ids=["2-dim", "3-dim"])
def test_megatrons_linear_layer_accumulates_through_it(shape):
    fused_accumulation.supply()
    weight = torch.nn.Parameter(torch.randn(4, 5))
    weight.main_grad = torch.randn(4, 5)
    weight.grad_added_to_main_grad = False
    before = weight.main_grad.clone()
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 4)
    apply = layers.LinearWithGradAccumulationAndAsyncCommunication.apply
    apply(x, weight, None, True, False, False, None, 0, None, 1).backward(dy)
    expected = before + dy.reshape(-1, 4).T @ x.detach().reshape(-1, 5)
    # fp32 sums of six products, in another order.
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-5, atol=1e-5)
    assert weight.grad_added_to_main_grad
