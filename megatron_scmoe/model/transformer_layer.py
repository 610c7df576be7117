"""The backbone: Megatron's transformer layers, which tell the routed path what they have passed.

Boundaries are announced outside attention, so that attention can be captured as a CUDA graph
(``--cuda-graph-impl transformer_engine --cuda-graph-modules attn``): a replay runs no Python inside.
"""

from collections.abc import Iterator

import torch
from megatron.core.transformer.cuda_graphs import is_graph_capturing
from megatron.core.transformer.enums import AttnMaskType, CudaGraphModule
from megatron.core.transformer.module import GraphableMegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.typed_torch import apply_module
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.overlap.routed_path import RoutedPath
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, Boundary


class _CapturableLayer(TransformerLayer):
    """What both blocks of a pair have in common: attention may be captured.

    Megatron would capture parts of the MoE layer with it, and for every block build and copy an
    attention mask of [b, 1, s, s] that a causal attention never reads.
    """

    _inputs: frozenset[str] = frozenset()

    def _te_cuda_graph_capture(self, *args, **kwargs) -> tuple[Tensor, ...]:
        self._inputs = frozenset(kwargs)
        hidden_states, _ = self._forward_attention(*args, **kwargs)
        return (hidden_states,)

    def _replay(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        """What the graph was captured for, on this input."""
        replay = GraphableMegatronModule._te_cuda_graph_replay
        return replay(self, hidden_states, *args, **kwargs)

    def _get_submodules_under_cudagraphs(self) -> list[torch.nn.Module]:
        return [
            self.input_layernorm,
            self.self_attention,
            self.pre_cross_attn_layernorm,
            self.cross_attention,
        ]

    def get_layer_static_inputs(self, seq_length: int, micro_batch_size: int) -> dict:
        """Megatron's; see the class."""
        inputs = super().get_layer_static_inputs(seq_length, micro_batch_size)
        return self._without_unread_mask(inputs)

    def _get_te_cuda_graph_replay_args(self, *args, **kwargs):
        kwargs = self._without_unread_mask(kwargs)
        for name, value in kwargs.items():  # the graph would compute without it
            if isinstance(value, Tensor) and name not in {*self._inputs, "padding_mask"}:
                raise ValueError(
                    f"--cuda-graph-impl transformer_engine: attention was captured without {name}; "
                    "accepted: --cuda-graph-impl none"
                )
        return super()._get_te_cuda_graph_replay_args(*args, **kwargs)

    def _without_unread_mask(self, inputs: dict) -> dict:
        if self.self_attention.attn_mask_type != AttnMaskType.causal:
            return inputs
        return {name: value for name, value in inputs.items() if name != "attention_mask"}


class ScMoEDenseLayer(_CapturableLayer):
    """The first block of a pair: Attn_l and the dense MLP_l.

    Its graph may hold the routing as well, which lies directly after attention on Pos-2 and before it
    on Pos-3: norm, gate and encode (``--cuda-graph-modules attn moe_router moe_preprocess``). They are
    many small kernels, and the dispatch waits for them. With ``mlp`` the graph holds the whole block.
    In forward the graph announces that the routing is through, so that the dispatch has the rest of
    the graph beside it all the same; in backward the graph waits for the dispatch's gradient.

    Args:
        scmoe: the configuration of ScMoE.
        path: the routed path of the MoE block that follows.
    """

    def __init__(self, *args, scmoe: ScMoEConfig, path: RoutedPath, **kwargs):
        super().__init__(*args, **kwargs)
        self.path = path
        self.captures_routing = CudaGraphModule.moe_router in (self.config.cuda_graph_modules or ())
        self.captures_mlp = CudaGraphModule.mlp in (self.config.cuda_graph_modules or ())
        tap = TAP_BOUNDARY[scmoe.tap]
        self.taps_input = tap is Boundary.PAIR_INPUT
        self.shares_norm = scmoe.router_norm == "shared"
        self.taps_mlp_norm = self.shares_norm and tap is Boundary.AFTER_ATTENTION

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        """Megatron's forward, [s, b, h] -> [s, b, h], announcing three boundaries."""
        self.path.begin(kwargs)
        self._announce(Boundary.PAIR_INPUT, hidden_states)
        return super().forward(hidden_states, *args, **kwargs)

    def _te_cuda_graph_capture(self, hidden_states: Tensor, *args, **kwargs):
        routed = []
        if self.captures_routing and self.taps_input:
            routed = self.path.capture(hidden_states)
        (attended,) = super()._te_cuda_graph_capture(hidden_states, *args, **kwargs)
        if self.captures_routing and not self.taps_input:
            routed = self.path.capture(attended)
        output = super()._forward_mlp(attended) if self.captures_mlp else attended
        return output, *routed

    def _te_cuda_graph_replay(self, hidden_states: Tensor, *args, **kwargs):
        self.path.begin(kwargs)
        if not self.captures_routing:
            self._announce(Boundary.PAIR_INPUT, hidden_states)
            (attended,) = self._replay(hidden_states, *args, **kwargs)
            return self._forward_mlp(attended), None
        output, *routed = self._replay(hidden_states, *args, **kwargs)
        self.path.resume(hidden_states.shape, routed)
        self.path.passed(Boundary.PAIR_INPUT)
        if self.captures_mlp:
            self.path.passed(Boundary.AFTER_ATTENTION)
            self.path.passed(Boundary.AFTER_MLP)
            return output, None
        return self._forward_mlp(output), None

    def _get_submodules_under_cudagraphs(self):
        routing = self.path.routing_modules() if self.captures_routing else []
        mlp = [self.pre_mlp_layernorm, self.mlp] if self.captures_mlp else []
        # In the order of their parameters: gathering those ahead (--overlap-param-gather) follows it.
        return super()._get_submodules_under_cudagraphs() + mlp + routing

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """Those of this block; while it is captured also those of the routing in its graph."""
        yield from super().parameters(recurse)
        if self.captures_routing and is_graph_capturing():
            for module in self.path.routing_modules():
                yield from module.parameters(recurse)

    def _forward_mlp(self, hidden_states: Tensor, *args, **kwargs):
        if not self.taps_mlp_norm:
            self._announce(Boundary.AFTER_ATTENTION, hidden_states)
        output = super()._forward_mlp(hidden_states, *args, **kwargs)
        self._announce(Boundary.AFTER_MLP, output)
        return output

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor):
        normed = super()._forward_pre_mlp_layernorm(hidden_states)
        if self.taps_mlp_norm:
            tap = normed[0] if isinstance(normed, tuple) else normed
            self.path.passed(Boundary.AFTER_ATTENTION, tap)
        return normed

    def _announce(self, boundary: Boundary, hidden_states: Tensor) -> None:
        """Tell the routed path; a tap that the router reads through this MLP's norm goes through it."""
        if self.shares_norm and boundary == self.path.schedule.tap:
            hidden_states = apply_module(self.pre_mlp_layernorm)(hidden_states)
        self.path.passed(boundary, hidden_states)


class ScMoETransformerLayer(_CapturableLayer):
    """The second block of a pair, or every block: Attn_{l+1} and the ScMoE MLP.

    The boundary after the shared expert is announced by the MLP (moe_layer.py).

    Args:
        path: the routed path of this block.
        taps_own_input: whether the path reads this block's own input (Pos-1) and needs nothing of
            the preceding block.
    """

    def __init__(self, *args, path: RoutedPath, taps_own_input: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.path = path
        self.taps_own_input = taps_own_input
        path.bind(self.mlp, self._maybe_unflatten_for_moe)

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        """Megatron's forward, [s, b, h] -> [s, b, h]."""
        self._begin(hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)

    def _te_cuda_graph_replay(self, hidden_states: Tensor, *args, **kwargs):
        self._begin(hidden_states, kwargs)
        (attended,) = self._replay(hidden_states, *args, **kwargs)
        return self._forward_mlp(attended), None

    def _begin(self, hidden_states: Tensor, batch: dict) -> None:
        if self.taps_own_input:
            self.path.begin(batch)
            self.path.passed(Boundary.AFTER_MLP, hidden_states)

    def _forward_mlp(self, *args, **kwargs):
        self.path.passed(Boundary.AFTER_SECOND_ATTENTION)
        return super()._forward_mlp(*args, **kwargs)
