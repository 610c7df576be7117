"""The oracle: a ScMoE GPT in plain PyTorch, one process, written from the formulas of the paper.

Cai et al., "Shortcut-connected Expert Parallelism for Accelerating Mixture of Experts"
(arXiv 2404.05019). Nothing here is fast: experts are a loop, attention is a full matrix, and there
is no dropout. Everything is computed in the dtype of the parameters, so that `model.double()` is an
oracle in fp64. Needs torch alone.

    model = ReferenceScMoE(ReferenceConfig(tap="pos2", combine="cg1", ...)).double()
    load_megatron_state(model, gpt_model.state_dict())      # a single-rank Megatron GPTModel
    loss, logits = model(tokens, labels)
    loss.backward()
    gradients = megatron_gradients(model)                   # the same names and layouts again

Shapes: b batch, s sequence, h hidden, n = b*s tokens, e experts, k experts per token,
a attention heads, g query groups, d head size, f hidden size of an MLP, v vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ReferenceConfig:
    """The shape of a model and its ScMoE options. Wrong combinations raise ValueError.

    tap: what the router and the routed experts read, see `ReferenceScMoE`. "current" is no
        shortcut at all: they read what the shared expert reads, as in an ordinary shared-expert MoE
        (a baseline, and the way to compare this file with a stock Megatron model).
    moe_every: 2: dense and MoE blocks alternate, dense first; 1: every block is an MoE block;
        0: a dense GPT.
    router_norm: the norm the tap goes through: "own", or "shared": the one before the dense MLP of
        the preceding block. Without meaning when tap is "current".
    combine: "add", "cg1" or "cg2", see `MoE`.
    zero_experts: experts behind the others that give a token back as it is (LongCat-Flash).
    activation: "swiglu", "gelu" (erf) or "gelu_tanh". Megatron's plain F.gelu is "gelu"; its fused
        bias-gelu is "gelu_tanh".
    dense_bias: biases in the linear layers of attention and of dense MLPs.
    moe_bias: biases in the router and the routed experts (Megatron ties both to one flag, and its
        shared expert refuses it).
    vocab_size: rows of the embedding, so the padded size of a padded vocabulary.
    """

    num_layers: int = 4
    hidden_size: int = 16
    num_heads: int = 4
    num_query_groups: int = 2
    head_size: int | None = None
    ffn_hidden_size: int = 24
    vocab_size: int = 32
    max_sequence_length: int = 64

    tap: str = "pos2"
    moe_every: int = 2
    router_norm: str = "own"
    combine: str = "add"
    post_norm: bool = False

    num_experts: int = 4
    zero_experts: int = 0
    top_k: int = 1
    expert_ffn_hidden_size: int = 24
    shared_ffn_hidden_size: int | None = 24
    score_function: str = "softmax"
    pre_softmax: bool = True
    scaling_factor: float | None = None
    expert_bias: bool = False
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0

    position_embedding: str = "rope"
    rotary_base: float = 10000.0
    norm: str = "RMSNorm"
    norm_eps: float = 1e-5
    activation: str = "swiglu"
    dense_bias: bool = False
    moe_bias: bool = False
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        accepted = {
            "tap": ("pos1", "pos2", "pos3", "current"),
            "moe_every": (0, 1, 2),
            "router_norm": ("own", "shared"),
            "combine": ("add", "cg1", "cg2"),
            "score_function": ("softmax", "sigmoid"),
            "position_embedding": ("rope", "learned_absolute"),
            "norm": ("RMSNorm", "LayerNorm"),
            "activation": ("swiglu", "gelu", "gelu_tanh"),
        }
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: accepted are {values}")
        if self.moe_every == 2 and self.num_layers % 2:
            raise ValueError(f"num_layers={self.num_layers}: blocks come in pairs")
        if self.moe_every == 1 and self.tap not in ("pos1", "current"):
            raise ValueError(f"tap={self.tap!r}: with MoE in every block only pos1 exists")
        if self.moe_every == 1 and self.router_norm == "shared":
            raise ValueError("router_norm='shared': there is no dense MLP to share the norm of")
        if self.combine != "add" and self.shared_ffn_hidden_size is None:
            raise ValueError(f"combine={self.combine!r} needs a shared expert")
        if self.expert_bias and self.score_function == "softmax" and not self.pre_softmax:
            raise ValueError("expert_bias needs pre_softmax, or score_function='sigmoid'")
        if not 1 <= self.top_k <= self.all_experts:
            raise ValueError(f"top_k={self.top_k}: accepted is 1 to {self.all_experts}")
        if self.head_size is None:
            self.head_size = self.hidden_size // self.num_heads

    @property
    def all_experts(self) -> int:
        """Experts and zero experts: what the router scores."""
        return self.num_experts + self.zero_experts


@dataclass
class Evaluation:
    """What one micro-batch gives. The lists have one entry per MoE block, coefficient included."""

    lm_loss: Tensor
    load_balancing_losses: list[Tensor]
    z_losses: list[Tensor]
    logits: Tensor

    @property
    def objective(self) -> Tensor:
        """The number that training descends: cross entropy plus all auxiliary losses."""
        return self.lm_loss + sum(self.load_balancing_losses) + sum(self.z_losses)


class ReferenceScMoE(nn.Module):
    """A GPT with ScMoE blocks.

    Blocks come in pairs, l with a dense MLP and l+1 with the MoE (paper, section 3):

        H_l^MH      = H_{l-1}    + MH_l(H_{l-1})
        H_l^MLP     = H_l^MH     + MLP_l(H_l^MH)
        H_{l+1}^MH  = H_l^MLP    + MH_{l+1}(H_l^MLP)
        H_{l+1}     = H_{l+1}^MH + MoE(x = norm(H_{l+1}^MH), t = norm(tap))

        tap:  pos1 = H_l^MLP,  pos2 = H_l^MH,  pos3 = H_{l-1}

    With MoE in every block the tap (pos1) is the input of the block itself.
    """

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = None
        if config.position_embedding == "learned_absolute":
            self.position_embedding = nn.Embedding(config.max_sequence_length, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(config, has_moe=config.moe_every > 0 and (i + 1) % config.moe_every == 0)
            for i in range(config.num_layers)
        )
        self.final_norm = Norm(config)
        self.head = None
        if not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, labels: [b, s] -> loss: scalar, logits: [b, s, v].

        As in Megatron, the loss *is* the mean cross entropy, and its *gradient* is that of cross
        entropy plus auxiliary losses. In eval mode the auxiliary losses are left out altogether.
        """
        result = self.evaluate(tokens, labels)
        if not self.training:
            return result.lm_loss, result.logits
        auxiliary = result.objective - result.lm_loss
        return result.lm_loss + (auxiliary - auxiliary.detach()), result.logits

    def evaluate(self, tokens: Tensor, labels: Tensor) -> Evaluation:
        """tokens, labels: [b, s] -> every loss by itself."""
        h = self.word_embedding(tokens)
        if self.position_embedding is not None:
            h = h + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))

        routings = []
        if self.config.moe_every == 0:
            for block in self.blocks:
                h = dense_block(h, block)
        elif self.config.moe_every == 1:
            for block in self.blocks:
                h, routing = lone_moe_block(h, block, self.config.tap)
                routings.append(routing)
        else:
            for dense, moe in zip(self.blocks[0::2], self.blocks[1::2], strict=True):
                h, routing = pair_of_blocks(h, dense, moe, self.config)
                routings.append(routing)

        h = self.final_norm(h)
        logits = h @ self.word_embedding.weight.T if self.head is None else self.head(h)
        logits = logits.to(self.word_embedding.weight.dtype)  # autocast has another
        log_probabilities = torch.log_softmax(logits, dim=-1)
        of_labels = log_probabilities.gather(-1, labels.unsqueeze(-1))
        return Evaluation(
            lm_loss=-of_labels.mean(),
            load_balancing_losses=[routing.load_balancing_loss for routing in routings],
            z_losses=[routing.z_loss for routing in routings],
            logits=logits,
        )


def pair_of_blocks(
    h: Tensor, dense: Block, moe: Block, config: ReferenceConfig
) -> tuple[Tensor, Routing]:
    """A dense block and an MoE block; h = H_{l-1}: [b, s, h] -> H_{l+1}: [b, s, h]."""
    h_mh = h + dense.mh(h)
    h_mlp = h_mh + dense.mlp(dense.mlp_norm(h_mh))
    h_next_mh = h_mlp + moe.mh(h_mlp)

    x = moe.mlp_norm(h_next_mh)
    if config.tap == "current":
        t = x
    else:
        tap = {"pos1": h_mlp, "pos2": h_mh, "pos3": h}[config.tap]
        t = moe.moe.shortcut_norm(tap) if config.router_norm == "own" else dense.mlp_norm(tap)
    output, routing = moe.moe(x, t)
    return h_next_mh + output, routing


def lone_moe_block(h: Tensor, moe: Block, tap: str) -> tuple[Tensor, Routing]:
    """MoE in every block; h = H_{l-1}, the block's input and the tap: [b, s, h]."""
    h_mh = h + moe.mh(h)
    x = moe.mlp_norm(h_mh)
    t = x if tap == "current" else moe.moe.shortcut_norm(h)
    output, routing = moe.moe(x, t)
    return h_mh + output, routing


def dense_block(h: Tensor, block: Block) -> Tensor:
    """An ordinary transformer block: [b, s, h] -> [b, s, h]."""
    h_mh = h + block.mh(h)
    return h_mh + block.mlp(block.mlp_norm(h_mh))


class Block(nn.Module):
    """The parts of a transformer block; the functions above say how they are connected."""

    def __init__(self, config: ReferenceConfig, has_moe: bool) -> None:
        super().__init__()
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        # Without a shared expert nothing reads x, and the block has no norm for it.
        reads_x = not has_moe or config.shared_ffn_hidden_size is not None
        self.mlp_norm = Norm(config) if reads_x or config.tap == "current" else nn.Identity()
        self.mlp = None if has_moe else MLP(config, config.ffn_hidden_size, config.dense_bias)
        self.moe = MoE(config) if has_moe else None

    def mh(self, h: Tensor) -> Tensor:
        """MH(h): attention with its norm; [b, s, h] -> [b, s, h]."""
        return self.attention(self.attention_norm(h))


class MoE(nn.Module):
    """Shared expert SE on x, gate and routed experts on t (both already normed).

        routed = sum over the k chosen experts i of  G(t)_i E_i(t)

        add:  SE(x) + routed
        cg1:  sigmoid(w . x) SE(x) + routed                w in R^h
        cg2:  c0 SE(x) + c1 routed,  c = softmax(W x)      W in R^{2 x h}

    With a post norm, the result is post_norm(of that).
    """

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.gate = Gate(config)
        self.experts = nn.ModuleList(
            MLP(config, config.expert_ffn_hidden_size, config.moe_bias)
            for _ in range(config.num_experts)
        )
        self.shared_expert = None
        if config.shared_ffn_hidden_size is not None:
            self.shared_expert = MLP(config, config.shared_ffn_hidden_size, bias=False)
        self.cg1 = nn.Linear(hidden, 1, bias=False) if config.combine == "cg1" else None
        self.cg2 = nn.Linear(hidden, 2, bias=False) if config.combine == "cg2" else None
        has_own_norm = config.tap != "current" and config.router_norm == "own"
        self.shortcut_norm = Norm(config) if has_own_norm else None
        self.post_norm = Norm(config) if config.post_norm else None

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Routing]:
        """x, t: [b, s, h] -> what the residual stream receives: [b, s, h], and the routing."""
        routing = self.gate(t.reshape(-1, t.shape[-1]))
        output = self.routed(t.reshape(-1, t.shape[-1]), routing).reshape(t.shape)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            if self.cg1 is not None:
                output = torch.sigmoid(self.cg1(x)) * shared + output
            elif self.cg2 is not None:
                c = torch.softmax(self.cg2(x), dim=-1)
                output = c[..., 0:1] * shared + c[..., 1:2] * output
            else:
                output = shared + output
        if self.post_norm is not None:
            output = self.post_norm(output)
        return output, routing

    def routed(self, t: Tensor, routing: Routing) -> Tensor:
        """t: [n, h] -> sum_i G(t)_i E_i(t): [n, h]. An expert without tokens gets zero gradients."""
        total = torch.zeros_like(t)
        zero_experts = [nn.Identity()] * self.config.zero_experts
        for i, expert in enumerate([*self.experts, *zero_experts]):
            token, choice = (routing.chosen == i).nonzero(as_tuple=True)
            weighted = routing.weights[token, choice].unsqueeze(-1) * expert(t[token])
            total = total.index_add(0, token, weighted.to(total.dtype))  # autocast has another
        return total


@dataclass
class Routing:
    """Where each token goes. chosen, weights: [n, k]; the losses carry their coefficients."""

    chosen: Tensor
    weights: Tensor
    load_balancing_loss: Tensor
    z_loss: Tensor


class Gate(nn.Module):
    """The router: which k experts a token goes to, and with what weights G(t)_i.

    With l = W t the logits of a token over all experts, and K its k kept experts:

        softmax, pre:   p = softmax(l),  K = top-k of p + expert_bias,  G_i = p_i   (i in K)
        softmax, post:  K = top-k of l,  G = softmax over the k kept logits
        sigmoid:        p = sigmoid(l),  K = top-k of p + expert_bias,  G_i = p_i / sum_K p
                        (k = 1: G_i = p_i)

    and G is multiplied by scaling_factor at last. Post-softmax with k = 1 has G = 1: the router gets
    no gradient. expert_bias moves the choice only, never a weight, and has no gradient.
    """

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.hidden_size, config.all_experts, bias=config.moe_bias)
        expert_bias = torch.zeros(config.all_experts) if config.expert_bias else None
        self.register_buffer("expert_bias", expert_bias)

    def forward(self, t: Tensor) -> Routing:
        """t: [n, h]."""
        k = self.config.top_k
        logits = self.linear(t)
        if self.config.score_function == "sigmoid":
            weights, chosen = self.choose(torch.sigmoid(logits))
            if k > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        elif self.config.pre_softmax:
            weights, chosen = self.choose(torch.softmax(logits, dim=-1))
        else:
            kept, chosen = logits.topk(k)
            weights = torch.softmax(kept, dim=-1)
        if self.config.scaling_factor is not None:
            weights = weights * self.config.scaling_factor
        return Routing(chosen, weights, self.load_balancing_loss(logits), self.z_loss(logits))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the chosen experts, and which they are: [n, k] each."""
        ranking = scores if self.expert_bias is None else scores + self.expert_bias
        chosen = ranking.topk(self.config.top_k).indices
        return scores.gather(1, chosen), chosen

    def load_balancing_loss(self, logits: Tensor) -> Tensor:
        """coeff * e * sum_i f_i P_i over the n tokens of the micro-batch (Switch Transformer).

        f_i is the share of the n*k assignments that fall on expert i, P_i the mean score of i, the
        scores being a distribution over all experts (softmax, or sigmoid divided by its sum). The
        assignments are the top-k of these scores: expert_bias has no part in it, in Megatron either.
        """
        e = self.config.all_experts
        if self.config.score_function == "sigmoid":
            scores = torch.sigmoid(logits)
            scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        else:
            scores = torch.softmax(logits, dim=-1)
        chosen = scores.topk(self.config.top_k).indices
        f = torch.bincount(chosen.flatten(), minlength=e).to(scores) / chosen.numel()
        p = scores.mean(dim=0)
        return self.config.aux_loss_coeff * e * (f * p).sum()

    def z_loss(self, logits: Tensor) -> Tensor:
        """coeff * mean over tokens of logsumexp(l)^2 (ST-MoE)."""
        return self.config.z_loss_coeff * torch.logsumexp(logits, dim=-1).square().mean()


class MLP(nn.Module):
    """Dense MLP, shared expert and routed expert alike: down(silu(gate(x)) * up(x)), or without
    gate down(gelu(up(x)))."""

    def __init__(self, config: ReferenceConfig, ffn_hidden_size: int, bias: bool) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.activation = config.activation
        self.gate = None
        if config.activation == "swiglu":
            self.gate = nn.Linear(hidden, ffn_hidden_size, bias=bias)
        self.up = nn.Linear(hidden, ffn_hidden_size, bias=bias)
        self.down = nn.Linear(ffn_hidden_size, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., h] -> [..., h]."""
        if self.gate is not None:
            gate = self.gate(x)
            return self.down(gate * torch.sigmoid(gate) * self.up(x))
        u = self.up(x)
        if self.activation == "gelu":
            return self.down(0.5 * u * (1 + torch.erf(u / math.sqrt(2))))
        inner = math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)
        return self.down(0.5 * u * (1 + torch.tanh(inner)))


class Attention(nn.Module):
    """Causal attention, a query heads on g groups of keys and values.

    Query head j belongs to group j // (a / g).
    """

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.config = config
        hidden, bias = config.hidden_size, config.dense_bias
        of_queries = config.num_heads * config.head_size
        of_groups = config.num_query_groups * config.head_size
        self.query = nn.Linear(hidden, of_queries, bias=bias)
        self.key = nn.Linear(hidden, of_groups, bias=bias)
        self.value = nn.Linear(hidden, of_groups, bias=bias)
        self.output = nn.Linear(of_queries, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> [b, s, h]."""
        b, s, _ = x.shape
        a, g, d = self.config.num_heads, self.config.num_query_groups, self.config.head_size
        query = self.query(x).view(b, s, a, d)
        key = self.key(x).view(b, s, g, d)
        value = self.value(x).view(b, s, g, d)
        if self.config.position_embedding == "rope":
            query = rotate(query, self.config.rotary_base)
            key = rotate(key, self.config.rotary_base)

        future = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(diagonal=1)
        heads = []
        for j in range(a):
            group = j // (a // g)
            scores = query[:, :, j] @ key[:, :, group].transpose(1, 2) / math.sqrt(d)  # [b, s, s]
            attended = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
            heads.append(attended @ value[:, :, group])  # [b, s, d]
        return self.output(torch.cat(heads, dim=-1))


def rotate(x: Tensor, base: float) -> Tensor:
    """RoPE on x: [b, s, heads, d]. Component i is paired with i + d/2 (not with its neighbour):
    at position p the pair turns by the angle p * base^(-2i/d)."""
    s, d = x.shape[1], x.shape[3]
    frequency = 1.0 / base ** (torch.arange(0, d, 2, device=x.device).to(x) / d)
    angle = torch.outer(torch.arange(s, device=x.device).to(x), frequency)  # [s, d/2]
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    first, second = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(self, config: ReferenceConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = None
        if config.norm == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., h] -> [..., h]."""
        if self.bias is None:
            return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.weight
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


# --- Megatron's names and layouts -----------------------------------------------------------------


def load_megatron_state(model: ReferenceScMoE, state: dict[str, Tensor]) -> None:
    """Fill the model from the `state_dict()` of a single-rank Megatron GPTModel.

    Names may be of the local or of the Transformer Engine kind (`canonical_name`). Entries ending in
    `_extra_state` are skipped. Raises KeyError for names that are missing, left over, or given
    twice, and ValueError for a shape that does not fit; the model is then untouched.
    """
    given: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith("_extra_state"):
            continue
        name = canonical_name(key)
        if name in given:
            raise KeyError(f"{name} is given twice, the second time as {key}")
        given[name] = tensor

    layout = _megatron_layout(model)
    missing, left_over = sorted(layout.keys() - given.keys()), sorted(given.keys() - layout.keys())
    if missing or left_over:
        raise KeyError(f"missing: {missing}; left over: {left_over}")
    for name, rows in layout.items():
        expected = torch.cat([tensor[part] for tensor, part in rows]).shape
        if given[name].shape != expected:
            raise ValueError(f"{name}: {tuple(given[name].shape)}, expected {tuple(expected)}")

    with torch.no_grad():
        for name, rows in layout.items():
            sizes = [len(tensor[part]) for tensor, part in rows]
            for (tensor, part), source in zip(rows, given[name].split(sizes), strict=True):
                tensor[part] = source


def megatron_gradients(model: ReferenceScMoE) -> dict[str, Tensor]:
    """The gradients of every parameter, named and laid out as Megatron's (local names).

    An expert that received no token has zeros. Raises ValueError before any backward.
    """
    return _gather(model, lambda parameter: parameter.grad)


def megatron_state(model: ReferenceScMoE) -> dict[str, Tensor]:
    """The parameters, named and laid out as Megatron's: what `load_megatron_state` reads."""
    return _gather(model, lambda parameter: parameter.detach(), with_buffers=True)


def canonical_name(key: str) -> str:
    """The local-spec name of a parameter that Transformer Engine modules call otherwise.

    Norms fused into the linear layer behind them, and grouped experts:
        ...self_attention.linear_qkv.layer_norm_weight -> ...input_layernorm.weight
        ...mlp.linear_fc1.layer_norm_weight            -> ...pre_mlp_layernorm.weight
        ...mlp.experts.linear_fc1.weight3     -> ...mlp.experts.local_experts.3.linear_fc1.weight
    Any other name is returned as it is.
    """
    for pattern, replacement in (
        (r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1"),
        (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1"),
        (
            r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$",
            r".experts.local_experts.\3.\1.\2",
        ),
    ):
        key = re.sub(pattern, replacement, key)
    return key


# A Megatron tensor is a stack, along dimension 0, of runs of rows of our tensors.
Rows = list[tuple[Tensor, slice]]
ALL = slice(None)


def _gather(
    model: ReferenceScMoE, what: Callable[[Tensor], Tensor | None], with_buffers: bool = False
) -> dict[str, Tensor]:
    gathered = {}
    for name, rows in _megatron_layout(model).items():
        if not with_buffers and not rows[0][0].requires_grad:
            continue
        parts = [(what(tensor), part) for tensor, part in rows]
        if any(tensor is None for tensor, _ in parts):
            raise ValueError(f"{name} has no gradient: call backward() first")
        gathered[name] = torch.cat([tensor[part] for tensor, part in parts])
    return gathered


def _megatron_layout(model: ReferenceScMoE) -> dict[str, Rows]:
    layout: dict[str, Rows] = {}

    def plain(name: str, module: nn.Module) -> None:
        for kind in ("weight", "bias"):
            if getattr(module, kind, None) is not None:
                layout[f"{name}.{kind}"] = [(getattr(module, kind), ALL)]

    def stacked(name: str, parts: list[tuple[nn.Linear, slice]]) -> None:
        for kind in ("weight", "bias"):
            if getattr(parts[0][0], kind) is not None:
                layout[f"{name}.{kind}"] = [(getattr(linear, kind), rows) for linear, rows in parts]

    def mlp(name: str, module: MLP) -> None:
        # SwiGLU: gate above up
        stacked(
            f"{name}.linear_fc1",
            [(linear, ALL) for linear in (module.gate, module.up) if linear is not None],
        )
        plain(f"{name}.linear_fc2", module.down)

    plain("embedding.word_embeddings", model.word_embedding)
    if model.position_embedding is not None:
        plain("embedding.position_embeddings", model.position_embedding)

    for i, block in enumerate(model.blocks):
        layer = f"decoder.layers.{i}"
        plain(f"{layer}.input_layernorm", block.attention_norm)
        stacked(f"{layer}.self_attention.linear_qkv", _qkv_rows(block.attention))
        plain(f"{layer}.self_attention.linear_proj", block.attention.output)
        plain(f"{layer}.pre_mlp_layernorm", block.mlp_norm)
        if block.mlp is not None:
            mlp(f"{layer}.mlp", block.mlp)
            continue

        moe = block.moe
        plain(f"{layer}.mlp.router", moe.gate.linear)
        if moe.gate.expert_bias is not None:
            layout[f"{layer}.mlp.router.expert_bias"] = [(moe.gate.expert_bias, ALL)]
        for j, expert in enumerate(moe.experts):
            mlp(f"{layer}.mlp.experts.local_experts.{j}", expert)
        if moe.shared_expert is not None:
            mlp(f"{layer}.mlp.shared_experts", moe.shared_expert)
        if moe.cg1 is not None:
            layout[f"{layer}.mlp.shared_experts.gate_weight"] = [(moe.cg1.weight, ALL)]
        if moe.cg2 is not None:
            plain(f"{layer}.mlp.combine_gate", moe.cg2)
        if moe.shortcut_norm is not None:
            plain(f"{layer}.mlp.shortcut_layernorm", moe.shortcut_norm)
        if moe.post_norm is not None:
            plain(f"{layer}.mlp.post_layernorm", moe.post_norm)

    plain("decoder.final_layernorm", model.final_norm)
    if model.head is not None:
        plain("output_layer", model.head)
    return layout


def _qkv_rows(attention: Attention) -> list[tuple[nn.Linear, slice]]:
    """Megatron keeps each query group together: its queries, its key, its value."""
    config = attention.config
    queries = config.num_heads // config.num_query_groups * config.head_size
    rows = []
    for group in range(config.num_query_groups):
        of_group = slice(group * config.head_size, (group + 1) * config.head_size)
        rows.append((attention.query, slice(group * queries, (group + 1) * queries)))
        rows.append((attention.key, of_group))
        rows.append((attention.value, of_group))
    return rows
