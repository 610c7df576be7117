"""A ScMoE GPT for transformers (arXiv 2404.05019). Needs torch and transformers alone.

Blocks come in pairs, l with a dense MLP and l+1 with a mixture of experts:

    H_l^MH      = H_{l-1}    + MH_l(H_{l-1})
    H_l^MLP     = H_l^MH     + MLP_l(H_l^MH)
    H_{l+1}^MH  = H_l^MLP    + MH_{l+1}(H_l^MLP)
    H_{l+1}     = H_{l+1}^MH + join(SE(x), sum_i G(t)_i E_i(t)),  x = norm(H_{l+1}^MH), t = norm(tap)

    tap:  pos1 = H_l^MLP,  pos2 = H_l^MH,  pos3 = H_{l-1}

With experts in every block, the tap (pos1) is the block's own input.

Tools replace, wrap or offload modules one by one (peft, accelerate, quantisers). Every weight is
therefore used in the forward of its own module and nowhere else.

Shapes: b batch, s sequence, h hidden, n = b*s tokens, e experts, k experts a token.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple, is_torchdynamo_exporting
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_scmoe import ScMoEConfig


class ScMoENorm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in fp32 and cast back."""

    def __init__(self, config: ScMoEConfig, size: int):
        super().__init__()
        self.eps = config.norm_eps
        self.offset = 1.0 if config.norm_zero_centered else 0.0
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        has_bias = config.norm_type == "LayerNorm"
        self.bias = nn.Parameter(torch.zeros(size)) if has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(dtype) + self.offset
        if self.bias is None:
            normed = F.rms_norm(x.to(dtype), weight.shape, weight, self.eps)
        else:
            bias = self.bias.to(dtype)
            normed = F.layer_norm(x.to(dtype), weight.shape, weight, bias, self.eps)
        return normed.to(x.dtype)


class ScMoERotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE for given positions."""

    def __init__(self, config: ScMoEConfig):
        super().__init__()
        self.config = config

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: [b, s] -> cosines and sines, each [b, 1, s, rotated dimensions] in fp32."""
        frequencies, scale = self._frequencies(position_ids.device)
        angles = position_ids[:, None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * scale, angles.sin() * scale

    def _frequencies(self, device) -> tuple[torch.Tensor, float]:
        """Computed anew each time: a buffer would lose bits in a model of low precision."""
        parameters = self.config.rope_parameters
        if parameters["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, device)
        size = int(self.config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the first dimensions of x: [b, heads, s, head_dim]; component i pairs with i + d/2."""
    size = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, kept = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Attention as a full matrix: [b, heads, s, d] -> [b, s, heads, d], and the weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ScMoEAttention(nn.Module):
    """Causal attention with grouped queries."""

    def __init__(self, config: ScMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attention_scale or self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        queries = config.num_attention_heads * self.head_dim
        groups = config.num_key_value_heads * self.head_dim
        bias = config.qkv_bias or config.linear_bias
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.linear_bias)
        self.q_norm = ScMoENorm(config, self.head_dim) if config.qk_norm else None
        self.k_norm = ScMoENorm(config, self.head_dim) if config.qk_norm else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: [b, s, h] -> [b, s, h], and the attention weights if eager."""
        batch, length, _ = hidden_states.shape
        shape = (batch, length, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape)
        key = self.k_proj(hidden_states).view(shape)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights


class ScMoEMLP(nn.Module):
    """A dense MLP, a routed expert or the shared expert."""

    def __init__(self, config: ScMoEConfig, size: int, bias: bool):
        super().__init__()
        self.gate_proj = (
            nn.Linear(config.hidden_size, size, bias=bias) if config.gated_mlp else None
        )
        self.up_proj = nn.Linear(config.hidden_size, size, bias=bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., h] -> [..., h]."""
        up = self.up_proj(x)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up
        return self.down_proj(inner)


class ScMoERouter(nn.Module):
    """Which k experts a token goes to, and with what weights.

    No ``nn.Linear``, so that what is done to all of these (adapters, quantisation) leaves it alone.
    """

    def __init__(self, config: ScMoEConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts)) if config.linear_bias else None
        self.expert_bias = (
            nn.Buffer(torch.zeros(config.num_experts, dtype=torch.float32))
            if config.router_expert_bias
            else None
        )

    def _apply(self, fn, recurse=True):
        """Cast and move all but the expert bias, whose last bits decide: it is only moved."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = nn.Buffer(bias.to(self.expert_bias.device))
        return self

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens: [n, h] -> logits [n, e], weights [n, k] in fp32, experts [n, k]."""
        config = self.config
        logits = self._logits(tokens)
        if config.router_score_function == "sigmoid":
            scores = torch.sigmoid(logits.float())
            ranking = scores if self.expert_bias is None else scores + self.expert_bias.float()
            experts = self._choose(ranking)
            weights = scores.gather(1, experts)
            if config.num_experts_per_tok > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        elif config.router_pre_softmax:
            scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
            experts = self._choose(scores)
            weights = scores.gather(1, experts)
        else:
            experts = self._choose(logits)
            weights = torch.softmax(logits.gather(1, experts), dim=-1, dtype=torch.float32)
        if config.router_scaling_factor:
            weights = weights * config.router_scaling_factor
        return logits, weights.to(logits.dtype).float(), experts

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, h] -> [n, e] in ``router_dtype``, whatever autocast says; else in the model's dtype."""
        if self.config.router_dtype is None:
            return F.linear(tokens, self.weight, self.bias)
        dtype = getattr(torch, self.config.router_dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(dtype), self.weight.to(dtype), bias)

    def _choose(self, ranking: torch.Tensor) -> torch.Tensor:
        """[n, e] -> the k best experts of the best groups, [n, k]."""
        k, groups = self.config.num_experts_per_tok, self.config.router_num_groups
        best = self.config.router_group_topk
        if best:
            grouped = ranking.unflatten(1, (groups, -1))
            of_group = grouped.topk(k // best, dim=-1).values.sum(dim=-1)
            kept = torch.zeros_like(of_group, dtype=torch.bool)
            kept.scatter_(1, of_group.topk(best, dim=-1).indices, True)
            ranking = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        return ranking.topk(k, dim=-1).indices


class ScMoEMoE(nn.Module):
    """Shared expert on x and routed experts on the tap, joined."""

    def __init__(self, config: ScMoEConfig):
        super().__init__()
        hidden, shared = config.hidden_size, config.shared_expert_intermediate_size
        self.router = ScMoERouter(config)
        self.experts = nn.ModuleList(
            ScMoEMLP(config, config.moe_intermediate_size, config.linear_bias)
            for _ in range(config.num_experts)
        )
        self.shared_expert = (
            None if shared is None else ScMoEMLP(config, shared, config.linear_bias)
        )
        is_cg1, is_cg2 = config.combine == "cg1", config.combine == "cg2"
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if is_cg1 else None
        self.combine_gate = nn.Linear(hidden, 2, bias=False) if is_cg2 else None
        self.tap_norm = ScMoENorm(config, hidden) if config.router_norm == "own" else None
        self.post_norm = ScMoENorm(config, hidden) if config.post_norm else None

    def forward(
        self, x: torch.Tensor | None, tap: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, tap: what the shared expert reads and what is routed, both [b, s, h].

        Returns the joined output [b, s, h] and the router's logits [n, e].
        """
        if self.tap_norm is not None:
            tap = self.tap_norm(tap)
        logits, weights, experts = self.router(tap.flatten(0, 1))
        output = self.compute_experts(tap.flatten(0, 1), weights, experts).view_as(tap)
        if self.shared_expert is not None:
            output = self._join(x, self.shared_expert(x), output)
        return output if self.post_norm is None else self.post_norm(output), logits

    def compute_experts(
        self, tokens: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor
    ) -> torch.Tensor:
        """tokens: [n, h], weights and experts: [n, k] -> sum_i G_i E_i, [n, h]; the sum in fp32.

        Megatron weighs what goes into an expert's last layer, and its bias. The layer is linear, so
        weighing what comes out gives the same, and leaves the layer to whatever stands for it.
        """
        output = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, torch.float32))
        for i, expert in enumerate(self.experts):
            chosen = experts == i
            if is_torchdynamo_exporting():  # a graph has no shapes that hang on data: all tokens
                share = (weights * chosen).sum(dim=-1, keepdim=True)
                output = output + expert(tokens) * share
                continue
            token, choice = chosen.nonzero(as_tuple=True)
            # Without tokens it runs all the same where gradients are wanted: they are zero then, not
            # missing, which data-parallel wrappers wait for.
            if len(token) or torch.is_grad_enabled():
                share = weights[token, choice, None]
                output.index_add_(0, token, expert(tokens[token]) * share)
        return output.to(tokens.dtype)

    def _join(self, x: torch.Tensor, shared: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
        if self.shared_expert_gate is not None:
            return routed + shared * torch.sigmoid(self.shared_expert_gate(x))
        if self.combine_gate is not None:
            shares = torch.softmax(self.combine_gate(x), dim=-1, dtype=torch.float32)
            shares = shares.to(x.dtype)
            return shares[..., :1] * shared + shares[..., 1:] * routed
        return routed + shared


class ScMoEBlock(GradientCheckpointingLayer):
    """A transformer block, dense or with experts."""

    def __init__(self, config: ScMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.is_moe = bool(config.moe_layers[layer_idx])
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = ScMoENorm(config, config.hidden_size)
        self.self_attn = ScMoEAttention(config, layer_idx)
        # Without a shared expert nothing reads it.
        has_norm = not self.is_moe or config.shared_expert_intermediate_size is not None
        self.post_attention_layernorm = ScMoENorm(config, config.hidden_size) if has_norm else None
        self.mlp = (
            ScMoEMoE(config)
            if self.is_moe
            else ScMoEMLP(config, config.intermediate_size, config.linear_bias)
        )

    def forward(
        self, hidden_states: torch.Tensor, tap: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states: [b, s, h] -> the block's output [b, s, h], a tap, the router's logits [n, e].

        A dense block gives the tap [b, s, h] that the next block takes, a block with experts the
        logits. Without a tap the experts read the block's input.
        """
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        after_attention = hidden_states + self._drop(attended)
        x = None
        if self.post_attention_layernorm is not None:
            x = self.post_attention_layernorm(after_attention)
        if self.is_moe:
            mlp, logits = self.mlp(x, hidden_states if tap is None else tap)
            return after_attention + self._drop(mlp), None, logits
        output = after_attention + self._drop(self.mlp(x))
        tap = {"pos1": output, "pos2": after_attention, "pos3": hidden_states}[self.config.tap]
        if self.config.router_norm == "shared":
            tap = self.post_attention_layernorm(tap)
        return output, tap, None

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, p=self.hidden_dropout, training=self.training)


class ScMoEPreTrainedModel(PreTrainedModel):
    """What transformers has to know of the model."""

    config_class = ScMoEConfig
    config: ScMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScMoEBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Logits are recorded as an output of the block, not of the router: a block that is checkpointed
    # runs its modules without gradients first.
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": ScMoEBlock,
        "attentions": ScMoEAttention,
        "router_logits": OutputRecorder(ScMoEBlock, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ScMoENorm):
            init.constant_(module.weight, 1.0 - module.offset)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ScMoERouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            for bias in (module.bias, module.expert_bias):
                if bias is not None:
                    init.zeros_(bias)


class ScMoEModel(ScMoEPreTrainedModel):
    """The blocks, without the head."""

    def __init__(self, config: ScMoEConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.position_embedding == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.rotary_emb = (
            ScMoERotaryEmbedding(config) if config.position_embedding == "rope" else None
        )
        self.layers = nn.ModuleList(ScMoEBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = ScMoENorm(config, config.hidden_size)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """input_ids: [b, s] -> the last hidden state [b, s, h], and the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(h.shape[1], device=h.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self.embed_positions is not None:
            h = h + self.embed_positions(position_ids)
        h = F.dropout(h, p=self.config.hidden_dropout, training=self.training)
        rotations = None if self.rotary_emb is None else self.rotary_emb(position_ids)

        tap = None
        for block in self.layers[: self.config.num_hidden_layers]:  # fewer in an early exit
            h, tap, _ = block(
                h,
                tap,
                attention_mask=mask,
                position_embeddings=rotations,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(h),
            past_key_values=past_key_values if use_cache else None,
        )


class ScMoEForCausalLM(ScMoEPreTrainedModel, GenerationMixin):
    """A ScMoE GPT with its head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ScMoEConfig):
        super().__init__(config)
        self.model = ScMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """input_ids: [b, s] -> logits [b, s, v], and the mean cross entropy if labels are given.

        With ``output_router_logits``, here or in the configuration, the output has the routers'
        logits too, [n, e] for each block with experts, and ``aux_loss``, see
        :func:`load_balancing_loss`; the loss then has ``router_aux_loss_coef`` times it added.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        aux_loss = None
        if output_router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, self.config, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            if aux_loss is not None:
                share = _share_of_step(labels, **kwargs)
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: ScMoEConfig,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Megatron's auxiliary loss: for each block e * sum_i f_i P_i, summed over the blocks.

    f_i is the share of choices that fell on expert i, P_i its mean score; a balanced block gives 1.
    (Mixtral's in transformers averages f and P over the blocks first, and does not divide by k.)

    Args:
        router_logits: [n, e] for each block with experts.
        attention_mask: [b, s or more], 0 for tokens that do not count; others are not read.
    """
    of_blocks = []
    for logits in router_logits:
        if config.router_score_function == "sigmoid":
            scores = torch.sigmoid(logits.float())
            scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        else:
            scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        chosen = scores.topk(config.num_experts_per_tok, dim=-1).indices
        choices = torch.zeros_like(scores).scatter(1, chosen, 1.0)
        if attention_mask is not None and attention_mask.dim() == 2:
            length = len(logits) // len(attention_mask)
            counts = attention_mask[:, -length:].reshape(-1, 1).to(scores)
            scores, choices = scores * counts, choices * counts
        f = choices.sum(dim=0) / choices.sum()
        p = scores.sum(dim=0) / scores.sum()
        of_blocks.append(config.num_experts * (f * p).sum())
    return torch.stack([loss.to(of_blocks[0].device) for loss in of_blocks]).sum()


def _share_of_step(labels: torch.Tensor, num_items_in_batch=None, **_) -> torch.Tensor | float:
    """How much of an optimizer's step these labels are: 1, but for gradient accumulation in Trainer."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


# What save_pretrained writes has this code beside it, for AutoModel and trust_remote_code.
ScMoEConfig.register_for_auto_class()
ScMoEModel.register_for_auto_class("AutoModel")
ScMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# Trainer knows by this table whose labels label_smoothing_factor has to shift; it compares each
# token with itself else. Pipelines know by it that the model generates text.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ScMoEConfig.model_type] = ScMoEForCausalLM.__name__
