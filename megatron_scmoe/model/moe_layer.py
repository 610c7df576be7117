"""The ScMoE MLP: a MoE layer whose routed path read the tap while the backbone was computing."""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import apply_module
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.router import ZeroExpertOutput
from megatron_scmoe.overlap.routed_path import RoutedPath
from megatron_scmoe.overlap.schedule import Boundary
from megatron_scmoe.overlap.token_dispatcher import build_token_dispatcher


class ScMoELayer(MoELayer):
    """Shared expert on the current representation, joined with experts routed on the tap.

    H_{l+1} = H_{l+1}^MH + combine(SE(x), sum_i G(t)_i E_i(t)), x = norm(H_{l+1}^MH), t = norm(tap)
    (arXiv 2404.05019, section 3). The residual add is the transformer layer's.

    Parameters are those of Megatron's MoE layer under the same names, and, depending on the
    configuration, ``shortcut_layernorm``, ``combine_gate`` and ``post_layernorm``.

    Args:
        scmoe: the configuration of ScMoE.
        path: the routed path of this pair of blocks.
        norm: builder of the norms this layer adds.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        scmoe: ScMoEConfig,
        path: RoutedPath,
        norm: LayerNormBuilder,
    ):
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.token_dispatchers = [
            build_token_dispatcher(
                config, self.num_local_experts, self.local_expert_indices, pg_collection, scmoe
            )
            for _ in range(scmoe.chunks)
        ]
        """One for each chunk: a dispatcher keeps state from dispatch to combine. Megatron's methods
        use ``token_dispatcher``, which the routed path sets."""
        self.token_dispatcher = self.token_dispatchers[0]
        self.combine_gate = CombineGate(config) if scmoe.combine == "cg2" else None

        norm_arguments = dict(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.shortcut_layernorm = norm(**norm_arguments) if scmoe.router_norm == "own" else None
        self.post_layernorm = norm(**norm_arguments) if scmoe.post_norm else None

        self.scmoe = scmoe
        self.path = path

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors=None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Compute the shared expert, collect the routed output and join them.

        Args:
            hidden_states: norm(H_{l+1}^MH), [s, b, h] (s divided by TP with sequence parallel).
            intermediate_tensors: Megatron's, of a layer captured in part; not used here.
            padding_mask: the routed path had its own at the tap; not used here.

        Returns:
            The joined output [s, b, h], and no bias.
        """
        shared = self.shared_experts_compute(hidden_states)
        self.path.passed(Boundary.AFTER_SHARED_EXPERT)
        output = self._join(hidden_states, shared, self.path.collect())
        if self.post_layernorm is not None:
            output = apply_module(self.post_layernorm)(output)
        return output, None

    def norm_tap(self, tap: Tensor) -> Tensor:
        """norm(tap), [s, b, h]; with a shared norm the dense block gives the tap normalised."""
        if self.shortcut_layernorm is None:
            return tap
        return apply_module(self.shortcut_layernorm)(tap)

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, ZeroExpertOutput | None]:
        """Megatron's, and what the zero experts give; see :meth:`ScMoERouter.forward`."""
        probs, chosen, *zero = self.router(hidden_states, padding_mask)
        return probs, chosen, zero[0] if zero else None

    def _join(self, x: Tensor, shared: Tensor | None, routed: Tensor) -> Tensor:
        """Direct add, SE + R; CG-1, the same, as sigmoid(w.x) is in the shared expert; CG-2,
        c_0 SE + c_1 R with c = softmax(W x) (the paper's section 3; x is the shared expert's input).
        """
        if shared is None:
            return routed
        if self.combine_gate is None:
            return routed + shared
        shares = self.combine_gate(x)
        return shares[..., :1] * shared + shares[..., 1:] * routed


class CombineGate(MegatronModule):
    """CG-2: softmax(W x) in R^2, the shares of shared and routed output; W is [2, h]."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.weight = torch.nn.Parameter(
            torch.empty(2, config.hidden_size, dtype=config.params_dtype)
        )
        if config.perform_initialization:
            config.init_method(self.weight)
        # Replicated over the tensor-parallel ranks, each of which sees its part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, 2]; the softmax is computed in fp32 and cast back."""
        logits = torch.nn.functional.linear(x, self.weight)
        return torch.softmax(logits, dim=-1, dtype=torch.float32).to(x.dtype)
