"""Routed experts that stay on the host and come to the device when the gate has chosen them.

The gate reads the tap, so a layer's experts are known one window before they are used (arXiv
2404.05019, section 3.3). As soon as the host knows how many tokens each expert gets, the copies of the
chosen ones begin, and the backbone computes meanwhile. Nothing is predicted.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.errors import InputError, lacks_memory
from megatron_scmoe.inference.expert_cache import Counts, ExpertCache, Policy
from megatron_scmoe.inference.expert_store import (
    HostExperts,
    MappedExperts,
    Packing,
    PinnedExperts,
    pinned_memory,
    write_expert_files,
)
from megatron_scmoe.inference.offloaded_experts import FLAG, ExpertGraphs, OffloadedExperts
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, Schedule, build_schedule, num_slots
from megatron_scmoe.platform import cpu_backend


@dataclass(frozen=True)
class OffloadSettings:
    """What the flags say.

    Args:
        cache_gb: memory for experts on the device, in 10^9 bytes; None for what a layer needs at once.
        layers: of how many MoE layers, from the first on, experts are offloaded; None for all.
        folder: where files of experts are, or will be; None where they are kept in pinned memory.
        policy: which expert makes room for another.
    """

    cache_gb: float | None = None
    layers: int | None = None
    folder: Path | None = None
    policy: Policy = "lru"


@dataclass(frozen=True)
class Totals:
    """What the caches of all ranks have done so far."""

    uses: int = 0
    hits: int = 0
    copied_bytes: int = 0
    waited_ms: float = 0.0
    """How long compute has waited for copies, on the rank where it has waited longest."""


class ExpertOffload:
    """Builds a model without its routed experts, and brings these where they are needed.

    It is what :func:`~megatron_scmoe.training.load_model.build_model` takes; :meth:`attach` follows.
    """

    def __init__(self, settings: OffloadSettings):
        self.settings = settings
        self.cache: ExpertCache | None = None
        """None where this rank has no experts that are offloaded."""
        self.totals = Totals()
        """As :meth:`sum_up` has found them."""

    def replace_experts(
        self, spec: TransformerBlockSubmodules, config: TransformerConfig, vp_stage: int | None
    ) -> TransformerBlockSubmodules:
        """The specs of a stage with experts that :class:`OffloadedExperts` computes.

        Raises:
            InputError: if there are no such experts, or their module cannot be used for one of them.
        """
        given, total = self._given(), _moe_layers(config, config.num_layers)
        if not total:
            raise InputError(given, "the model has no experts", "a ScMoE model")
        if (self.settings.layers or 0) > total:
            raise InputError(given, f"the model has {total} MoE layers", f"1 to {total}")
        if config.use_transformer_engine_op_fuser:
            raise InputError(
                given,
                "the experts are Transformer Engine's fused ones (--use-transformer-engine-op-fuser)",
                "TEGroupedMLP without it, or SequentialMLP",
            )
        if config.expert_tensor_parallel_size > 1:
            raise InputError(
                f"{given} with --tensor-model-parallel-size {config.tensor_model_parallel_size}",
                "tensor parallelism splits each expert",
                "--expert-model-parallel-size, which shares whole ones",
            )
        number = _moe_layers(config, get_transformer_layer_offset(config, vp_stage))
        for layer in spec.layer_specs:
            mlp = layer.submodules.mlp
            if getattr(mlp, "func", None) is not ScMoELayer:
                continue
            number += 1
            if self.settings.layers is None or number <= self.settings.layers:
                parts = mlp.keywords["submodules"]
                parts = replace(parts, experts=functools.partial(OffloadedExperts, parts.experts))
                layer.submodules.mlp = functools.partial(
                    mlp.func, **mlp.keywords | {"submodules": parts}
                )
        return spec

    def holds(self, key: str) -> bool:
        """Whether a tensor of the checkpoint is an expert's, which the model need not ask for."""
        return _EXPERTS in key

    def attach(
        self, model, checkpoint: Path, tokens: int, tokens_flag: str = "--micro-batch"
    ) -> None:
        """Prepare the experts of a model that was built and loaded.

        Args:
            model: of this rank.
            checkpoint: the folder of the iteration it was loaded from.
            tokens: how many of them a rank has in one step behind the prompts, at most.
            tokens_flag: the flag that says so.

        Raises:
            InputError: if the cache is too small, a weight has another shape in the checkpoint, or
                the folder cannot be used.
            ConversionError: if the checkpoint cannot be read.
        """
        experts = offloaded_layers(model)
        if not experts:
            return
        packing = experts[0][1].packing
        count = experts[0][1].num_local_experts
        slots = self._slots(experts[0][1], tokens, tokens_flag, len(experts) * count)
        stored = read_megatron(checkpoint).tensors
        layers = {
            layer.layer_number: self._weights(stored, layer.layer_number, packing)
            for layer, _ in experts
        }
        first = experts[0][0].mlp.local_expert_indices[0]
        host: HostExperts
        if cpu_backend.is_enabled():
            assert self.settings.folder is not None
            files = write_expert_files(self.settings.folder, checkpoint, packing, layers)
            host = MappedExperts(files, packing.nbytes, first)
        else:
            host = PinnedExperts(
                {number: _pin(weights, packing, first, count) for number, weights in layers.items()}
            )
        try:
            self.cache = ExpertCache(packing, slots, host, self.settings.policy)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            given = self.settings.cache_gb
            raise InputError(
                FLAG if given is None else f"--expert-cache-gb {given:g}",
                f"{slots * packing.nbytes / 1e9:.3g} GB for experts do not fit the memory",
                "less" if given else f"a smaller {tokens_flag}",
            ) from error
        connect(model, self.cache)

    def sum_up(self) -> Totals:
        """What the caches of all ranks have done so far; every rank calls it."""
        counts = self.cache.counts if self.cache else Counts()
        waited = self.cache.waited_ms() if self.cache else 0.0
        own = torch.tensor(
            [counts.uses, counts.hits, counts.copied_bytes, waited], dtype=torch.float64
        ).cuda()
        found = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(found, own)
        of_ranks = torch.stack(found).cpu()
        uses, hits, copied, _ = map(int, of_ranks.sum(0).tolist())
        self.totals = Totals(uses, hits, copied, of_ranks[:, -1].max().item())
        return self.totals

    def report(self, tokens: int) -> str:
        """What was done for that many tokens on all ranks, in one line; every rank calls it."""
        found, tokens = self.sum_up(), max(tokens, 1)
        return (
            f"offloaded experts: {found.hits / max(found.uses, 1):.0%} of {found.uses} uses found "
            f"their expert on the device; {found.copied_bytes / tokens / 1e6:.3g} MB copied and "
            f"{found.waited_ms / tokens:.3g} ms waited for copies a token ({tokens} written)"
        )

    def _given(self) -> str:
        layers = self.settings.layers
        return FLAG if layers is None else f"--cpu-moe-layers {layers}"

    def _slots(self, experts: OffloadedExperts, tokens: int, tokens_flag: str, most: int) -> int:
        """For how many experts there is memory on the device."""
        config = experts.config
        at_once = tokens * config.expert_model_parallel_size * config.moe_router_topk
        needed = min(experts.num_local_experts, max(2, at_once))  # one computes, one comes
        if self.settings.cache_gb is None:
            return needed
        nbytes = min(self.settings.cache_gb * 1e9, most * experts.packing.nbytes)
        slots = int(nbytes) // experts.packing.nbytes
        if slots < needed:
            fewer = f", or a smaller {tokens_flag}" if tokens > 1 and needed > 2 else ""
            raise InputError(
                f"--expert-cache-gb {self.settings.cache_gb:g}",
                f"a layer may need {needed} experts at once, of {experts.packing.nbytes} bytes each",
                f"{_rounded_up(needed * experts.packing.nbytes)} or more{fewer}",
            )
        return slots

    def _weights(
        self, stored: Mapping[str, LazyTensor], layer: int, packing: Packing
    ) -> dict[str, LazyTensor]:
        """The checkpoint's weights of a layer's experts, by their names in the packing."""
        found = {}
        for name, shape in packing.shapes.items():
            key = f"decoder.layers.{layer - 1}{_EXPERTS}{name}"
            if key not in stored or tuple(stored[key].shape[1:]) != shape:
                has = f"has the shape {tuple(stored[key].shape)}" if key in stored else "is missing"
                raise InputError(
                    FLAG, f"{key} {has}", "a checkpoint whose arguments describe its tensors"
                )
            found[name] = stored[key].cast(packing.dtype)
        return found


def offloaded_layers(model) -> list[tuple[Any, OffloadedExperts]]:
    """The transformer layers of this rank whose experts are offloaded, and these."""
    layers = getattr(model, "module", model).decoder.layers
    experts = [(layer, getattr(layer.mlp, "experts", None)) for layer in layers]
    return [(layer, own) for layer, own in experts if isinstance(own, OffloadedExperts)]


def connect(model, cache: ExpertCache, at_the_gate: bool = True) -> None:
    """Let the offloaded layers of a model take their experts from a cache.

    Args:
        at_the_gate: whether copies begin when the gate has chosen, and the whole window passes before
            experts compute. Otherwise they begin when experts are to compute, which waits for them.
    """
    graphs = ExpertGraphs()
    for layer, experts in offloaded_layers(model):
        experts.attach(cache, layer.layer_number, layer.mlp.token_dispatcher, graphs, at_the_gate)
        layer.path.schedule = widest(layer.path.schedule)
        layer.path.on_routing = experts.hear
        layer.path.on_dispatch = experts.expect if at_the_gate else None


def widest(schedule: Schedule) -> Schedule:
    """The same tap and chunks with the last slot, behind all that the backbone computes.

    The dispatch is launched at the gate. So the host waits for the gate before it enqueues anything
    of the window: a copy takes longer than the host's next operator.
    """
    tap = next(tap for tap, boundary in TAP_BOUNDARY.items() if boundary == schedule.tap)
    return build_schedule(tap, num_slots(tap) - 1, overlap=True, chunks=schedule.chunks)


_EXPERTS = ".mlp.experts.experts."
"""What is in the keys of routed experts, between the layer and the weight."""


def _pin(weights: Mapping[str, LazyTensor], packing: Packing, first: int, count: int) -> Tensor:
    """A layer's experts of this rank in pinned memory."""
    memory = pinned_memory(count, packing.nbytes)
    for expert in range(count):
        packing.fill(memory[expert], weights, first + expert)
    return memory


def _moe_layers(config: TransformerConfig, layers: int) -> int:
    """How many of the first ``layers`` have experts."""
    frequency = config.moe_layer_freq
    if not config.num_moe_experts:
        return 0
    if isinstance(frequency, int):
        return sum(layer % frequency == 0 for layer in range(layers))
    return sum(frequency[:layers])


def _rounded_up(nbytes: int) -> str:
    """In 10^9 bytes, to three digits after the point and not less."""
    return f"{-(-nbytes // 10**6) / 1e3:g}"
