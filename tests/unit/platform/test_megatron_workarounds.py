"""Gaps of Megatron: flags that would not get into its configuration, and what checkouts ask for."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from megatron.core.datasets import utils
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import transformer_block

from megatron_scmoe.platform import megatron_workarounds
from megatron_scmoe.platform.command_line import UsageError
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


def test_a_block_takes_a_function_as_its_spec(monkeypatch):
    stages = []

    def spec(config, vp_stage):
        stages.append(vp_stage)
        return get_gpt_decoder_block_spec(config, use_transformer_engine=False, pp_rank=0)

    submodules = transformer_block._get_block_submodules
    monkeypatch.setattr(transformer_block, "_get_block_submodules", submodules)
    megatron_workarounds.call_specs()
    found = transformer_block._get_block_submodules(configuration(), spec, 0, 0)
    assert stages == [0]
    assert len(found.layer_specs) == 4
    assert transformer_block._get_block_submodules(configuration(), found) is found


class TestDatasetHelperOfACheckout:
    """Its Makefile names files and headers by the ``python3`` that it finds."""

    MAKEFILE = """OUT = helpers_cpp$(LIBEXT)
LIBEXT = $(shell python3-config --extension-suffix)
default: $(OUT)
$(OUT):
\tpython3 -c "import sys; print(sys.executable)" > $@
"""

    @pytest.fixture
    def checkout(self, tmp_path, monkeypatch):
        (tmp_path / "Makefile").write_text(self.MAKEFILE)
        monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
        monkeypatch.setenv("PATH", os.defpath)
        monkeypatch.setenv("MAKEFLAGS", "")
        return tmp_path

    def test_is_built_for_this_python(self, checkout):
        megatron_workarounds._use_built_dataset_helper()
        subprocess.run(["make", "-C", str(checkout)], check=True)  # as compile_helpers does
        built = checkout / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
        assert os.path.dirname(built.read_text().strip()) == os.path.dirname(sys.executable)

    def test_what_is_missing_is_said_before_the_run(self, checkout, monkeypatch):
        monkeypatch.setattr(shutil, "which", lambda name: name)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UsageError, match=r"there is no pybind11; accepted: .*pip install"):
            megatron_workarounds._use_built_dataset_helper()
