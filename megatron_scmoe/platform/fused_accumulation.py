"""Gradients of weights added up by the GEMM that computes them, without Apex.

With ``--gradient-accumulation-fusion``, Megatron's default, a weight's gradient goes straight into the
buffer that sums up micro-batches, in fp32, instead of through a tensor of its own. Transformer
Engine's modules do so themselves. Megatron's own linear layers, of which a model with Transformer
Engine has the output layer, ask Apex for it; here they get the same from Transformer Engine.
"""

from types import SimpleNamespace

from megatron.core.tensor_parallel import layers
from torch import Tensor


def supply() -> None:
    """Give Megatron's linear layers what stands in for ``fused_weight_gradient_mlp_cuda``."""
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
        wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
    )
    layers._grad_accum_fusion_available = True


def add_weight_gradient(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add grad_output^T total_input to ``main_grad``, in place.

    Args:
        total_input: [tokens, in], contiguous.
        grad_output: [tokens, out], contiguous, of the same dtype.
        main_grad: [out, in], contiguous, of the same dtype or fp32.
    """
    if main_grad.dtype == total_input.dtype:
        main_grad.addmm_(grad_output.t(), total_input)
        return
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    # Transformer Engine computes op(B) op(A); "NT" transposes the second, B. As its own Linear does.
    general_gemm(
        total_input,
        grad_output,
        out_dtype=main_grad.dtype,
        layout="NT",
        out=main_grad,
        accumulate=True,
        grad=True,
        use_split_accumulator=True,
    )
