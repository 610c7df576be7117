"""What config.json says of tensors, held against them: an import is what transformers loads."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_scmoe.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import ScMoEForCausalLM
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.upcycle import Upcycling, upcycle
from megatron_scmoe.errors import ConversionError
from tests import longcat, models

pytestmark = pytest.mark.slow

VOCAB = 301

SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GPT2 = dict(
    vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
SCMOE = dict(moe_intermediate_size=24, shared_expert_intermediate_size=48, num_experts=2)
LONGCAT = longcat.CONFIG | dict(vocab_size=VOCAB, num_layers=1)

FAMILIES = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, SIZES),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, SIZES),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, GPT2),
    "scmoe": (ScMoEForCausalLM, ScMoEConfig, SIZES | SCMOE),
    "longcat_flash": (
        transformers.LongcatFlashForCausalLM,
        transformers.LongcatFlashConfig,
        LONGCAT,
    ),
}
EMBEDDINGS = {"gpt2": "transformer.wte.weight"}


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    models.init_parallel()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes the folder of a small model of a family, not tied, once."""

    @cache
    def make(family: str) -> Path:
        kind, config, sizes = FAMILIES[family]
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp(family)
        kind(config(**sizes, tie_word_embeddings=False)).save_pretrained(folder)
        return folder

    return make


def change(folder: Path, target: Path, tensors=None, config=None) -> Path:
    """A copy with other tensors, by a function of all, and other fields in config.json."""
    shutil.copytree(folder, target)
    if tensors is not None:
        found = load_file(target / "model.safetensors")
        tensors(found)
        save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(fields | (config or {})))
    return target


def load_into_megatron(folder: Path, save: Path):
    """Import a folder, dense ones by upcycling; gives arguments, tensors and what was said."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind in ("scmoe", "longcat_flash"):
        lines = hf_to_megatron(folder, save)
    else:
        lines = upcycle(folder, save, Upcycling(num_experts=2, topk=1))
    checkpoint = read_megatron(save)
    return checkpoint.args, checkpoint.tensors, "\n".join(lines)


def refusal(folder: Path, save: Path) -> str:
    with pytest.raises(ConversionError) as refused:
        load_into_megatron(folder, save)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    assert not save.exists()
    return str(refused.value)


HEADS = {
    "tied, and no head in the files": (True, lambda t, e: t.pop("lm_head.weight")),
    "tied, and the same head": (True, lambda t, e: t.update({"lm_head.weight": t[e].clone()})),
    "tied, and another head": (True, lambda t, e: None),
    "tied, and the head alone": (True, lambda t, e: t.pop(e)),
    "tied, and another head by one value": (True, lambda t, e: one_value(t, e)),
    "not tied, and the same head": (False, lambda t, e: t.update({"lm_head.weight": t[e].clone()})),
}


def one_value(tensors, embedding):
    head = tensors[embedding].clone()
    head[-1, -1] += 0.5
    tensors["lm_head.weight"] = head


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "scmoe", "longcat_flash"])
def test_the_output_layer_is_the_one_of_transformers(folders, tmp_path, family, case):
    is_tied, tensors = HEADS[case]
    name = EMBEDDINGS.get(family, "model.embed_tokens.weight")
    folder = change(
        folders(family),
        tmp_path / "model",
        lambda found: tensors(found, name),
        dict(tie_word_embeddings=is_tied),
    )
    expected = FAMILIES[family][0].from_pretrained(folder)
    args, found, said = load_into_megatron(folder, tmp_path / "save")
    words = found["embedding.word_embeddings.weight"].load()[:VOCAB]
    head = found["output_layer.weight"].load()[:VOCAB] if "output_layer.weight" in found else words
    assert torch.equal(words, expected.get_input_embeddings().weight)
    assert torch.equal(head, expected.get_output_embeddings().weight)
    assert args.untie_embeddings_and_output_weights == ("output_layer.weight" in found)
    assert ("not tied, as transformers loads it" in said) == ("another head" in case)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_output_layer_that_transformers_would_make_up_is_refused(folders, tmp_path, family):
    folder = change(folders(family), tmp_path / "model", lambda t: t.pop("lm_head.weight"))
    told = refusal(folder, tmp_path / "save")
    assert "there is no tensor lm_head.weight, and tie_word_embeddings is false" in told


def rope_buffer(theta: float, dtype=torch.float32):
    """Puts into the files what older versions saved."""
    frequencies = theta ** -(torch.arange(0, 8, 2).float() / 8)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    return lambda tensors: tensors.update({name: frequencies.to(dtype)})


NOTES = {
    "a rope of another base": (
        "llama",
        rope_buffer(500.0),
        {},
        "not used, as in transformers: model.layers.0.self_attn.rotary_emb.inv_freq",
    ),
    "the rope of config.json": ("llama", rope_buffer(1e4), {}, None),
    "the rope of config.json in bf16": ("llama", rope_buffer(1e4, torch.bfloat16), {}, None),
    "an id outside": (
        "llama",
        None,
        dict(eos_token_id=[1, VOCAB]),
        f"not used: eos_token_id {VOCAB} of config.json is outside the vocabulary of {VOCAB}",
    ),
    "an id outside, ScMoE": (
        "scmoe",
        None,
        dict(pad_token_id=-1),
        "not used: pad_token_id -1 of config.json is outside",
    ),
    "another dtype": (
        "llama",
        None,
        dict(dtype="bfloat16"),
        "float32, as most of the tensors; config.json says bfloat16",
    ),
    "another dtype, LongCat": (
        "longcat_flash",
        None,
        dict(dtype="float16"),
        "config.json says float16",
    ),
    "norms of another dtype": (
        "qwen2",
        lambda t: t.update({k: v.double() for k, v in t.items() if "norm" in k}),
        {},
        "cast to float32: tensors of float64",
    ),
}


def test_json_has_one_kind_of_number(folders, tmp_path):
    config = dict(attention_dropout=0, initializer_range=1)
    folder = change(folders("scmoe"), tmp_path / "model", config=config)
    args, _, _ = load_into_megatron(folder, tmp_path / "save")
    assert (args.attention_dropout, args.init_method_std) == (0.0, 1.0)


@pytest.mark.parametrize("case", NOTES)
def test_what_is_imported_otherwise_than_written_is_said(folders, tmp_path, case):
    family, tensors, config, told = NOTES[case]
    folder = change(folders(family), tmp_path / "model", tensors, config)
    _, _, said = load_into_megatron(folder, tmp_path / "save")
    if told is None:
        assert "not used" not in said
    else:
        assert told in said


def test_the_embedding_does_not_decide_the_dtype(folders, tmp_path):
    """Weights in fp32 are not rounded because the embedding is in bf16."""
    name = "model.embed_tokens.weight"
    folder = change(
        folders("llama"), tmp_path / "model", lambda t: t.update({name: t[name].bfloat16()})
    )
    args, found, _ = load_into_megatron(folder, tmp_path / "save")
    assert args.params_dtype == torch.float32
    expected = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(found["decoder.final_layernorm.weight"].load(), expected)


@pytest.mark.parametrize("family", ["scmoe", "llama", "export"])
def test_a_weight_beyond_the_dtype_is_refused_not_made_infinite(folders, tmp_path, family):
    half = dict(dtype=torch.float16)
    folder = change(
        folders("llama" if family == "llama" else "scmoe"),
        tmp_path / "model",
        lambda t: t["model.norm.weight"][3:4].fill_(7e4),
    )
    with pytest.raises(ConversionError, match="a weight of 70000 does not fit in float16, whose"):
        if family == "llama":
            upcycle(folder, tmp_path / "save", Upcycling(num_experts=2, topk=1, **half))
        elif family == "scmoe":
            hf_to_megatron(folder, tmp_path / "save", **half)
        else:
            hf_to_megatron(folder, tmp_path / "whole")
            megatron_to_hf(tmp_path / "whole", tmp_path / "save", **half)
    assert not (tmp_path / "save").exists()


def split_files(folder: Path, weight_map=None, first=None) -> None:
    """Two files and their index, which may be wrong."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    half = len(names) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    where = {name: file for file, part in parts.items() for name in part}
    parts["a.safetensors"] = first(names, half) if first else parts["a.safetensors"]
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = dict(weight_map=where if weight_map is None else weight_map(where))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


INDICES = {
    "fits": (dict(), None),
    "a tensor in two files": (
        dict(first=lambda names, half: names[: half + 1]),
        "is in it, and model.safetensors.index.json says that it is in b.safetensors",
    ),
    "a tensor in no file": (
        dict(first=lambda names, half: names[: half - 1]),
        "which model.safetensors.index.json says is there",
    ),
    "a tensor left out": (
        dict(weight_map=lambda where: {k: v for k, v in where.items() if k != "model.norm.weight"}),
        "tensor model.norm.weight is not in model.safetensors.index.json",
    ),
    "a file that is not there": (
        dict(weight_map=lambda where: dict.fromkeys(where, "c.safetensors")),
        "c.safetensors: no such file (a missing shard)",
    ),
    "a file elsewhere": (
        dict(weight_map=lambda where: where | {"model.norm.weight": "../c.safetensors"}),
        "../c.safetensors is not a file of this folder",
    ),
    "nothing": (dict(weight_map=lambda where: {}), "index.json: it names no tensors"),
    "a list": (dict(weight_map=list), "not an index of safetensors files"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_is_what_the_files_hold(folders, tmp_path, case):
    how, told = INDICES[case]
    folder = change(folders("llama"), tmp_path / "model")
    split_files(folder, **how)
    if told is None:
        load_into_megatron(folder, tmp_path / "save")
    else:
        assert told in refusal(folder, tmp_path / "save")


def test_an_index_beside_the_whole_is_refused(folders, tmp_path):
    """transformers reads the one, and other tools the other."""
    folder = change(folders("llama"), tmp_path / "model")
    split_files(folder)
    shutil.copy(folders("llama") / "model.safetensors", folder)
    assert "transformers reads model.safetensors" in refusal(folder, tmp_path / "save")


FLAWS = {
    "quantised": (
        "llama",
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config",
    ),
    "quantised ScMoE": ("scmoe", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "head_dim": (
        "llama",
        {"head_dim": 16},
        "q_proj.weight has the shape [32, 32] instead of [64, 32]",
    ),
    "groups": (
        "qwen2",
        {"num_key_value_heads": 2},
        "k_proj.weight has the shape [256, 32] instead of [16",
    ),
    "more blocks": ("gpt2", {"n_layer": 4}, "h.2.attn.c_attn.weight is missing, by config.json"),
    "fewer blocks": ("scmoe", {"num_hidden_layers": 0}, "num_hidden_layers is 0; accepted: 1 or"),
    "positions": ("gpt2", {"n_positions": 32}, "wpe.weight has the shape [64, 32]"),
    "experts": ("scmoe", {"num_experts": 3}, "router.weight has the shape [2, 32] instead of [3"),
    "fewer experts": ("longcat_flash", {"n_routed_experts": 3, "zero_expert_num": 3}, "left over"),
    "biases": ("scmoe", {"linear_bias": True}, "bias is missing"),
    "query norms": ("scmoe", {"qk_norm": True}, "q_norm.weight is missing"),
    "a word": ("longcat_flash", {"moe_topk": "3"}, "moe_topk is '3'; accepted: int"),
    "a fraction": ("scmoe", {"num_experts_per_tok": 1.5}, "num_experts_per_tok is '1.5'"),
    "a list": ("scmoe", {"rope_parameters": [1]}, "rope_parameters is '[1]'; accepted"),
    "an unknown rope": ("llama", {"rope_parameters": {"rope_type": "foo"}}, "rope_type is foo"),
    "a rope's base in words": (
        "scmoe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
        "rope_parameters.rope_theta is '1e4'; accepted: a number above 0",
    ),
    "a rope of base 0": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        "rope_parameters.rope_theta is 0; accepted: a number above 0",
    ),
    "a rope of twice the head": (
        "scmoe",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2.0}},
        "rope_parameters.partial_rotary_factor is 2.0; accepted: a number above 0, at most 1",
    ),
    "a rope without its factor": (
        "scmoe",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 8192,
            }
        },
        "rope_parameters.factor is None; accepted: a number above 0",
    ),
    "tokens": ("scmoe", {"unpadded_vocab_size": 0}, "unpadded_vocab_size is 0; accepted: 1 or"),
    "not a number": ("scmoe", {"norm_eps": float("nan")}, "norm_eps is nan; accepted: a finite"),
}


@pytest.mark.parametrize("case", FLAWS)
def test_other_claims_are_refused_by_field_or_tensor(folders, tmp_path, case):
    family, config, told = FLAWS[case]
    folder = change(folders(family), tmp_path / "model", config=config)
    assert told in refusal(folder, tmp_path / "save")


EXTRA = {
    "a bias without its flag": ("llama", "model.layers.0.self_attn.o_proj.bias", (32,)),
    "a norm without its flag": ("qwen2", "model.layers.0.self_attn.q_norm.weight", (8,)),
    "a block too many": ("gpt2", "transformer.h.2.ln_1.weight", (32,)),
    "an expert too many": ("scmoe", "model.layers.1.mlp.experts.2.up_proj.weight", (24, 32)),
    "a bias of the head": ("longcat_flash", "lm_head.bias", (VOCAB,)),
}


@pytest.mark.parametrize("case", EXTRA)
def test_tensors_that_config_json_does_not_speak_of_are_refused(folders, tmp_path, case):
    family, name, shape = EXTRA[case]
    folder = change(
        folders(family), tmp_path / "model", lambda t: t.update({name: torch.ones(shape)})
    )
    assert name.split(".", 1)[1] in refusal(folder, tmp_path / "save")


def test_a_tensor_with_and_without_prefix_is_refused(folders, tmp_path):
    folder = change(
        folders("gpt2"),
        tmp_path / "model",
        lambda t: t.update({"wte.weight": torch.ones(VOCAB, 32)}),
    )
    assert "transformer.wte.weight is there with and without" in refusal(folder, tmp_path / "save")


def test_an_adapter_beside_the_weights_is_refused(folders, tmp_path):
    """transformers would add it to them."""
    folder = change(folders("llama"), tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    assert "accepted: a folder with the adapter merged" in refusal(folder, tmp_path / "save")
