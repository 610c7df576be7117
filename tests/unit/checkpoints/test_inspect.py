"""What inspect says of a LongCat-Flash folder is what the model has."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_scmoe.checkpoints.inspect import describe
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
