"""Flags that Megatron parses, and that would not get into its configuration."""

import math

import pytest
import torch

from megatron_scmoe.platform import megatron_workarounds
from tests import checkpoints


def configuration(*flags: str):
    """Of a small model."""
    return megatron_workarounds.transformer_config(checkpoints.arguments("pos2", *flags))


def test_xavier_is_uniform_within_its_bound():
    config = configuration("--init-method-xavier-uniform")
    for method in (
        config.init_method,
        config.output_layer_init_method,
        config.embedding_init_method,
    ):
        weight = method(torch.empty(60, 90))
        bound = math.sqrt(6 / (60 + 90))
        assert 0.95 * bound < weight.abs().max() <= bound
        assert method(torch.empty(9000)).std() == pytest.approx(0.02, rel=0.1)  # a router's bias


def test_without_it_weights_are_normal_as_megatron_has_them():
    config = configuration()
    assert config.init_method.keywords == {"mean": 0.0, "std": 0.02}
    assert config.embedding_init_method.keywords["std"] == 0.02


def test_embeddings_keep_a_standard_deviation_of_their_own():
    config = configuration("--init-method-xavier-uniform", "--embedding-init-method-std", "0.5")
    assert config.init_method is not config.embedding_init_method
    assert config.embedding_init_method.keywords["std"] == 0.5
