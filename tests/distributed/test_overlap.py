"""Overlap on and off, on two expert-parallel ranks: the same bits, in the intended order."""

import hashlib

import pytest
import torch

from megatron_scmoe.config import DEFAULT_EXPERT_SLOT, ScMoEConfig
from megatron_scmoe.overlap import async_all_to_all
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, Boundary, Step, build_schedule, num_slots
from tests import models
from tests.harness import run_distributed

EP2 = models.LAYOUTS["EP2"]
STEPS = 20


@pytest.fixture(scope="module")
def digests():
    """Loss and gradient digests by rank, then by (tap, slot, overlap)."""
    return run_distributed(_train_all, 2)


@pytest.mark.parametrize(
    "tap,slot", [(tap, slot) for tap in TAP_BOUNDARY for slot in range(num_slots(tap))]
)
def test_bit_identical_losses_and_gradients(digests, tap, slot):
    for rank in (0, 1):
        overlapped = digests[rank][tap, slot, True]
        serial = digests[rank][tap, slot, False]
        assert overlapped == serial
        assert len(set(overlapped)) == len(overlapped), "training must change the gradients"


def test_every_slot_gives_the_same_bits(digests):
    for tap in TAP_BOUNDARY:
        runs = [digests[0][tap, slot, True] for slot in range(num_slots(tap))]
        shortest = min(len(run) for run in runs)
        assert len({tuple(run[:shortest]) for run in runs}) == 1


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_change_sums_by_rounding_only(chunked, chunks):
    """The experts' weight gradients are summed in another order; all else is the same sums."""
    whole_loss, whole = chunked[1]
    loss, gradients = chunked[chunks]
    assert loss == pytest.approx(whole_loss, abs=1e-6)
    for name, gradient in gradients.items():
        assert abs(gradient - whole[name]).max() <= 1e-5 * max(1e-3, abs(whole[name]).max()), name


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_overlapped_and_serial_give_the_same_bits(chunked, chunks):
    serial_loss, serial = chunked[-chunks]
    loss, gradients = chunked[chunks]
    assert loss == serial_loss
    assert all((gradients[name] == serial[name]).all() for name in serial)


@pytest.fixture(scope="module")
def chunked():
    """Loss and gradients of the first rank by number of chunks, negative without overlap."""
    return run_distributed(_one_step_in_chunks, 2)[0]


def _one_step_in_chunks() -> dict:
    found = {}
    for chunks in (1, 2, 3, -2, -3):
        scmoe = ScMoEConfig(chunks=abs(chunks), overlap=chunks > 0)
        (model,) = models.build_scmoe(scmoe, EP2)
        loss, gradients = models.loss_and_gradients(
            model, *models.batch(torch.distributed.get_rank())
        )
        found[chunks] = (loss.item(), {n: g.numpy() for n, g in gradients.items()})
    return found


def _train_all() -> dict:
    digests = {}
    for tap in TAP_BOUNDARY:
        for slot in range(num_slots(tap)):
            steps = STEPS if slot == DEFAULT_EXPERT_SLOT[tap] else 4
            for overlap in (True, False):
                scmoe = ScMoEConfig(tap=tap, expert_slot=slot, overlap=overlap)
                digests[tap, slot, overlap] = _train(scmoe, steps)
    return digests


def _train(scmoe, steps: int) -> list[str]:
    """A digest of loss and all gradients for each of ``steps`` steps of gradient descent."""
    (model,) = models.build_scmoe(scmoe, EP2, hidden_dropout=0.1, attention_dropout=0.1)
    rank = torch.distributed.get_rank()
    digests = []
    for step in range(steps):
        loss, gradients = models.loss_and_gradients(model, *models.batch(2 * step + rank))
        digest = hashlib.sha256(loss.numpy().tobytes())
        for name in sorted(gradients):
            digest.update(gradients[name].numpy().tobytes())
        digests.append(digest.hexdigest())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.1 * gradients[name]
    return digests


FORWARD_OF = {
    "attention": ("decoder.layers.0.self_attention", "linear_proj"),
    "mlp": ("decoder.layers.0.mlp", "linear_fc2"),
    "second attention": ("decoder.layers.1.self_attention", "linear_proj"),
    "shared expert": ("decoder.layers.1.mlp.shared_experts", "linear_fc2"),
}
"""Where each backbone operator ends in forward, which is where it begins in backward."""


@pytest.mark.parametrize("tap", TAP_BOUNDARY)
def test_recorded_order_of_launches_computes_and_waits(tap):
    for (slot, chunks), (forward, backward) in run_distributed(_record_all, 2, tap)[0].items():
        schedule = build_schedule(tap, slot, overlap=True, chunks=chunks)
        assert forward == schedule.events()
        assert backward == _mirrored(schedule.sequence())


def _mirrored(sequence: list) -> list[str]:
    """The backward's order: the forward's, reversed, with launch and wait exchanged."""
    mirror = {
        Step.WAIT_COMBINE: "launch combine backward",
        Step.LAUNCH_COMBINE: "wait combine backward",
        Step.WAIT_DISPATCH: "launch dispatch backward",
        Step.LAUNCH_DISPATCH: "wait dispatch backward",
        Step.EXPERTS: "experts",
    }
    untraced = {Step.ROUTE, Step.PERMUTE, Step.UNPERMUTE}
    events = []
    for item in reversed(sequence):
        if isinstance(item, str):
            events.append(item)
        elif item.step not in untraced:
            events.append(mirror[item.step])
    return events


def _record_all(tap: str) -> dict[tuple[int, int], tuple[list[str], list[str]]]:
    recorded = {}
    for slot in range(num_slots(tap)):
        for chunks in (1, 2):
            scmoe = ScMoEConfig(tap=tap, expert_slot=slot, combine="add", chunks=chunks)
            (model,) = models.build_scmoe(scmoe, EP2, num_layers=2)
            recorded[slot, chunks] = _record(model)
    return recorded


def _record(model) -> tuple[list[str], list[str]]:
    """What one forward and backward of the first pair did, in order, as seen from outside.

    Backbone operators are seen by hooks at their last linear layer, the routed steps by the path's
    own hook, the halves of the reverse exchanges by the exchanges that made them.
    """
    forward, backward = [], []
    layers = dict(model.named_modules())
    path = layers["decoder.layers.1"].path
    path.on_action = lambda action: forward.append(path.schedule.label(action))
    for operator, (block, last) in FORWARD_OF.items():
        linear = layers[f"{block}.{last}"]
        linear.register_forward_hook(lambda *_, operator=operator: forward.append(operator))
        linear.register_full_backward_hook(lambda *_, o=operator: backward.append(o))
    expert = layers["decoder.layers.1.mlp.experts.local_experts.0"]
    expert.register_full_backward_hook(lambda *_: backward.append("experts"))

    class Recording(async_all_to_all.AllToAll):
        def launch_backward(self, grads):
            backward.append(f"launch {self.name} backward")
            return super().launch_backward(grads)

        def wait_backward(self):
            backward.append(f"wait {self.name} backward")
            return super().wait_backward()

    for dispatcher in layers["decoder.layers.1.mlp"].token_dispatchers:
        dispatcher.exchange = Recording
    models.loss_and_gradients(model, *models.batch(torch.distributed.get_rank()))
    return forward, backward


def test_all_boundaries_are_announced_in_order():
    (model,) = run_distributed(_announced, 1)
    assert model == list(Boundary)


def _announced() -> list[Boundary]:
    (model,) = models.build_scmoe(ScMoEConfig(), num_layers=2)
    path = dict(model.named_modules())["decoder.layers.1"].path
    seen = []
    passed = path.passed
    path.passed = lambda boundary, *args: (seen.append(boundary), passed(boundary, *args))
    models.forward(model, *models.batch(0))
    return seen
