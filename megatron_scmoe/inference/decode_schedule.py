"""The schedule of a decode: with one token of each text there may be too little to hide behind.

Prefills keep the model's own schedule, that of training's forward. Of a decode both are tried on its
first tokens, as both give the same bits, and the faster one is kept; for each power of two of texts
anew, as what pays for many may not pay for one.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from megatron.core import parallel_state

from megatron_scmoe.config import (
    AUTO,
    OFF,
    ON,
    OVERLAPPED,
    SERIAL,
    DecodeGraphsUse,
    DecodePadding,
    DecodeSchedule,
)
from megatron_scmoe.errors import ScMoEConfigError, in_words
from megatron_scmoe.inference import decode_graphs
from megatron_scmoe.inference.decode_graphs import Key
from megatron_scmoe.inference.expert_padding import ExpertPadding
from megatron_scmoe.model.layer_spec import resolve_schedule
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.schedule import Schedule

ROUNDS = 3
"""Tokens of each schedule that count, in turns, behind one of each that does not."""

clock = time.perf_counter
"""Seconds. A token's logits are on the host when it ends, so the host's time is the GPU's."""


@dataclass
class _Trial:
    """Seconds of the tokens of one number of texts, and what was kept."""

    left: list[str] = field(default_factory=lambda: [OVERLAPPED, SERIAL] * (ROUNDS + 1))
    took: dict[str, list[float]] = field(default_factory=lambda: {OVERLAPPED: [], SERIAL: []})
    kept: str | None = None


class Decode:
    """What schedule each token of a decode has, and whether experts are padded; all ranks ask in step.

    Args:
        model: this rank's part of it. Without a ScMoE layer that overlaps, or with all experts on each
            rank, there is nothing to choose, and nothing is tried.
        wanted: ``auto``, or the schedule to have.
        padding: see :class:`ExpertPadding`.
        graphs: whether tokens are computed in CUDA graphs (decode_graphs.py); ``auto`` does where it
            can.

    Raises:
        ScMoEConfigError: if ``on`` is wanted of a model that cannot.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        wanted: DecodeSchedule = AUTO,
        padding: DecodePadding = AUTO,
        graphs: DecodeGraphsUse = AUTO,
    ):
        layers = [module for module in model.modules() if isinstance(module, ScMoELayer)]
        self._layers = [layer for layer in layers if layer.scmoe.overlap]
        self._schedules: dict[str, list[Schedule]] = {
            OVERLAPPED: [layer.path.schedule for layer in self._layers],
            SERIAL: [
                resolve_schedule(replace(layer.scmoe, overlap=False)) for layer in self._layers
            ],
        }
        can_pay = any(layer.config.expert_model_parallel_size > 1 for layer in layers)
        self._wanted = OVERLAPPED if wanted == AUTO and not can_pay else wanted
        self._trials: dict[int, _Trial] = {}
        self._padding = ExpertPadding(model, padding)
        reason = None if graphs == OFF else self._why_no_graphs(model, padding)
        if graphs == ON and reason:
            raise ScMoEConfigError(f"--decode-cuda-graphs {ON}", reason, f"{AUTO}, {OFF}")
        self._counts = True
        self._graphs_are_wanted = graphs == ON
        self.in_graphs = graphs != OFF and reason is None
        """Whether tokens are computed in graphs, where there are not too many."""

    @contextmanager
    def token(self, texts: int, rows: int | None) -> Iterator[Key | None]:
        """Give the model the schedule of one token, and its own one back.

        What is given is the graph to compute it in; None for none.

        Args:
            texts: how many texts of all ranks have one; the same number on every rank.
            rows: how many tokens each rank reads at once; None if one reads more than another, which
                cannot be padded.
        """
        tried = self._trials.setdefault(texts.bit_length(), _Trial())
        name = self._wanted if self._wanted != AUTO else tried.kept or tried.left[0]
        self._set(name)
        pads = rows is not None and self._pads(rows)
        if pads:
            self._padding.set(True)
        self._counts = True
        began = clock()
        try:
            yield (rows, name) if rows is not None and self.fits_graph(rows) else None
            took = clock() - began
        finally:
            self._set(OVERLAPPED)
            if pads:
                self._padding.set(False)
        if self._wanted == AUTO and tried.kept is None and self._counts:
            tried.took[tried.left.pop(0)].append(took)
            if not tried.left:
                tried.kept = _faster(tried)

    def fits_graph(self, rows: int) -> bool:
        """Whether a token of so many rows on each rank is computed in a graph."""
        return self.in_graphs and (self._padding.is_void or self._pads(rows))

    def does_not_count(self) -> None:
        """The token under way took longer than others of its schedule will."""
        self._counts = False

    def goes_on_without_graphs(self, error: RuntimeError) -> bool:
        """Give up graphs, as one could not be captured, and say so; not if they were asked for."""
        if self._graphs_are_wanted:
            return False
        self.in_graphs = False
        self._counts = False
        if torch.distributed.get_rank() == 0:
            print(
                "warning: a decode could not be captured in a CUDA graph, and goes on without "
                f"({in_words(error, 1)}); --decode-cuda-graphs {ON} shows where",
                file=sys.stderr,
                flush=True,
            )
        return True

    def kept(self) -> dict[str, str]:
        """What was kept, by the number of texts as one would say it: ``8 to 15``, ``1``."""
        return {
            _texts(bits): tried.kept
            for bits, tried in sorted(self._trials.items())
            if tried.kept is not None
        }

    def _why_no_graphs(self, model: torch.nn.Module, padding: DecodePadding) -> str | None:
        """Why a decode of a model cannot be in graphs, if it cannot."""
        if (reason := decode_graphs.why_not(model)) is not None:
            return reason
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            return "the model is in pipeline stages"
        if self._padding.why_not is not None:
            return self._padding.why_not
        if padding == OFF and not self._padding.is_void:
            return f"with --decode-padding {OFF} the host waits for the experts' numbers of tokens"
        return None

    def _pads(self, rows: int) -> bool:
        return self._padding.applies(rows, self.in_graphs)

    def _set(self, name: str) -> None:
        for layer, schedule in zip(self._layers, self._schedules[name], strict=True):
            layer.path.schedule = schedule


def _faster(tried: _Trial) -> str:
    """The schedule whose tokens took less time on the slowest rank; the median of each counts."""
    names = list(tried.took)
    medians = [statistics.median(tried.took[name][1:]) for name in names]
    slowest = torch.tensor(medians, dtype=torch.float64).cuda()
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    return names[int(slowest.argmin())]


def _texts(bits: int) -> str:
    first, last = 1 << (bits - 1), (1 << bits) - 1
    return str(first) if first == last else f"{first} to {last}"
