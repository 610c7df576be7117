"""One checkpoint on every layout of ranks: the same loss, gradient norm and training curve."""

import os

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_scmoe.config import ScMoEConfig
from tests import models
from tests.harness import run_distributed

VARIANTS = {
    "pos2": ScMoEConfig(tap="pos2"),
    "pos3, CG-2, post norm": ScMoEConfig(tap="pos3", combine="cg2", post_norm=True),
    "pos2, shared norm": ScMoEConfig(tap="pos2", combine="add", router_norm="shared"),
}
STEPS = 5
MICRO_BATCHES = 4


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """For each variant and layout: loss and gradient norm of every step, from one checkpoint."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    run_distributed(_save_all, 1, folder)
    by_layout = {
        name: run_distributed(_train_all, layout["world_size"], folder, layout)[0]
        for name, layout in models.LAYOUTS.items()
    }
    return by_layout


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", [name for name in models.LAYOUTS if name != "1 rank"])
def test_same_curve_as_on_one_rank(curves, variant, layout):
    expected = curves["1 rank"][variant]
    actual = curves[layout][variant]
    loss, norm = actual[0]
    # fp32: sums run in another order when rows or columns are split over ranks.
    assert loss == pytest.approx(expected[0][0], rel=1e-6)
    assert norm == pytest.approx(expected[0][1], rel=1e-5)
    for step in range(1, STEPS):
        # Adam divides by the root of the second moment and amplifies rounding; a token at the edge
        # of two experts may then change sides.
        assert actual[step][0] == pytest.approx(expected[step][0], rel=2e-4)


def test_virtual_pipeline_gives_the_same_curve(tmp_path):
    scmoe = VARIANTS["pos2"]
    run_distributed(_save, 1, scmoe, str(tmp_path), num_layers=8)
    (single,) = run_distributed(
        _train, 1, scmoe, str(tmp_path), models.LAYOUTS["1 rank"], num_layers=8
    )
    virtual = run_distributed(_train, 2, scmoe, str(tmp_path), models.VIRTUAL, num_layers=8)[0]
    assert virtual[0][0] == pytest.approx(single[0][0], rel=1e-6)
    assert [norm for _, norm in virtual[:1]] == pytest.approx([single[0][1]], rel=1e-5)
    assert [loss for loss, _ in virtual] == pytest.approx([loss for loss, _ in single], rel=2e-4)


def test_pos1_may_be_split_between_stages(tmp_path):
    scmoe = ScMoEConfig(tap="pos1")
    run_distributed(_save, 1, scmoe, str(tmp_path))
    (single,) = run_distributed(_train, 1, scmoe, str(tmp_path), models.LAYOUTS["1 rank"])
    layout = dict(world_size=4, pp=4)
    split = run_distributed(_train, 4, scmoe, str(tmp_path), layout)[0]
    assert split[0][0] == pytest.approx(single[0][0], rel=1e-6)
    assert split[0][1] == pytest.approx(single[0][1], rel=1e-5)


def test_training_moves_the_loss(curves):
    for variant in VARIANTS:
        losses = [loss for loss, _ in curves["1 rank"][variant]]
        assert losses[-1] < losses[0] - 0.05


def _save_all(folder: str) -> None:
    for index, scmoe in enumerate(VARIANTS.values()):
        _save(scmoe, f"{folder}/{index}")


def _save(scmoe: ScMoEConfig, path: str, **changes) -> None:
    (model,) = models.build_scmoe(scmoe, **changes)
    os.makedirs(path, exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(metadata=models.checkpoint_metadata()), path)


def _train_all(folder: str, layout: dict) -> dict:
    return {
        variant: _train(scmoe, f"{folder}/{index}", layout)
        for index, (variant, scmoe) in enumerate(VARIANTS.items())
    }


def _train(scmoe, path: str, layout: dict, **changes) -> list[tuple[float, float]]:
    chunks = models.build_scmoe(scmoe, layout, **changes)
    virtual = len(chunks) > 1
    sharded = {
        f"model{index}" if virtual else "model": chunk.sharded_state_dict(
            metadata=models.checkpoint_metadata()
        )
        for index, chunk in enumerate(chunks)
    }
    state = dist_checkpointing.load(sharded, path)
    for chunk, part in zip(chunks, state.values()):
        chunk.load_state_dict(part, strict=True)
    config = chunks[0].config
    wrapped = [
        DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=5e-3, bf16=False, clip_grad=1.0), wrapped
    )
    steps = []
    for step in range(STEPS):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = models.run_micro_batches(wrapped, MICRO_BATCHES * step, MICRO_BATCHES)
        _, norm, _ = optimizer.step()
        steps.append((loss, float(norm)))
    return steps


def test_gradients_do_not_depend_on_the_layout_of_experts():
    """Every parameter's gradient, gathered by name, on EP2 and on one rank."""
    (single,) = run_distributed(_gradients, 1, models.LAYOUTS["1 rank"])
    first, second = run_distributed(_gradients, 2, models.LAYOUTS["EP2"])
    for name, gradient in first.items():
        if "local_experts" in name:
            continue
        mean = (gradient + second[name]) / 2
        assert np.allclose(mean, single[name], rtol=1e-4, atol=1e-7), name


def _gradients(layout: dict) -> dict:
    (model,) = models.build_scmoe(ScMoEConfig(combine="cg2"), layout)
    with torch.no_grad():  # the same weights on both layouts, whatever drew them
        for name, parameter in sorted(model.named_parameters()):
            seed = sum(map(ord, name.split("local_experts")[0]))
            if "local_experts" not in name:
                generator = torch.Generator().manual_seed(seed)
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.fill_(0.01)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    total: dict = {}
    for index in range(rank, 2, size):
        _, gradients = models.loss_and_gradients(model, *models.batch(index))
        for name, gradient in gradients.items():
            total[name] = total.get(name, 0) + gradient / (2 // size)
    return {name: gradient.numpy() for name, gradient in total.items()}
