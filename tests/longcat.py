"""Small LongCat-Flash models of transformers' own class, and the Megatron models they become."""

import json
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from megatron_scmoe.checkpoints.convert import hf_to_megatron
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.config import ScMoEConfig
from tests import models

CONFIG = dict(
    vocab_size=models.VOCAB,
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    ffn_hidden_size=48,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    head_dim=4,
    v_head_dim=6,
    moe_topk=3,
    n_routed_experts=4,
    zero_expert_num=2,
    expert_ffn_hidden_size=20,
    max_position_embeddings=64,
    initializer_range=0.2,
)

VARIANTS = {
    "zero experts": {},
    "no zero experts, one layer": dict(zero_expert_num=0, num_layers=1),
    "router bias, three layers": dict(router_bias=True, num_layers=3, routed_scaling_factor=2.5),
    "more choices than experts": dict(moe_topk=5, zero_expert_num=4, rms_norm_eps=1e-6),
    "queries not compressed": dict(q_lora_rank=None),
    "tied embeddings": dict(tie_word_embeddings=True, num_layers=1),
}
"""Configurations, as changes of ``CONFIG``."""


def build(variant: str, folder: Path, **changes) -> LongcatFlashForCausalLM:
    """A model with random weights in every tensor, saved in ``folder``."""
    torch.manual_seed(1)
    fields = CONFIG | VARIANTS[variant] | changes
    uncompressed = fields["q_lora_rank"] is None
    if uncompressed:  # transformers' class needs a rank; with this one its scale is 1
        fields |= dict(q_lora_rank=fields["hidden_size"])
    model = LongcatFlashForCausalLM(LongcatFlashConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.2 * torch.randn_like(parameter)
        for layer in model.model.layers:
            layer.mlp.router.e_score_correction_bias.normal_(0, 0.1)
            if uncompressed:
                for attention in layer.self_attn:
                    attention.q_a_proj = attention.q_a_layernorm = torch.nn.Identity()
    model.save_pretrained(folder)
    if uncompressed:
        _rename_queries(folder)
    return model


def load_config(folder: Path) -> dict:
    """The ``config.json`` of a folder."""
    return json.loads((Path(folder) / "config.json").read_text())


def import_folder(folder: Path, save: Path) -> Path:
    """Import a LongCat-Flash folder; returns the folder with the tensors of the checkpoint."""
    hf_to_megatron(folder, save)
    return save / "release"


def build_megatron(config: dict, layout: dict | None = None, scmoe: dict | None = None, **changes):
    """The Megatron model of a ``config.json`` on this rank."""
    options = ScMoEConfig(
        combine="add",
        router_norm="shared",
        zero_experts=config["zero_expert_num"],
        expert_bias="proportional",
        router_bias=config.get("router_bias", False),
        mla_scale=True,
        mla_norm_epsilon=1e-6,
        **(scmoe or {}),
    )
    fields = dict(
        multi_latent_attention=True,
        num_layers=2 * config["num_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=None,
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_head_dim=config["qk_nope_head_dim"],
        qk_pos_emb_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        rope_type="rope",
        rotary_base=int(config["rope_parameters"]["rope_theta"]),
        apply_rope_fusion=False,
        qk_layernorm=True,
        layernorm_epsilon=config["rms_norm_eps"],
        ffn_hidden_size=config["ffn_hidden_size"],
        moe_ffn_hidden_size=config["expert_ffn_hidden_size"],
        moe_shared_expert_intermediate_size=config["ffn_hidden_size"],
        num_moe_experts=config["n_routed_experts"],
        moe_router_topk=config["moe_topk"],
        moe_router_topk_scaling_factor=config["routed_scaling_factor"],
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_bias_update_rate=0.05,
    )
    tied = config["tie_word_embeddings"]
    (model,) = models.build_scmoe(options, layout, tied=tied, **(fields | changes))
    return model


def load(model, checkpoint: Path) -> None:
    """Load a checkpoint into a model, every tensor of it."""
    state = model.sharded_state_dict(metadata=models.checkpoint_metadata())
    state = dist_checkpointing.load(state, str(checkpoint))
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()}, strict=True)


def megatron_logits(config: dict, checkpoint: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of a checkpoint, on this one rank."""
    model = build_megatron(config)
    load(model, checkpoint)
    with torch.no_grad():
        return models.forward(model.eval(), tokens)


def on_disk(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names of transformers' class in memory, by those in its files."""
    result = {}
    for name, tensor in tensors.items():
        prefix, found, part = name.partition(".experts.")
        if not found:
            result[name] = tensor
        for i, expert in enumerate(tensor if found else ()):
            pieces = expert.chunk(2) if part == "gate_up_proj" else (expert,)
            kinds = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            for kind, piece in zip(kinds, pieces):
                result[f"{prefix}.experts.{i}.{kind}.weight"] = piece
    return result


def by_checkpoint_key(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """Tensors of a Megatron model on one rank, by the names in its checkpoints."""
    result: dict[str, torch.Tensor] = {}
    experts: dict[str, list] = {}
    for name, tensor in tensors.items():
        for kind in ("q", "kv"):
            name = name.replace(f".{kind}_layernorm.", f".linear_{kind}_up_proj.layer_norm_")
        head, found, rest = name.partition(".local_experts.")
        if found:
            experts.setdefault(f"{head}.experts.{rest.partition('.')[2]}", []).append(tensor)
        else:
            result[name] = tensor
    for name in [n for n in result if ".pre_mlp_layernorm." in n]:
        layer, _, kind = name.partition(".pre_mlp_layernorm.")
        if f"{layer}.mlp.router.weight" not in result:
            result[f"{layer}.mlp.linear_fc1.layer_norm_{kind}"] = result.pop(name)
    result |= {name: torch.stack(parts) for name, parts in experts.items()}
    return {name: LazyTensor.from_tensor(tensor) for name, tensor in result.items()}


def _rename_queries(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {k.replace("q_b_proj", "q_proj"): v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = load_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"q_lora_rank": None}))
