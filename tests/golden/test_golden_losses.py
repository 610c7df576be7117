"""Training gives the losses that it gave before: to the last bit where the machine is of the type
that the kept losses are from, nearly so elsewhere."""

import pytest

from tests.golden import runs

OTHER_MACHINE = 1e-2
"""Of losses and gradient norms, relative, on another CPU or PyTorch: sums run in another order."""


@pytest.mark.parametrize("name", runs.RUNS)
def test_losses_and_gradient_norms_are_the_kept_ones(name):
    machine, kept = runs.read()
    series = runs.train(name)
    if machine != runs.machine_type():
        kept[name] = {key: pytest.approx(kept[name][key], rel=OTHER_MACHINE) for key in kept[name]}
    assert series == kept[name]
