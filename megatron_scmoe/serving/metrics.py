"""What a server tells Prometheus."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from megatron_scmoe.inference.engine import Engine
from megatron_scmoe.inference.offloading import ExpertOffload

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, and what its engine does at the moment."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        for name, about, value in (
            ("texts_running", "Texts that are being written", lambda: engine.running),
            ("texts_waiting", "Texts that wait for a slot", lambda: engine.waiting),
            ("slots", "Texts that are written at once, at most", lambda: engine.size),
        ):
            Gauge(f"scmoe_{name}", about, registry=self._registry).set_function(value)
        if engine.experts is not None:
            self._registry.register(_Experts(engine.experts))
        self.requests = Counter(
            "scmoe_requests",
            "Answers by path and status",
            ["path", "status"],
            registry=self._registry,
        )
        self.texts = Counter(
            "scmoe_texts", "Texts by what ended them", ["reason"], registry=self._registry
        )
        self.prompt_tokens = Counter(
            "scmoe_prompt_tokens", "Tokens of prompts that were read", registry=self._registry
        )
        self.tokens = Counter(
            "scmoe_generated_tokens", "Tokens that were written", registry=self._registry
        )
        self.first_token = Histogram(
            "scmoe_first_token_seconds",
            "From a request to the first token of each text",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.whole_text = Histogram(
            "scmoe_text_seconds",
            "From a request to the end of each text",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


@dataclass(frozen=True)
class _Experts(Collector):
    """What the caches of offloaded experts have done, on all ranks, up to the last step."""

    offload: ExpertOffload

    def collect(self) -> Iterator[Metric]:
        found = self.offload.totals
        for name, about, value in (
            ("uses", "Uses of an offloaded expert", found.uses),
            ("hits", "Those that found it on the device", found.hits),
            ("copied_bytes", "Bytes of experts that were copied", found.copied_bytes),
            ("wait_seconds", "How long compute waited for copies", found.waited_ms / 1e3),
        ):
            yield CounterMetricFamily(f"scmoe_expert_{name}", about, value)
