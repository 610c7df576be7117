"""What inspect says of a LongCat-Flash folder is what the model has."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from megatron_scmoe.checkpoints.inspect import describe
from megatron_scmoe.errors import ConversionError
from tests import longcat, models


@pytest.mark.parametrize("variant", ["zero experts", "router bias, three layers"])
def test_a_longcat_folder_has_the_parameters_of_its_model(tmp_path, variant):
    folder = tmp_path / "longcat"
    longcat.build(variant, folder)
    file = folder / "model.safetensors"
    prediction = {"model.mtp.embed_tokens.weight": torch.ones(3, 5)}
    save_file(load_file(file) | prediction, file, metadata={"format": "pt"})
    models.init_parallel()
    model = longcat.build_megatron(longcat.load_config(folder))
    total = sum(parameter.numel() for parameter in model.parameters())
    checkpoint = longcat.import_folder(folder, tmp_path / "megatron")
    for lines in (describe(folder), describe(checkpoint)):
        (said,) = (line for line in lines if line.startswith("parameters"))
        assert said.split()[1] == f"{total:,}"
    assert any("not used" in line and "model.mtp." in line for line in describe(folder))


def test_active_parameters_of_a_mixtral(tmp_path):
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, num_attention_heads=2)
    config = MixtralConfig(**sizes, **experts, num_key_value_heads=2, head_dim=8)
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = 2 * 4 * 3 * 16 * 24
    (said,) = (line for line in describe(tmp_path) if line.startswith("parameters"))
    assert f"{total:,} (" in said and f"active {total - routed // 2:,} (" in said


def test_a_model_folder_has_nothing_to_verify(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match=f"--verify {tmp_path}: a model folder has no checks"):
        describe(tmp_path, verify=True)


def test_checksums_are_verified_if_asked_for(tmp_path):
    longcat.build("zero experts", tmp_path / "longcat")
    checkpoint = longcat.import_folder(tmp_path / "longcat", tmp_path / "megatron")
    assert describe(checkpoint, verify=True)[-1].split() == (
        ["checksums", *"those of every tensor hold".split()]
    )
    assert not any(line.startswith("checksums") for line in describe(checkpoint))

    (shard, *_) = sorted(checkpoint.rglob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConversionError, match=f"{shard} is damaged: "):
        describe(checkpoint, verify=True)
