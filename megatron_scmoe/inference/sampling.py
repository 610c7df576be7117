"""One token from logits, with random numbers that belong to one text."""

from typing import Protocol

import numpy as np
import torch
from megatron.core.inference.sampling.torch_sampling import TorchSampling
from torch import Tensor


class Sampling(Protocol):
    """How a token is chosen; Megatron's ``SamplingParams`` is such."""

    @property
    def temperature(self) -> float:
        """It divides the logits."""

    @property
    def top_k(self) -> int:
        """Among how many of the likeliest tokens; 1 takes the likeliest, 0 is all."""

    @property
    def top_p(self) -> float:
        """Among the likeliest tokens that have this probability together; 0 is all."""


COLDEST = 1e-30
"""The lowest temperature: logits divided by a lower one are infinite, and no distribution."""


def choose(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """A token, from logits fp32 [v]."""
    temperature = max(sampling.temperature, COLDEST)
    chosen = TorchSampling.sample_from_logits(
        logits[None], temperature, sampling.top_k, sampling.top_p, generator=random
    )
    return int(chosen)


def likeliest(log_probs: Tensor, count: int) -> list[tuple[int, float]]:
    """The ``count`` likeliest ids with their log-probabilities, best first, from [v]."""
    best = log_probs.topk(count)
    return list(zip(best.indices.tolist(), best.values.tolist()))


def random_numbers(seed: int, index: int) -> torch.Generator:
    """Those of text number ``index``, unlike those of the others with the same seed."""
    (state,) = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)
