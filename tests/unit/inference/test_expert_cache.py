"""Which experts are on the device, and whose place others take."""

import pytest
import torch

from megatron_scmoe.inference.expert_cache import Counts, ExpertCache
from megatron_scmoe.inference.expert_store import Packing, PinnedExperts

LAYERS, EXPERTS = 2, 6
PACKING = Packing({"linear_fc1.weight": (4, 3), "linear_fc2.weight": (3, 2)}, torch.float32)


def value(key) -> float:
    layer, expert = key
    return 10.0 * layer + expert


@pytest.fixture
def host() -> PinnedExperts:
    """Experts whose weights are all the same number."""
    memory = {}
    for layer in range(1, LAYERS + 1):
        memory[layer] = torch.zeros(EXPERTS, PACKING.nbytes, dtype=torch.uint8)
        for expert, row in enumerate(memory[layer]):
            for view in PACKING.views(row).values():
                view.fill_(value((layer, expert)))
    return PinnedExperts(memory)


def use(cache: ExpertCache, *keys) -> None:
    for key in keys:
        for weight, shape in zip(cache.take(key), PACKING.shapes.values(), strict=True):
            assert weight.shape == shape and weight.eq(value(key)).all()
        cache.release(key)


def copied(cache: ExpertCache) -> int:
    return cache.counts.copied_bytes // PACKING.nbytes


def test_what_is_taken_is_what_was_asked_for(host):
    cache = ExpertCache(PACKING, 2, host)
    for key in [(1, 0), (2, 5), (1, 3), (1, 0), (1, 0)]:
        cache.request([key])
        use(cache, key)
    assert copied(cache) == 4


def test_experts_of_one_request_do_not_make_room_for_each_other(host):
    cache = ExpertCache(PACKING, 2, host)
    keys = [(1, expert) for expert in range(4)]
    assert not cache.request(keys)
    assert copied(cache) == 2
    for position, key in enumerate(keys):
        cache.request(keys[position:])
        use(cache, key)
    assert copied(cache) == 4
    assert cache.counts.uses == 4 and cache.counts.hits == 0


def test_a_second_use_is_a_hit(host):
    cache = ExpertCache(PACKING, 3, host)
    assert cache.request([(1, 0), (1, 1)])
    use(cache, (1, 0), (1, 1), (1, 0))
    assert cache.counts == Counts(uses=3, hits=1, copied_bytes=2 * PACKING.nbytes)


@pytest.mark.parametrize(
    "policy, gone", [("lru", (1, 0)), ("frequency", (1, 1))], ids=["lru", "frequency"]
)
def test_which_expert_makes_room(host, policy, gone):
    """The first was used twice, the second once and later."""
    cache = ExpertCache(PACKING, 2, host, policy)
    use(cache, (1, 0), (1, 0), (1, 1), (2, 2))
    kept = ({(1, 0), (1, 1)} - {gone}).pop()
    before = copied(cache)
    use(cache, kept)
    assert copied(cache) == before
    use(cache, gone)
    assert copied(cache) == before + 1
