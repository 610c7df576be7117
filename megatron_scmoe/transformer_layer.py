"""The backbone: Megatron's transformer layers, which tell the routed path what they have passed.

Boundaries are announced outside attention, so that attention can be captured as a CUDA graph
(``--cuda-graph-impl transformer_engine --cuda-graph-modules attn``): a replay runs no Python inside.
"""

from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.typed_torch import apply_module
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.routed_path import RoutedPath
from megatron_scmoe.schedule import Boundary


class ScMoEDenseLayer(TransformerLayer):
    """The first block of a pair: Attn_l and the dense MLP_l.

    Args:
        scmoe: the configuration of ScMoE.
        path: the routed path of the MoE block that follows.
    """

    def __init__(self, *args, scmoe: ScMoEConfig, path: RoutedPath, **kwargs):
        super().__init__(*args, **kwargs)
        self.path = path
        self._batch: dict = {}
        self.taps_mlp_norm = scmoe.router_norm == "shared" and scmoe.tap == "pos2"
        if self.taps_mlp_norm:
            path.set_norm(lambda tap: tap)  # the tap given to it is this norm's output already
        elif scmoe.router_norm == "shared":
            path.set_norm(self._apply_mlp_norm)

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        """Megatron's forward, [s, b, h] -> [s, b, h], announcing three boundaries."""
        self._begin(hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)

    def _te_cuda_graph_replay(self, hidden_states: Tensor, *args, **kwargs):
        self._begin(hidden_states, kwargs)
        return super()._te_cuda_graph_replay(hidden_states, *args, **kwargs)

    def _begin(self, hidden_states: Tensor, batch: dict) -> None:
        self._batch = batch
        self.path.passed(Boundary.PAIR_INPUT, hidden_states, batch)

    def _forward_mlp(self, hidden_states: Tensor, *args, **kwargs):
        batch, self._batch = self._batch, {}
        if self.taps_mlp_norm:
            self._batch = batch
        else:
            self.path.passed(Boundary.AFTER_ATTENTION, hidden_states, batch)
        output = super()._forward_mlp(hidden_states, *args, **kwargs)
        self.path.passed(Boundary.AFTER_MLP, output, batch)
        return output

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor):
        normed = super()._forward_pre_mlp_layernorm(hidden_states)
        if self.taps_mlp_norm:
            tap = normed[0] if isinstance(normed, tuple) else normed
            batch, self._batch = self._batch, {}
            self.path.passed(Boundary.AFTER_ATTENTION, tap, batch)
        return normed

    def _apply_mlp_norm(self, tap: Tensor) -> Tensor:
        return apply_module(self.pre_mlp_layernorm)(tap)


class ScMoETransformerLayer(TransformerLayer):
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
        path.set_unflatten(self._maybe_unflatten_for_moe)

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        """Megatron's forward, [s, b, h] -> [s, b, h]."""
        self._begin(hidden_states, kwargs)
        return super().forward(hidden_states, *args, **kwargs)

    def _te_cuda_graph_replay(self, hidden_states: Tensor, *args, **kwargs):
        self._begin(hidden_states, kwargs)
        return super()._te_cuda_graph_replay(hidden_states, *args, **kwargs)

    def _begin(self, hidden_states: Tensor, batch: dict) -> None:
        if self.taps_own_input:
            self.path.passed(Boundary.AFTER_MLP, hidden_states, batch)

    def _forward_mlp(self, *args, **kwargs):
        self.path.passed(Boundary.AFTER_SECOND_ATTENTION)
        return super()._forward_mlp(*args, **kwargs)
