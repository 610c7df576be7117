"""Memory that a stream still reads is not handed out again. Needs two GPUs.

Every exchange is made slow on the stream it is launched from, and compute meanwhile takes whatever
memory is free and fills it with NaN.
"""

import pytest
import torch

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.overlap.async_all_to_all import AllToAll, Flight, OnLaunchStream
from megatron_scmoe.overlap.copy_engine import rings
from megatron_scmoe.overlap.exchanges import exchange_for
from tests.gpu.test_gpu import pytestmark, requires_multi_gpu  # noqa: F401  (skips this module too)
from tests.harness import run_distributed

ROWS, WIDTH, SLOW_CYCLES = 4096, 256, 20_000_000  # about 10 ms
COPIES = pytest.mark.skipif(rings.driver is None, reason="needs cuda-bindings")


@requires_multi_gpu
@pytest.mark.parametrize("kind", ["collective", "stream", pytest.param("copy-host", marks=COPIES)])
@pytest.mark.parametrize("gradient", ["contiguous", "expanded"])
def test_memory_under_way_is_not_handed_out(kind, gradient):
    for wrong in run_distributed(_count_wrong, 2, kind, gradient, backend="nccl"):
        assert wrong == {"arrived": 0, "tokens' gradient": 0, "probs' gradient": 0}


def _count_wrong(kind: str, gradient: str) -> dict[str, int]:
    """How many values differ from those of an undisturbed exchange, over ten rounds."""
    wrong = {"arrived": 0, "tokens' gradient": 0, "probs' gradient": 0}
    for seed in range(10):
        torch.manual_seed(seed + 100 * torch.distributed.get_rank())
        tokens, probs = torch.randn(ROWS, WIDTH, device="cuda"), torch.rand(ROWS, 1, device="cuda")
        factor = torch.randn(ROWS, WIDTH if gradient == "contiguous" else 1, device="cuda")
        expected = _exchange(tokens, probs, factor, kind, disturb=False)
        found = _exchange(tokens, probs, factor, kind, disturb=True)
        for name, value, reference in zip(wrong, found, expected, strict=True):
            wrong[name] += int((value != reference).sum())
    return wrong


def _exchange(tokens, probs, factor, kind: str, disturb: bool) -> tuple[torch.Tensor, ...]:
    tokens, probs = (tensor.clone().requires_grad_() for tensor in (tokens, probs))
    other = torch.zeros(1, device="cuda", requires_grad=True)
    churn = _Churn.apply if disturb else _Wait.apply
    first, second = Flight(tokens * 1.0, probs * 1.0), Flight(tokens * 2.0, probs * 1.0)
    first.launch(_slow(kind))
    other = churn(other)
    second.launch(_slow(kind))
    arrived = [*first.arrive(), *second.arrive()]
    other = churn(other)
    outputs = arrived[0] * arrived[1] + arrived[2] * arrived[3]
    if factor.shape[1] == 1:
        loss = outputs.sum() + (outputs.sum(dim=1, keepdim=True) * factor).sum()
    else:
        loss = (outputs * factor).sum()
    (loss + other.sum()).backward()
    torch.cuda.synchronize()
    return outputs.detach(), tokens.grad, probs.grad


def _slow(kind: str):
    group = torch.distributed.group.WORLD
    if kind == "stream":
        return OnLaunchStream(_SlowFunction.of)
    base = AllToAll
    if kind != "collective":
        base = exchange_for(group, ScMoEConfig(exchange=kind))

    exchange = base(group, None, None, "dispatch")
    start = exchange._start

    def slow_start(*args):
        torch.cuda._sleep(SLOW_CYCLES)
        return start(*args)

    exchange._start = slow_start
    return exchange


class _SlowFunction(torch.autograd.Function):
    """A communication as DeepEP's: the stream it is issued on waits for it, in both directions."""

    @staticmethod
    def of(tokens, probs):
        # The products save what they multiply for a backward on the launch stream.
        return _SlowFunction.apply(tokens * probs), _SlowFunction.apply(probs * probs)

    @staticmethod
    def forward(ctx, tensor):
        torch.cuda._sleep(SLOW_CYCLES)
        output = torch.empty_like(tensor)
        torch.distributed.all_to_all_single(output, tensor.contiguous())
        return output

    backward = forward


class _Wait(torch.autograd.Function):
    """Compute beside the exchange: nothing but waiting for the GPU, forward and backward."""

    @staticmethod
    def forward(ctx, tensor):
        torch.cuda.synchronize()
        return tensor.view_as(tensor)

    backward = forward


class _Churn(torch.autograd.Function):
    """Compute beside the exchange: takes all memory that is free for tensors like these, writes NaN."""

    @staticmethod
    def forward(ctx, tensor):
        for shape in ((ROWS, WIDTH), (ROWS, 1)):
            taken = [torch.full(shape, torch.nan, device="cuda") for _ in range(16)]
            del taken
        return tensor.view_as(tensor)

    backward = forward
