"""Experts on the host: the same text to the last bit, and models that would not fit."""

import resource
from pathlib import Path

import pytest
import torch
from megatron.core.inference.sampling_params import SamplingParams

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.inference import generation, offloading
from megatron_scmoe.inference.offloading import ExpertOffload, OffloadSettings
from megatron_scmoe.training import load_model
from tests import checkpoints
from tests.harness import RankFailure, run_distributed

PROMPTS = [[5, 9, 2, 7, 1, 1, 3], [4, 8], [6, 6, 6]]
TOKENS = 6
VARIANTS = (
    "pos2",
    "every block",
    "biases, no shared expert, no positions",
    "pos3, shared norm, CG-2",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoints of models with random weights, saved from two ranks."""
    folder = tmp_path_factory.mktemp("models")
    run_distributed(checkpoints.save_all, 2, str(folder), "EP2", list(VARIANTS))
    return folder


def write(load: Path, settings: OffloadSettings | None = None, *, dtype=None, **layout):
    """What is written behind the prompts, log-probabilities in all bits, and the offload."""
    checkpoint = load_model.Checkpoint(str(load))
    offload = None if settings is None else ExpertOffload(settings)
    model = load_model.build_model(checkpoint, load_model.Layout(**layout), dtype, offload)
    if offload is not None:
        offload.attach(model, checkpoint.path, len(PROMPTS))
    sampling = SamplingParams(num_tokens_to_generate=TOKENS, top_k=1, return_log_probs=True)
    found = generation.generate(
        model, PROMPTS, sampling, checkpoints.models.VOCAB, micro_batch=len(PROMPTS)
    )
    return found, offload


@pytest.mark.parametrize("variant", VARIANTS)
def test_offloaded_experts_write_the_same_bits(models, tmp_path, variant):
    run_distributed(_same_bits, 1, models / variant, tmp_path)


def _same_bits(load: Path, folder: Path) -> None:
    resident, _ = write(load)
    for settings in (
        OffloadSettings(folder=folder / "a"),
        OffloadSettings(folder=folder / "a", cache_gb=1.0),
        OffloadSettings(folder=folder / "a", layers=1),
    ):
        found, _ = write(load, settings)
        assert found == resident, settings
