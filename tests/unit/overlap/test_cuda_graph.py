"""A function in several graphs; no CPU has one, so stand-ins tell what they are asked for."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from megatron_scmoe.overlap import cuda_graph


@pytest.fixture
def events():
    """What happens, with graphs that tell."""
    found: list[str] = []

    class Graph:
        number = 0

        def __init__(self):
            Graph.number += 1
            self.name = f"graph {Graph.number}"

        def capture_begin(self, pool, capture_error_mode):
            found.append(f"{self.name} begins")

        def capture_end(self):
            found.append(f"{self.name} ends")

        def replay(self):
            found.append(f"{self.name} replays")

    with (
        mock.patch.object(torch.cuda, "CUDAGraph", Graph),
        mock.patch.object(cuda_graph, "beside_compute", nullcontext),
    ):
        yield found


def test_what_a_graph_cannot_have_is_done_between_two(events):
    result = torch.zeros(1)

    def run() -> torch.Tensor:
        events.append("one")
        cuda_graph.between_graphs(lambda: events.append("the host looks"))
        events.append("two")
        return result

    replay = cuda_graph.capture(run, None)
    warm_up = ["one", "the host looks", "two"]
    capture = ["graph 1 begins", "one", "graph 1 ends", "graph 2 begins", "two", "graph 2 ends"]
    assert events == warm_up * cuda_graph.WARM_UPS + capture
    events.clear()
    assert replay() is result
    assert events == ["graph 1 replays", "the host looks", "graph 2 replays"]


def test_a_capture_that_fails_is_over(events):
    def run() -> torch.Tensor:
        if cuda_graph.is_capturing():
            raise RuntimeError("operation not permitted")
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graph.capture(run, None)
    assert events == ["graph 1 begins", "graph 1 ends"]
    assert not cuda_graph.is_capturing()
    cuda_graph.between_graphs(lambda: events.append("done at once"))
    assert events[-1] == "done at once"
