"""Experts with biases (GPT-2 has them), where Megatron's own cannot have them."""

from copy import copy
from dataclasses import replace
from functools import partial

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class BiasedSharedExpert(SharedExpertMLP):
    """Megatron's shared expert with biases, which Megatron's own refuses."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, **kwargs):
        with_bias = replace(
            submodules,
            linear_fc1=partial(_build_with_bias, submodules.linear_fc1),
            linear_fc2=partial(_build_with_bias, submodules.linear_fc2),
        )
        config = copy(config)
        config.add_bias_linear = False  # Megatron asserts it
        super().__init__(config, with_bias, **kwargs)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """gate * (MLP(x) + bias), [s, b, h]; the gate is CG-1's, or 1."""
        output, bias = MLP.forward(self, hidden_states)
        output = output + bias
        if self.use_shared_expert_gate:
            output = output * torch.sigmoid(
                torch.nn.functional.linear(hidden_states, self.gate_weight)
            )
        return output


class BiasedExpertLinear(RowParallelLinear):
    """The down-projection of a routed expert with biases, in the local implementation.

    Megatron adds the bias in place; without ranks to reduce over, what it adds to is a view, and
    autograd refuses.
    """

    def forward(self, input_: Tensor):
        """[tokens, ffn] -> a tensor of its own [tokens, h], and the bias [h]."""
        output, bias = super().forward(input_)
        return output.clone(), bias


def _build_with_bias(build, *args, bias: bool, **kwargs):
    return build(*args, bias=True, **kwargs)
