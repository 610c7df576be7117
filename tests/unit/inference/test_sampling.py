"""One token from logits, whatever temperature a client asks for."""

import pytest
import torch

from megatron_scmoe.inference.sampling import choose, random_numbers
from megatron_scmoe.inference.slots import Text

LOGITS = torch.tensor([0.5, 90.0, -90.0, 89.0])


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-30, 1e-3])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    sampling = Text(0, (1,), temperature=temperature, top_k=0)
    assert {choose(LOGITS, sampling, random_numbers(0, i)) for i in range(9)} == {1}


def test_a_high_temperature_takes_any():
    sampling = Text(0, (1,), temperature=1e30, top_k=0)
    assert {choose(LOGITS, sampling, random_numbers(0, i)) for i in range(99)} == {0, 1, 2, 3}
