"""``--scmoe-log-overlap-interval``: a run says whether it overlaps.

Before every Nth iteration the one before it is sampled, so that neither a checkpoint nor an evaluation
at a multiple of N lies between the iteration and its report. In all other iterations nothing of this is
there. A sampled one has some events and small kernels more, and the host waits for nothing more; when
it is over, the host waits for the GPU once, and the ranks that hold replicas of the last rank's
parameters (its data- and context-parallel group) share their figures. These ranks are of one pipeline
stage: they begin an iteration together, which those of two stages do not.
"""

import dataclasses
from collections.abc import Iterator

import torch
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_tensorboard_writer, get_wandb_writer
from torch import Tensor

from megatron_scmoe.analysis.overlap_report import OverlapReport, RankFigures, rank_figures
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.async_all_to_all import can_launch_late, record_with
from megatron_scmoe.overlap.exchange_times import ExchangeRecorder
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.validation.rules import validate


class OverlapMonitor:
    """Samples iterations, and says on the last rank, as Megatron's log does, what they show.

    Args:
        interval: N; 0 for never.
        scmoe: the configuration of ScMoE.
        config: Megatron's settings of the model.
    """

    def __init__(self, interval: int, scmoe: ScMoEConfig, config: TransformerConfig):
        self.interval = interval
        self.scmoe = scmoe
        self.has_graphs = config.cuda_graph_impl != "none"
        self._model_config = config
        self._routing: list[_RoutingSample] = []
        self._recorder: ExchangeRecorder | None = None
        self._iteration = 0
        self._has_begun = False
        self._told: set[str] = set()

    def attach(self, models: list) -> list:
        """Find the layers to sample; a hook of Megatron's model builder.

        Args:
            models: this rank's model chunks.
        """
        layers = [m for model in models for m in model.modules() if isinstance(m, ScMoELayer)]
        self._routing = [_RoutingSample(layer, self.scmoe) for layer in layers]
        return models

    def iteration_begins(self, done: int) -> None:
        """Sample the iteration that begins, if it is due; ``done`` iterations are over."""
        is_first, self._has_begun = not self._has_begun, True
        if is_first or not self.interval or (done + 2) % self.interval:
            return  # a first iteration warms up
        if torch.distributed.get_world_size() - 1 not in _ranks_of_replicas():
            return
        self._iteration = done + 1
        for sample in self._routing:
            sample.start()
        self._recorder = ExchangeRecorder()
        record_with(self._recorder)

    def iteration_is_over(self) -> None:
        """Say what the iteration shows, if it was sampled."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        record_with(None)
        for sample in self._routing:
            sample.stop()
        figures = rank_figures(recorder.read(), not cpu_backend.is_enabled())
        self.log(self._share(figures), self._iteration)

    def lines(self, report: OverlapReport, iteration: int) -> list[str]:
        """What the log says of an iteration; what to change is said once for each reason."""
        advice = {reason: text for reason, text in self._advise(report) if reason not in self._told}
        self._told |= set(advice)
        return [report.line(iteration), *(f"WARNING: {text}" for text in advice.values())]

    def log(self, report: OverlapReport, iteration: int) -> None:
        """Print it on the last rank, and give it to TensorBoard and W&B if Megatron has writers."""
        if torch.distributed.get_rank() != torch.distributed.get_world_size() - 1:
            return
        for line in self.lines(report, iteration):
            print(line, flush=True)
        if tensorboard := get_tensorboard_writer():
            for name, value in report.scalars().items():
                tensorboard.add_scalar(name, value, iteration)
        if wandb := get_wandb_writer():
            wandb.log(report.scalars(), iteration)

    def _share(self, figures: RankFigures) -> OverlapReport:
        """The figures of all ranks of the group; the loads are those of the tokens of all."""
        gates = [gate for sample in self._routing for gate in sample.gates]
        chosen = [sample.chosen() for sample in self._routing]
        own = torch.tensor(figures, dtype=torch.float64).cuda()
        gate, zero_share = (
            RankFigures._fields.index("gate"),
            RankFigures._fields.index("zero_share"),
        )
        if gates:
            own[gate] = torch.stack(gates).mean()
        if chosen and self.scmoe.zero_experts:
            slots = sum(sample.slots for sample in self._routing)
            own[zero_share] = 1 - torch.stack(chosen).sum() / max(slots, 1)
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        shared = [torch.empty_like(own) for _ in range(group.size())]
        torch.distributed.all_gather(shared, own, group=group)
        load = None
        if chosen:
            tokens = torch.stack(chosen)
            torch.distributed.all_reduce(tokens, group=group)
            worst, index = (tokens.amax(1) / tokens.mean(1).clamp(min=1e-9)).max(0)
            load = float(worst), int(self._routing[int(index)].layer_number)
        ranks = [RankFigures(*values.tolist()) for values in shared]
        overlap = any(sample.layer.path.schedule.overlap for sample in self._routing)
        return OverlapReport(ranks, overlap, load)

    def _advise(self, report: OverlapReport) -> Iterator[tuple[str, str]]:
        """A reason, and what to change, if there is one."""
        waits = f"{report.exposed_share:.0%} of forward and backward"
        if report.is_late:
            yield (
                "host",
                (
                    "the GPU waits for the host, and all-to-alls have nothing to hide under; try "
                    f"{self._less_of_the_host()} (docs/overlap.md)"
                ),
            )
        elif report.is_exposed and not self.scmoe.overlap:
            yield "serial", f"{waits} waits for all-to-alls; leave --no-scmoe-overlap out"
        elif report.is_exposed and report.overlap:
            yield (
                "exposed",
                (
                    f"{waits} still waits for all-to-alls; try {', '.join(self._ways_to_hide())} "
                    "(docs/overlap.md)"
                ),
            )

    def _less_of_the_host(self) -> str:
        larger = "a larger --micro-batch-size"
        if self.has_graphs:
            return larger
        attention_alone = (
            self.scmoe.tap == "pos1" or self.scmoe.chunks > 1 or self.scmoe.router_norm == "shared"
        )
        modules = "attn" if attention_alone else "attn moe_router moe_preprocess"
        return f"--cuda-graph-impl transformer_engine --cuda-graph-modules {modules}, or {larger}"

    def _ways_to_hide(self) -> Iterator[str]:
        on_gpu = not cpu_backend.is_enabled()
        if on_gpu and not can_launch_late():
            yield "CUDA_DEVICE_MAX_CONNECTIONS unset, where Megatron accepts that"
        if self.scmoe.expert_slot != "auto" and self._accepts(expert_slot="auto"):
            yield "--scmoe-expert-slot auto"
        if self.scmoe.chunks == 1 and self._accepts(chunks=2):
            yield "--scmoe-chunks 2"
        if on_gpu and self.scmoe.exchange == "collective" and self._accepts(exchange="copy-host"):
            yield "--scmoe-exchange copy-host on one host"
        yield "--no-scmoe-overlap if that is no slower"

    def _accepts(self, **changes) -> bool:
        """Whether a run of this model could have these settings of ScMoE."""
        try:
            validate(dataclasses.replace(self.scmoe, **changes), self._model_config)
        except ScMoEConfigError:
            return False
        return True


def _ranks_of_replicas() -> list[int]:
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    return torch.distributed.get_process_group_ranks(group)


class _RoutingSample:
    """What one layer routes, and its gate, while it is sampled; kept on the device."""

    def __init__(self, layer: ScMoELayer, scmoe: ScMoEConfig):
        self.layer = layer
        self.layer_number = layer.layer_number
        self.gates: list[Tensor] = []
        self.slots = 0
        """Experts that could be chosen: tokens times topk."""
        self._scmoe = scmoe
        self._counts: list[Tensor] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        """Sample from now on, and forget what was."""
        self.gates, self._counts, self.slots = [], [], 0
        self.layer.path.on_routing = self._count
        if self._scmoe.combine == "cg1" and self.layer.shared_experts is not None:
            hook = self.layer.shared_experts.register_forward_pre_hook(self._take_gate)
            self._hooks.append(hook)
        elif self.layer.combine_gate is not None:
            hook = self.layer.combine_gate.register_forward_hook(self._take_share)
            self._hooks.append(hook)

    def stop(self) -> None:
        """Sample no more."""
        self.layer.path.on_routing = None
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def chosen(self) -> Tensor:
        """Tokens that chose each expert, [experts]."""
        return torch.stack(self._counts).sum(0)

    def _count(self, routing_map: Tensor) -> None:
        self._counts.append(routing_map.sum(dim=0, dtype=torch.float64))
        self.slots += routing_map.shape[0] * self.layer.config.moe_router_topk

    @torch.no_grad()
    def _take_gate(self, shared_expert, inputs: tuple[Tensor, ...]) -> None:
        logits = torch.nn.functional.linear(inputs[0], shared_expert.gate_weight)
        self.gates.append(logits.float().sigmoid().mean(dtype=torch.float64))

    @torch.no_grad()
    def _take_share(self, gate, inputs: tuple[Tensor, ...], shares: Tensor) -> None:
        self.gates.append(shares[..., 0].mean(dtype=torch.float64))
