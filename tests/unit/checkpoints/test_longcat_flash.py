"""LongCat-Flash's mapping by itself: what it refuses, and flags that mean what config.json says."""

import functools
from argparse import ArgumentParser

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.arguments import add_scmoe_args, scmoe_config_from_args
from megatron_scmoe.checkpoints.formats.longcat_flash import (
    FORMAT,
    megatron_flags,
    to_longcat,
    to_megatron,
)
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.safetensors_folder import read_safetensors
from megatron_scmoe.errors import ConversionError
from megatron_scmoe.validation.rules import validate
from tests import longcat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("longcat")
    longcat.build("router bias, three layers", path)
    return path


@pytest.fixture
def config(folder):
    return longcat.load_config(folder)


@functools.cache
def parser() -> ArgumentParser:
    return add_scmoe_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


def parse(flags: list[str]):
    return parser().parse_args(flags)


@pytest.mark.parametrize("variant", longcat.VARIANTS)
def test_flags_say_what_the_configuration_says(variant, tmp_path):
    longcat.build(variant, tmp_path)
    config = longcat.load_config(tmp_path)
    args = parse(megatron_flags(config))
    validate(scmoe_config_from_args(args), args)
    again = FORMAT.config(args, config["vocab_size"], config["vocab_size"])
    assert {k: again[k] for k in again.keys() & config.keys()} == {
        k: config[k] for k in again.keys() & config.keys()
    }


CHANGED_FIELDS = {
    "model_type": "deepseek_v3",
    "hidden_act": "gelu",
    "attention_bias": True,
    "attention_method": "GQA",
    "mla_scale_q_lora": False,
    "mla_scale_kv_lora": False,
    "zero_expert_type": "copy",
    "norm_topk_prob": True,
    "rope_scaling": {"type": "yarn", "factor": 4},
    "head_dim": 8,
    "qk_head_dim": 16,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7},
    "n_routed_experts": 0,
}


@pytest.mark.parametrize("field", CHANGED_FIELDS)
def test_configurations_that_cannot_be_expressed_are_refused_by_field(config, field):
    megatron_flags(config)
    with pytest.raises(ConversionError, match=rf"config\.json: {field} .*accepted: ") as caught:
        megatron_flags(config | {field: CHANGED_FIELDS[field]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["kv_lora_rank", "moe_topk", "vocab_size", "num_layers"])
def test_missing_fields_are_named(config, field):
    with pytest.raises(ConversionError, match=rf"config\.json: no {field}"):
        megatron_flags({k: v for k, v in config.items() if k != field})


CHANGED_ARGUMENTS = {
    "scmoe_tap": ("pos3", "--scmoe-tap"),
    "scmoe_combine": ("cg1", "--scmoe-combine"),
    "scmoe_router_norm": ("own", "--scmoe-router-norm"),
    "scmoe_mla_scale": (False, "--scmoe-mla-scale"),
    "scmoe_mla_norm_epsilon": (None, "--scmoe-mla-norm-epsilon"),
    "multi_latent_attention": (False, "--multi-latent-attention"),
    "moe_router_score_function": ("sigmoid", "--moe-router-score-function"),
    "moe_layer_freq": ([1, 0] * 3, "--moe-layer-freq"),
    "moe_shared_expert_intermediate_size": (99, "--moe-shared-expert-intermediate-size"),
}


@pytest.mark.parametrize("name", CHANGED_ARGUMENTS)
def test_models_that_are_no_longcat_are_refused_by_flag(config, name):
    args = parse(megatron_flags(config))
    value, flag = CHANGED_ARGUMENTS[name]
    setattr(args, name, value)
    with pytest.raises(ConversionError, match=f"^{flag} is "):
        FORMAT.config(args, config["vocab_size"], config["vocab_size"])


def drop(tensors, name):
    del tensors[name]


def add(tensors, name):
    tensors[name] = LazyTensor.full((3,), 0.0, torch.float32)


def shrink(tensors, name):
    tensors[name] = tensors[name].narrow(0, 0, 5)


DAMAGES = {
    "missing": (drop, "is missing"),
    "left over": (add, "is left over"),
    "of another shape": (shrink, r"has the shape \[5, "),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("back", [False, True], ids=["import", "export"])
def test_tensors_that_do_not_fit_are_named(folder, config, damage, back):
    tensors = read_safetensors(folder)
    name, convert = "model.layers.1.mlp.experts.2.up_proj.weight", to_megatron
    if back:
        tensors = to_megatron(config, tensors)
        name, convert = "decoder.layers.3.mlp.shared_experts.linear_fc1.weight", to_longcat
    convert(config, tensors)
    change, message = DAMAGES[damage]
    if damage == "left over":
        name = name.replace("1.", "9.", 1).replace("3.", "9.", 1)
    change(tensors, name)
    with pytest.raises(ConversionError, match=f"tensor {name} {message}"):
        convert(config, tensors)


def test_what_transformers_does_not_use_is_left_out_or_zero(folder, config):
    tensors = read_safetensors(folder)
    unused = "model.layers.0.mlp.experts.4.gate_proj.weight"
    without = {k: v for k, v in tensors.items() if k != unused}
    without["model.mtp.layers.0.eh_proj.weight"] = LazyTensor.full((3,), 0.0, torch.float32)
    assert FORMAT.left_out(config, without)[0] == "model.mtp.layers.0.eh_proj.weight"
    assert unused in FORMAT.left_out(config, tensors)
    found = to_megatron(config, without)
    assert found.keys() == to_megatron(config, tensors).keys()
    again = to_longcat(config, found)
    assert again.keys() == tensors.keys()
    assert not again[unused].load().any()
