"""Blocks whose attention and routing a CUDA graph computes, with the graph's part run as it is.

A CPU has no CUDA graphs: what Megatron would capture is called in place of each replay. That shows
that the captured part is complete and that the routed path goes on from it; that it can be captured
is shown on a GPU (tests/gpu/test_gpu.py).
"""

import pytest
import torch
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.module import GraphableMegatronModule

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.transformer_layer import _CapturableLayer
from tests import models
from tests.harness import run_distributed

CASES = (
    ("pos1", ["attn"]),
    ("pos2", ["attn"]),
    ("pos3", ["attn"]),
    ("pos2", ["attn", "moe_router", "moe_preprocess"]),
    ("pos3", ["attn", "moe_router", "moe_preprocess"]),
    ("pos2", ["attn", "mlp", "moe_router", "moe_preprocess"]),
    ("pos3", ["attn", "mlp", "moe_router", "moe_preprocess"]),
)


@pytest.mark.parametrize("ranks", [1, 2])
def test_captured_blocks_compute_the_same_bits(ranks):
    for found in run_distributed(_differences, ranks):
        assert found == {}


def _differences() -> dict:
    world = torch.distributed.get_world_size()
    found = {}
    for tap, modules in CASES:
        for overlap in (True, False):
            scmoe = ScMoEConfig(tap=tap, overlap=overlap)
            (model,) = models.build_scmoe(scmoe, dict(world_size=world, ep=world))
            actions = []
            for layer in _ours(model):
                layer.path.on_action = actions.append
            eager = _train(model)
            expected, actions[:] = list(actions), []
            _capture(model, modules)
            wrong = _unequal(eager, _train(model))
            if wrong or actions != expected:
                found[tap, len(modules), overlap] = wrong or "other actions"
    return found


def _ours(model) -> list:
    """The blocks that are not Megatron's own (with Pos-1 the dense ones are)."""
    return [layer for layer in model.decoder.layers if isinstance(layer, _CapturableLayer)]


def _train(model) -> list:
    """Losses and gradients of two micro-batches."""
    return [models.loss_and_gradients(model, *models.batch(number)) for number in range(2)]


def _capture(model, modules: list[str]) -> None:
    model.config.cuda_graph_impl = "transformer_engine"
    model.config.cuda_graph_modules = [CudaGraphModule[name] for name in modules]
    for module in model.modules():
        if isinstance(module, GraphableMegatronModule):
            module.cuda_graphs = []
    for layer in _ours(model):
        layer.captures_routing = "moe_router" in modules
        layer.captures_mlp = "mlp" in modules
        layer.cuda_graphs = ["one"]
        layer._replay = layer._te_cuda_graph_capture


def _unequal(eager: list, captured: list) -> list[str]:
    wrong = []
    for (loss, gradients), (other_loss, others) in zip(eager, captured, strict=True):
        assert gradients.keys() == others.keys()
        wrong += [name for name, value in gradients.items() if not torch.equal(value, others[name])]
        wrong += [] if torch.equal(loss, other_loss) else ["loss"]
    return wrong
