"""Gradients accumulated by their own GEMM through Transformer Engine, held against separate ones."""

import pytest
import torch

from megatron_scmoe.platform import fused_accumulation
from tests.gpu.test_gpu import FLAGS, WHOLE, pytestmark  # noqa: F401  (skips what has no GPU)
from tests.harness import Run, run_distributed, run_pretrain

OFF = "--no-gradient-accumulation-fusion"
TIED = "--untie-embeddings-and-output-weights"
"""Where it is left out."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("main_dtype", ["as the input", "fp32"])
def test_the_gradient_is_added_to_what_is_there(dtype, main_dtype):
    of_main = torch.float32 if main_dtype == "fp32" else dtype
    (error,) = run_distributed(_error_of_one_gemm, 1, dtype, of_main, backend="nccl")
    # Relative to the largest: products are exact in fp32, so only sums are rounded. Of fp32 inputs
    # TF32 may be taken, with ten bits.
    assert error < (1e-5 if of_main == torch.float32 != dtype else 1e-2)


def _error_of_one_gemm(dtype: torch.dtype, main_dtype: torch.dtype) -> float:
    torch.manual_seed(1)
    x = torch.randn(512, 256, device="cuda", dtype=dtype)
    dy = torch.randn(512, 1024, device="cuda", dtype=dtype)
    main_grad = torch.randn(1024, 256, device="cuda", dtype=main_dtype)
    expected = main_grad.double() + dy.double().T @ x.double()
    fused_accumulation.add_weight_gradient(x, dy, main_grad)
    return float((main_grad.double() - expected).abs().max() / expected.abs().max())


def trained(*flags: str, without: tuple[str, ...] = (OFF,)) -> Run:
    words = [flag for flag in FLAGS if flag not in without]
    run = run_pretrain([*words, "--train-iters", "6", "--te-rng-tracker", *flags])
    assert run.status == 0, run.output[-2000:]
    assert "no fused accumulation" not in run.output
    return run


@pytest.mark.parametrize("left_out", [(), (TIED,)], ids=["untied", "tied"])
def test_a_run_trains_as_without_the_fusion(left_out):
    """A tied weight gets the embedding's gradient as well, which is not fused."""
    separate, fused = trained(without=left_out), trained(without=(OFF, *left_out))
    assert fused.losses[1] == separate.losses[1]
    # Separate gradients are rounded to bf16 before they are added: three digits.
    assert fused.grad_norms[1] == pytest.approx(separate.grad_norms[1], rel=0.01, abs=2e-3)
    for iteration in range(2, 7):
        assert fused.losses[iteration] == pytest.approx(separate.losses[iteration], abs=0.02)


def test_captured_blocks_accumulate_the_same_bits():
    graphs = f"--cuda-graph-impl transformer_engine --cuda-graph-modules {WHOLE}".split()
    assert trained(*graphs).losses == trained().losses
