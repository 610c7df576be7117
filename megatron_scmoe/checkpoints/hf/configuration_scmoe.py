"""Configuration of a ScMoE GPT for transformers; goes with modeling_scmoe.py."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

TAPS = ("pos1", "pos2", "pos3")
COMBINES = ("add", "cg1", "cg2")
ROUTER_NORMS = ("own", "shared")
NORMS = ("RMSNorm", "LayerNorm")
POSITIONS = ("rope", "learned_absolute", "none")
SCORES = ("softmax", "sigmoid")
ROUTER_DTYPES = (None, "float32", "float64")
AUTO_MAP = {
    "AutoConfig": "configuration_scmoe.ScMoEConfig",
    "AutoModel": "modeling_scmoe.ScMoEModel",
    "AutoModelForCausalLM": "modeling_scmoe.ScMoEForCausalLM",
}
"""Where transformers finds the classes, beside config.json."""
ROPES = ("default", "linear", "llama3", "yarn")


class ScMoEConfig(PreTrainedConfig):
    """A GPT with shortcut-connected mixtures of experts (ScMoE, arXiv 2404.05019).

    Args:
        vocab_size: rows of the embedding.
        unpadded_vocab_size: how many of the rows are tokens; None if nobody says. The others pad it.
        intermediate_size: of the dense MLPs.
        moe_intermediate_size: of a routed expert.
        shared_expert_intermediate_size: of the shared expert; None without one.
        moe_layers: 1 for each block with experts, 0 for a dense one. Either dense and MoE blocks
            alternate, dense first, or every block has experts (tap pos1 only).
        tap: what router and routed experts read: pos1, the output of the preceding block (with
            experts in every block: the block's own input); pos2, the preceding block between
            attention and MLP; pos3, its input.
        combine: add, shared + routed; cg1, sigmoid(w.x) shared + routed; cg2, c0 shared + c1
            routed with c = softmax(W x).
        router_norm: own, the tap has a norm of its own; shared, that of the preceding dense MLP.
        post_norm: a norm on the joined output.
        router_score_function: softmax or sigmoid.
        router_pre_softmax: softmax over all experts instead of over the kept ones.
        router_expert_bias: a bias that moves the choice of experts and no weight (sigmoid only).
        router_scaling_factor: multiplies the weights; None for 1.
        router_num_groups, router_group_topk: experts are chosen from the best groups only.
        router_dtype: in which the router's logits are computed; None for the model's.
        hidden_act: silu, gelu, relu2 or quick_gelu, in transformers' names.
        gated_mlp: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        norm_type, norm_eps: of all norms.
        norm_zero_centered: scales are stored minus one.
        linear_bias: biases in all linear layers; qkv_bias: in queries, keys and values.
        qk_norm: norms on queries and keys, each head by itself.
        attention_scale: multiplies the attention's logits; None for 1 / sqrt(head_dim).
        position_embedding: rope, learned_absolute or none.
        attention_dropout, hidden_dropout: while training only.
        output_router_logits: give the routers' logits, and add their auxiliary loss to the loss.
        router_aux_loss_coef: multiplies it; Megatron's --moe-aux-loss-coeff.
    """

    model_type = "scmoe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer adds it to a list)

    vocab_size: int = 32000
    unpadded_vocab_size: int | None = None
    hidden_size: int = 1024
    intermediate_size: int = 4096
    moe_intermediate_size: int = 4096
    shared_expert_intermediate_size: int | None = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048

    moe_layers: list[int] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 1
    tap: str = "pos2"
    combine: str = "cg1"
    router_norm: str = "own"
    post_norm: bool = False
    router_score_function: str = "softmax"
    router_pre_softmax: bool = True
    router_expert_bias: bool = False
    router_scaling_factor: float | None = None
    router_num_groups: int | None = None
    router_group_topk: int | None = None
    router_dtype: str | None = None

    hidden_act: str = "silu"
    gated_mlp: bool = True
    norm_type: str = "RMSNorm"
    norm_eps: float = 1e-5
    norm_zero_centered: bool = False
    linear_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    position_embedding: str = "rope"
    rope_parameters: dict | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    initializer_range: float = 0.02
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_layers is None:
            self.moe_layers = [i % 2 for i in range(self.num_hidden_layers)]
        super().__post_init__(**{"auto_map": dict(AUTO_MAP), **kwargs})
        self._check()

    def _check(self):
        for name, accepted in (
            ("tap", TAPS),
            ("combine", COMBINES),
            ("router_norm", ROUTER_NORMS),
            ("norm_type", NORMS),
            ("position_embedding", POSITIONS),
            ("router_score_function", SCORES),
            ("router_dtype", ROUTER_DTYPES),
            ("hidden_act", tuple(ACT2FN)),
            ("num_experts_per_tok", range(1, self.num_experts + 1)),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are {accepted}")
        rope = (self.rope_parameters or {}).get("rope_type", "default")
        if self.position_embedding == "rope" and rope not in ROPES:
            raise ValueError(f"rope_parameters.rope_type={rope!r}: accepted are {ROPES}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads}: accepted are divisors of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.router_expert_bias and self.router_score_function != "sigmoid":
            raise ValueError("router_expert_bias=True needs router_score_function='sigmoid'")
        groups, best = self.router_num_groups, self.router_group_topk
        if best and not (groups and self.num_experts % groups == 0 and best <= groups):
            raise ValueError(
                f"router_num_groups={groups}, router_group_topk={best}: accepted are a divisor of "
                f"num_experts={self.num_experts} and at most so many of these groups"
            )
        layers = self.num_hidden_layers
        every = self.moe_layers == [1] * layers
        if not every and (layers % 2 or self.moe_layers != [0, 1] * (layers // 2)):
            raise ValueError(
                f"moe_layers={self.moe_layers}: accepted are [0, 1] for each pair, or all 1"
            )
        if every and (self.tap != "pos1" or self.router_norm != "own"):
            raise ValueError(
                f"tap={self.tap!r}, router_norm={self.router_norm!r}: with experts in every block "
                "only 'pos1' and 'own' exist"
            )
        if self.combine != "add" and self.shared_expert_intermediate_size is None:
            raise ValueError(f"combine={self.combine!r} needs a shared expert")
