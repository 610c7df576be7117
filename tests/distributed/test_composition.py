"""Recompute, other dispatchers, capacity, and a stock model's checkpoint."""

import os
from types import SimpleNamespace

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.layer_spec import build_block_spec
from megatron_scmoe.overlap import token_dispatcher
from megatron_scmoe.overlap.async_all_to_all import Flight, OnLaunchStream
from megatron_scmoe.overlap.schedule import Boundary
from megatron_scmoe.spec import scmoe_spec
from tests import models
from tests.harness import run_distributed

EP2 = models.LAYOUTS["EP2"]
DROPOUT = dict(hidden_dropout=0.1, attention_dropout=0.1)
CAPACITY = dict(moe_expert_capacity_factor=0.5, moe_pad_expert_input_to_capacity=True)


def gradients(scmoe: ScMoEConfig, **changes) -> dict:
    """Loss and gradients of one step on this rank of EP2."""
    (model,) = models.build_scmoe(scmoe, EP2, **changes)
    loss, found = models.loss_and_gradients(model, *models.batch(torch.distributed.get_rank()))
    return {"loss": loss} | found


def assert_same_bits(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


RECOMPUTE = {
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    "selective": dict(
        recompute_granularity="selective",
        recompute_modules=["core_attn", "mlp", "shared_experts"],
    ),
}


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recompute_gives_the_same_bits(kind):
    run_distributed(_compare_recompute, 2, kind)


def _compare_recompute(kind: str) -> None:
    for scmoe in (
        ScMoEConfig(tap="pos2"),
        ScMoEConfig(tap="pos3", expert_slot=4),
        ScMoEConfig(tap="pos2", router_norm="shared"),
    ):
        plain = gradients(scmoe, **DROPOUT)
        assert_same_bits(gradients(scmoe, **DROPOUT, **RECOMPUTE[kind]), plain)


def test_capacity_with_padding_overlaps_with_the_same_bits():
    run_distributed(_compare_capacity, 2)


def _compare_capacity() -> None:
    overlapped = gradients(ScMoEConfig(), **CAPACITY)
    assert_same_bits(gradients(ScMoEConfig(overlap=False), **CAPACITY), overlapped)
    assert not torch.equal(overlapped["loss"], gradients(ScMoEConfig())["loss"]), "none dropped"


def test_allgather_dispatcher_agrees_with_all_to_all():
    run_distributed(_compare_allgather, 2)


def _compare_allgather() -> None:
    serial = ScMoEConfig(overlap=False)
    expected = gradients(serial)
    actual = gradients(serial, moe_token_dispatcher_type="allgather")
    for name in expected:  # fp32, summed in another order
        assert torch.allclose(actual[name], expected[name], rtol=1e-4, atol=1e-7), name


def test_exchange_of_the_flex_dispatcher_gives_the_same_bits():
    """The exchange that DeepEP runs in, around Megatron's own blocking all-to-all."""
    run_distributed(_compare_launch_stream, 2)


def _compare_launch_stream() -> None:
    expected = gradients(ScMoEConfig())

    class Blocking(token_dispatcher.ScMoEAlltoAllTokenDispatcher):
        def launch_dispatch(self, flight):
            flight.launch(OnLaunchStream(self.token_dispatch))

        def launch_combine(self, tokens):
            flight = Flight(tokens)
            flight.launch(OnLaunchStream(lambda tokens: (self.token_combine(tokens),)))
            return flight

    original = token_dispatcher._DISPATCHERS["alltoall"]
    token_dispatcher._DISPATCHERS["alltoall"] = Blocking
    try:
        assert_same_bits(gradients(ScMoEConfig()), expected)
    finally:
        token_dispatcher._DISPATCHERS["alltoall"] = original


NEW_KEYS = {f"decoder.layers.{block}.mlp.shortcut_layernorm.weight" for block in (1, 3)}
"""What a ScMoE model (own router norm, direct add) has beyond a stock one with shared experts."""


def test_stock_checkpoint_loads_but_for_the_shortcut_norm(tmp_path):
    run_distributed(_load_stock, 1, str(tmp_path))


def _load_stock(path: str) -> None:
    models.init_parallel()
    config = models.transformer_config()
    (stock,) = models.build_chunks(config, None)
    stock_keys = _tensor_keys(stock)
    dist_checkpointing.save(stock.sharded_state_dict(metadata=models.checkpoint_metadata()), path)
    scmoe = ScMoEConfig(combine="add")
    (model,) = models.build_chunks(config, scmoe, local_norm_keys=True)

    assert _tensor_keys(model) ^ stock_keys == NEW_KEYS

    sharded = model.sharded_state_dict(metadata=models.checkpoint_metadata())
    known = {name: value for name, value in sharded.items() if value.key not in NEW_KEYS}
    loaded = dist_checkpointing.load(known, path)
    result = model.load_state_dict(loaded, strict=False)
    assert set(result.missing_keys) == NEW_KEYS
    assert not result.unexpected_keys
    state = stock.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in NEW_KEYS and tensor is not None:
            assert torch.equal(tensor, state[name]), name


def test_local_and_transformer_engine_keys_are_alike():
    """The local model saves the norm before a MoE under Transformer Engine's key."""
    (keys,) = run_distributed(_keys, 1)
    assert {k for k in keys if "layers.1." in k and "norm" in k} == {
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.shortcut_layernorm.weight",
    }


def _keys() -> set[str]:
    (model,) = models.build_scmoe(ScMoEConfig(combine="add"))
    return _tensor_keys(model)


def _tensor_keys(model) -> set[str]:
    state = model.sharded_state_dict(metadata=models.checkpoint_metadata())
    return {value.key for value in state.values() if hasattr(value, "key")}


def test_a_spec_builds_one_model():
    run_distributed(_build_twice, 1)


def _build_twice() -> None:
    models.init_parallel()
    config = models.transformer_config()
    spec = build_block_spec(config, ScMoEConfig(combine="add"))
    GPTModel(config, spec, models.VOCAB, models.SEQUENCE)
    with pytest.raises(RuntimeError, match="build a new spec for each model"):
        GPTModel(config, spec, models.VOCAB, models.SEQUENCE)


@pytest.mark.parametrize("wrapped", [True, False], ids=["GPTModelConfig", "TransformerConfig"])
def test_spec_of_a_foreign_entry_point(wrapped):
    run_distributed(_build_from_environment, 1, wrapped)


def _build_from_environment(wrapped: bool) -> None:
    models.init_parallel()
    config = models.transformer_config()
    default = GPTModel(config, scmoe_spec(config), models.VOCAB, models.SEQUENCE)
    assert "decoder.layers.1.mlp.shared_experts.gate_weight" in default.state_dict()

    os.environ["SCMOE_ARGS"] = "--scmoe-tap pos3 --scmoe-combine cg2"
    spec = scmoe_spec(SimpleNamespace(transformer=config) if wrapped else config)
    model = GPTModel(config, spec, models.VOCAB, models.SEQUENCE, position_embedding_type="rope")
    assert "decoder.layers.1.mlp.combine_gate.weight" in model.state_dict()
    assert model.decoder.layers[0].path.schedule.tap == Boundary.PAIR_INPUT
    loss, _ = models.loss_and_gradients(model, *models.batch(0))
    assert loss.isfinite()
