"""What inspect says of a LongCat-Flash folder is what the model has."""

import pytest
import torch
from safetensors.torch import load_file, save_file

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
