"""All-gathers of parameters, started together: on real buckets, over gloo."""

import warnings

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.training.parameter_gathers import ParameterGathers
from tests.harness import run_distributed

LAYERS, SIZE = 4, 16


class Layers(MegatronModule):
    """Some linear layers, a bucket of parameters each."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def _gather(together: bool) -> dict:
    """The weights of an own shard each; what was under way before the forward, and came of it."""
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=LAYERS, hidden_size=SIZE, num_attention_heads=1)
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        bucket_size=1,
    )
    model = DistributedDataParallel(config, settings, Layers(config))
    gathers = ParameterGathers()
    if together:
        gathers.attach([model])
    started: list[int] = []
    for number, group in enumerate(model.bucket_groups):
        (bucket,) = group.buckets
        rank, shards = torch.distributed.get_rank(), torch.distributed.get_world_size()
        bucket.param_data.zero_()
        bucket.param_data.view(shards, -1)[rank] = 10 * number + rank
        start = group.start_param_sync
        group.start_param_sync = lambda n=number, start=start: (started.append(n), start())
    gathers.iteration_begins(0)
    ahead = list(started)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model(torch.ones(1, SIZE))
    found = [sorted(set(layer.weight.flatten().tolist())) for layer in model.module.layers]
    return {"ahead": ahead, "all": started, "weights": found, "warned": len(warned)}


@pytest.mark.parametrize("together", [True, False])
def test_every_weight_is_whole_when_forward_reads_it(together):
    for found in run_distributed(_gather, 2, together):
        # Bucket groups are numbered in the order of backward.
        assert found["weights"] == [[10.0 * n, 10.0 * n + 1] for n in (3, 2, 1, 0)]
        assert found["all"] == [3, 2, 1, 0]
        assert found["ahead"] == ([3, 2, 1, 0] if together else [])
        assert found["warned"] == 0
