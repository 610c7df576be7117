"""Tables of weights: how rows are read, how tensors are made, and that models have these tensors."""

import pytest
import torch
import transformers

from megatron_scmoe.checkpoints import parameter_transforms as transforms
from megatron_scmoe.checkpoints.formats import gpt2, llama, scmoe
from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import ScMoEForCausalLM
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.parameter_mapping import ParamMapping, Row, Table
from megatron_scmoe.errors import ConversionError
from tests import hf

TABLE = Table("decoder.{block}.", "h.{block}.", (
    Row("proj.*", {"o.*": "out 3"}, bias="biases"),
    Row("gate", {"gate.weight": "1 3"}, when="has_gate"),
    Row("experts.fc1.*",
        {"{expert}.gate.*": "ffn 3", "{expert}.up.*": "ffn 3"}, transforms.EXPERTS, bias="biases"),
))  # fmt: skip
SIZES = dict(out=2, ffn=4, experts=2, biases=False, has_gate=False)


def test_rows_are_filled_in_with_numbers_and_sizes():
    mapping = ParamMapping(TABLE.fill(SIZES, block=7))
    assert mapping.hf_shapes == {
        "h.7.o.weight": (2, 3),
        "h.7.0.gate.weight": (4, 3),
        "h.7.0.up.weight": (4, 3),
        "h.7.1.gate.weight": (4, 3),
        "h.7.1.up.weight": (4, 3),
    }
    assert mapping.megatron_shapes == {
        "decoder.7.proj.weight": (2, 3),
        "decoder.7.experts.fc1.weight": (2, 8, 3),
    }


def test_biases_and_tensors_that_only_some_models_have():
    mapping = ParamMapping(TABLE.fill(SIZES | dict(biases=True, has_gate=True), block=0))
    assert mapping.hf_shapes["h.0.gate.weight"] == (1, 3)
    assert mapping.hf_shapes["h.0.o.bias"] == (2,)
    assert mapping.megatron_shapes["decoder.0.experts.fc1.bias"] == (2, 8)


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_every_tensor_is_used_once(change):
    mapping = ParamMapping(TABLE.fill(SIZES, block=0))
    tensors = {
        name: LazyTensor.full(s, 1.0, torch.float32) for name, s in mapping.hf_shapes.items()
    }
    found = mapping.to_megatron(tensors)
    for side, convert in ((tensors, mapping.to_megatron), (found, mapping.to_hf)):
        name = next(iter(side))
        changed = {k: v for k, v in side.items() if k != name}
        if change == "left over":
            name, changed = "another", side | {"another": side[name]}
        with pytest.raises(ConversionError, match=f"tensor {name} is {change}"):
            convert(changed)


HEADS, GROUPS, HEAD, HIDDEN = 4, 2, 3, 5
Q, K, V = (torch.randn(rows * HEAD, HIDDEN) for rows in (HEADS, GROUPS, GROUPS))
BY_GROUP = torch.cat([Q[:6], K[:3], V[:3], Q[6:], K[3:], V[3:]])
"""Two query heads of three rows for each group, its key, its value."""
A, B, C, D = (torch.randn(2, 3) for _ in range(4))
FUSED = torch.randn(3 * HEADS * HEAD, HIDDEN)
ALL_HEADS = [FUSED[12 * kind + 3 * head :][:3] for head in range(4) for kind in range(3)]

TRANSFORMS = {
    "SAME": ([A], A),
    "FP32": ([A], A),
    "TRANSPOSED": ([A], A.T),
    "GATE_UP": ([A, B], torch.cat([A, B])),
    "QKV": ([Q, K, V], BY_GROUP),
    "FUSED_QKV_TRANSPOSED": ([FUSED.T.contiguous()], torch.cat(ALL_HEADS)),
    "EXPERTS": ([A, B, C, D], torch.stack([torch.cat([A, B]), torch.cat([C, D])])),
    "EXPERTS of one tensor": ([A, B], torch.stack([A, B])),
    "QKV of biases": ([Q[:, 0], K[:, 0], V[:, 0]], BY_GROUP[:, 0]),
    "TRANSPOSED of a bias": ([A[0]], A[0]),
}
"""Hugging Face's tensors, and Megatron's."""


@pytest.mark.parametrize("case", TRANSFORMS)
def test_a_transform_makes_megatrons_tensor_and_takes_it_apart_again(case):
    parts, whole = TRANSFORMS[case]
    transform = getattr(transforms, case.partition(" ")[0])
    sizes = dict(experts=2, head=HEAD, groups=HEADS if "FUSED" in case else GROUPS)
    joined = transform.join([LazyTensor.from_tensor(part) for part in parts], sizes)
    assert torch.equal(joined.load(), whole)
    again = transform.split(LazyTensor.from_tensor(whole), len(parts), sizes)
    for part, expected in zip(again, parts, strict=True):
        assert torch.equal(part.load(), expected)


def shapes_of(model: torch.nn.Module, is_tied: bool) -> dict[str, tuple[int, ...]]:
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {
        name: shape for name, shape in state.items() if not (is_tied and name == "lm_head.weight")
    }


BIASED = dict(linear_bias=True, qk_norm=True, norm_type="LayerNorm", post_norm=True)


@pytest.mark.parametrize("changes", [*hf.VARIANTS.values(), BIASED, dict(qkv_bias=True)], ids=str)
def test_the_tables_of_scmoe_are_what_the_modelling_code_has(changes):
    config = ScMoEConfig(**(hf.BASE | changes))
    with torch.device("meta"):
        expected = shapes_of(ScMoEForCausalLM(config), config.tie_word_embeddings)
    assert scmoe.mapping(config).hf_shapes == expected


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
LLAMAS = SMALL | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
DENSE = {
    "llama": (llama, LLAMAS),
    "mistral": (llama, LLAMAS),
    "qwen2": (llama, SMALL | dict(num_attention_heads=4, num_key_value_heads=2)),
    "qwen3": (llama, LLAMAS),
    "gpt2": (gpt2, dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48)),
}


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", DENSE)
def test_the_tables_of_dense_families_are_what_transformers_has(family, is_tied):
    module, sizes = DENSE[family]
    config = transformers.AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        expected = shapes_of(transformers.AutoModelForCausalLM.from_config(config), is_tied)
    assert module.mapping(config, is_tied).hf_shapes == expected
